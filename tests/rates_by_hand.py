"""The steps of `ttt.nn.rates` from their definition, token by token in float64."""

import torch


def steps_by_hand(x, delta, config, start=(0.0, 0.0, 0), raw=None):
    """The step of every token, and the sums of |x|^2, g^2 and tokens afterwards.

    Args:
        x: (T, n), inputs that updates are made with; delta: (T, m), gradients at the output.
        config: its lr, rate ("energy", "rms" or "decrease") and clip are used.
        start: the sums before the first token.
        raw: for "decrease" the inputs and gradients themselves, where updates are made with other rows.

    Returns:
        (T,) float64, and the three sums.
    """
    energy, square, rows = start
    found = []
    x0, delta0 = (x, delta) if raw is None else raw
    for one, d, first, d0 in zip(x.double(), delta.double(), x0.double(), delta0.double(), strict=True):
        # The change of the token's own loss by an update -d one^T, whose root is |d| |one| if the rows are the same.
        gradient = float((torch.outer(d0, first) * torch.outer(d, one)).sum()) ** 0.5
        energy, square, rows = energy + float(first @ one), square + gradient**2, rows + 1
        root = (square / rows) ** 0.5
        scale = {"energy": energy / rows, "rms": root, "decrease": root**2}[config.rate]
        eta = config.lr / scale if scale else 0.0
        bound = None if config.clip is None else config.clip * (1.0 if config.rate == "energy" else root)
        found.append(eta if bound is None or gradient <= bound else eta * bound / gradient)
    return torch.tensor(found, dtype=torch.float64), (energy, square, rows)


def burst_by_hand(x, delta, eta, config, roots=None, raw=None):
    """The steps ``eta`` (T,) after the burst bound, from the matrix sum of eta_t delta_t x_t^T.

    Args:
        roots: (T,), for "decrease" the root of the running mean of s^2 at each token; see `roots_by_hand`.
        raw: as in `steps_by_hand`.
    """
    weight = eta if roots is None else eta * roots

    def total(x, delta):
        return sum(e * torch.outer(d, one) for e, d, one in zip(weight, delta.double(), x.double(), strict=True))

    most = config.burst * config.lr * len(eta) ** 0.5
    size = float((total(x, delta) * total(*(raw or (x, delta)))).sum()) ** 0.5
    return eta if size <= most else eta * (most / size)


def roots_by_hand(x, delta, config, start=(0.0, 0.0, 0), raw=None):
    """(T,) float64: the root of the mean of s^2 over the tokens up to each, for "decrease"; None for other rates."""
    if config.rate != "decrease":
        return None
    x0, delta0 = (x, delta) if raw is None else raw
    squares = (x0.double() * x.double()).sum(1) * (delta0.double() * delta.double()).sum(1)
    return ((start[1] + squares.cumsum(0)) / (start[2] + torch.arange(1, len(x) + 1))).sqrt()
