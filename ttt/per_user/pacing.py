"""The formulas of guards: how the strength of the protection follows the drift, and how surprise slows learning.

`ttt.Guard` uses them for one set of weights, `ttt.per_user.guards.UserGuards` for every user.
"""

from __future__ import annotations

_LEVEL_TOKENS = 65536  # time constant of the running level of the loss
_RISE, _FALL = 1 / 2, 1 / 16  # largest steps of the exponent: protection is raised soon and lowered late


def next_strength(
    strength: float, drift: float, *, threshold: float, bound: float, strengthen: float, cap: float
) -> tuple[float, bool]:
    """The strength after a check that found ``drift``, and whether the drift is past ``bound`` (NaN is)::

    s <- min(cap, max(1, s strengthen^e))        e = min(1/2, max(-1/16, drift / threshold - 1)); past the bound 1/2
    """
    past = not drift <= bound
    exponent = _RISE if past else max(-_FALL, min(_RISE, drift / threshold - 1))
    return clipped(strength * strengthen**exponent, cap), past


def clipped(strength: float, cap: float) -> float:
    """``strength`` within [1, cap]."""
    return min(cap, max(1.0, strength))


def pace(loss: float, tokens: int, level: float, surprise: float) -> tuple[float, float]:
    """The rate at which a chunk of ``tokens`` tokens with the mean ``loss`` is learnt, and the new running level::

    rate = min(1, (surprise level / loss)^4)
    level <- level + min(1, tokens / 65536) (min(loss, surprise level) - level)
    """
    limit = surprise * level
    rate = 1.0 if loss <= limit else (limit / loss) ** 4
    return rate, level + min(1.0, tokens / _LEVEL_TOKENS) * (min(loss, limit) - level)
