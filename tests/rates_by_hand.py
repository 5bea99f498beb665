"""The steps of `ttt.nn.rates` from their definition, token by token in float64."""

import torch


def steps_by_hand(x, delta, config, start=(0.0, 0.0, 0)):
    """The step of every token, and the sums of |x|^2, g^2 and tokens afterwards.

    Args:
        x: (T, n), inputs that updates are made with; delta: (T, m), gradients at the output.
        config: its lr, rate ("energy" or "rms") and clip are used.
        start: the sums before the first token.

    Returns:
        (T,) float64, and the three sums.
    """
    energy, square, rows = start
    found = []
    for one, d in zip(x.double(), delta.double(), strict=True):
        gradient = float(torch.outer(d, one).norm())
        energy, square, rows = energy + float(one @ one), square + gradient**2, rows + 1
        scale = energy / rows if config.rate == "energy" else (square / rows) ** 0.5
        eta = config.lr / scale if scale else 0.0
        bound = None if config.clip is None else config.clip * (scale if config.rate == "rms" else 1.0)
        found.append(eta if bound is None or gradient <= bound else eta * bound / gradient)
    return torch.tensor(found, dtype=torch.float64), (energy, square, rows)


def burst_by_hand(x, delta, eta, config):
    """The steps ``eta`` (T,) after the burst bound, from the matrix sum of eta_t delta_t x_t^T."""
    total = sum(e * torch.outer(d, one) for e, d, one in zip(eta, delta.double(), x.double(), strict=True))
    most = config.burst * config.lr * len(eta) ** 0.5
    size = float(total.norm())
    return eta if size <= most else eta * (most / size)
