"""The coefficients by which a momentum M acts on W over the T tokens of one commit.

Titans (Behrouz, Zhong & Mirrokni, "Titans: Learning to Memorize at Test Time", 2024) updates a momentum per token. With
g_t = eta_t delta_t x_t^T, and without its forget gate (here the pull to the anchor):

    M_t = mu M_{t-1} + g_t                     W_t = W_{t-1} - M_t

A commit computes G = sum g_t only: the weighted sums over g_t would take a second product as large as that of G. Every
g_t is taken as G / T, which is exact for T = 1 and for equal g_t, and ignores the order of the tokens in the window:

    M_T       = keep M_0 + share G             keep = mu^T           share = (1 - mu^T) / (T (1 - mu))
    W_0 - W_T = carry M_0 + gain G             carry = mu (1 - mu^T) / (1 - mu)
                                               gain = (1 - mu share) / (1 - mu)

since the sum of M_t - mu M_{t-1} = g_t over the window is (1 - mu) (W_0 - W_T) + mu (M_T - M_0) = G. For every length
of the window, a token finally moves W by 1 / (1 - mu) times its gradient. Before the commit its gradient alone acts on
outputs, through the window (`ttt.ops.window_linear`), and M_0 does not.
"""

from __future__ import annotations


def coefficients(mu: float, tokens: int) -> tuple[float, float, float, float]:
    """(keep, share, carry, gain) for T = ``tokens`` >= 0 and mu in [0, 1). Without tokens, M stays as it is."""
    keep = mu**tokens
    share = (1 - keep) / (max(tokens, 1) * (1 - mu))
    return keep, share, mu * (1 - keep) / (1 - mu), (1 - mu * share) / (1 - mu)
