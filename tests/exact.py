"""The commit in float64, token by token and row by row, with which every backend is compared."""

import torch

from ttt.ops import log8


def double(t):
    return t.double() if t is not None and t.is_floating_point() else t


def commit(case, *, rows, beta, eps, lam, **_):
    """The weight (m, n) after a commit of ``case`` that replays ``rows`` (R, n); R may be 0."""
    w, anchor, x, delta, eta = (double(case[k]) for k in ("weight", "anchor", "x", "delta", "eta"))
    total = float(eta.sum())
    for e, d, v in zip(eta.tolist(), delta, x, strict=True):
        w = w - e * torch.outer(d, v)
    if len(rows):
        rows = rows.double()
        drift = torch.stack([(w - anchor) @ row for row in rows])
        gram = torch.stack([rows @ row for row in rows])
        ridge = eps * float(gram.diagonal().mean()) or 1.0
        weighted = beta * torch.linalg.inv(gram + ridge * torch.eye(len(rows), dtype=torch.float64)) @ drift
        for u, row in zip(weighted, rows, strict=True):
            w = w - torch.outer(u, row)
    if lam:
        omega = case["importance"]
        omega = log8.decode(omega, w.shape[1]).double() if log8.is_packed(omega) else omega.double()
        w = anchor + (w - anchor) / (1 + lam * total * omega)
    return w


def steps(case, *, mu, decay, lam=0.0, **_):
    """(W, M) after the tokens of ``case`` by the recurrence of Titans, with the mean of the gradients for each of them.

    The pulls to the anchor are applied at the end. There are no replay rows.
    """
    w, m, anchor, x, delta, eta = (double(case[k]) for k in ("weight", "momentum", "anchor", "x", "delta", "eta"))
    tokens = len(eta)
    for _ in range(tokens):
        m = mu * m + sum(e * torch.outer(d, v) for e, d, v in zip(eta, delta, x, strict=True)) / tokens
        w = w - m
    omega = lam * double(case["importance"]) if lam else 0.0
    pull = eta.sum() * (omega + decay)
    return (anchor + (w - anchor) / (1 + pull) if lam or decay else w), m
