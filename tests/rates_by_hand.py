"""The steps of `ttt.nn.rates`, token by token, from their definition."""

import torch


def steps_by_hand(x, delta, config, start=(0.0, 0.0, 0)):
    """eta of every row, token by token, from the definition; and the sums at the end."""
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
    """The steps with the sum of the rows' gradients bounded, from the whole matrix."""
    total = sum(e * torch.outer(d, one) for e, d, one in zip(eta, delta.double(), x.double(), strict=True))
    most = config.burst * config.lr * len(eta) ** 0.5
    size = float(total.norm())
    return eta if size <= most else eta * (most / size)
