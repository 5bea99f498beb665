"""How a velocity M acts on W over the T tokens of one commit: the coefficients, derived.

Titans (Behrouz, Zhong & Mirrokni, "Titans: Learning to Memorize at Test Time", 2024) carries a velocity from token to
token. With g_t = eta_t delta_t x_t^T, and its forget gate, here the pull to the anchor, left aside::

    M_t = mu M_{t-1} + g_t                     W_t = W_{t-1} - M_t

A commit knows G = sum g_t and not each g_t: that would take a second product as large as G's. It takes all of them as
G / T, which is exact for T = 1 and for equal g_t, and leaves out how they follow one another within the window. Then::

    M_T       = keep M_0 + share G             keep = mu^T           share = (1 - mu^T) / (T (1 - mu))
    W_0 - W_T = carry M_0 + gain G             carry = mu (1 - mu^T) / (1 - mu)
                                               gain = (1 - mu share) / (1 - mu)

for the sum of M_t - mu M_{t-1} = g_t over the window is (1 - mu) (W_0 - W_T) + mu (M_T - M_0) = G. Whatever the window,
a token moves W by 1 / (1 - mu) times its gradient in the end. Until the commit it acts by its gradient alone, through
the window (`ttt.ops.window_linear`), and M_0 does not act.
"""

from __future__ import annotations


def coefficients(mu: float, tokens: int) -> tuple[float, float, float, float]:
    """(keep, share, carry, gain) for T = ``tokens`` >= 0 and mu in [0, 1); of no tokens nothing comes: M stays."""
    keep = mu**tokens
    share = (1 - keep) / (max(tokens, 1) * (1 - mu))
    return keep, share, mu * (1 - keep) / (1 - mu), (1 - mu * share) / (1 - mu)
