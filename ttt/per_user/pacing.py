"""Settings and formulas of guards: the strength of the protection after a check, and the steps on surprising text.

`ttt.Guard` uses them for one set of weights, `ttt.per_user.guards.UserGuards` for every user.
"""

from __future__ import annotations

from ttt.checks import check_number, check_whole

MOST_CHECKS = 10_000
"""Checks that are kept in a guard's history, the newest ones."""
_LEVEL_TOKENS = 65536  # time constant of the running level of the loss
_RISE, _FALL = 1 / 2, 1 / 16  # largest steps of the exponent: protection is raised soon and lowered late


class GuardTripped(RuntimeError):
    """A guard did not let a change of weights be written, as the drift would be above its ``bound``.

    Attributes:
        drift: loss on the held-back inputs divided by the frozen model's loss on them, minus 1.
    """

    def __init__(self, message: str, drift: float) -> None:
        super().__init__(message)
        self.drift = drift


class GuardSettings:
    """The settings that guards share, with their checks; `ttt.Guard` says what each one does.

    Raises:
        ValueError, TypeError: for a value out of range or of another type.
    """

    def __init__(
        self, threshold: float, bound: float | None, every: int | None, strengthen: float, cap: float, surprise: float
    ) -> None:
        self.threshold = check_number("threshold", threshold, 0.0, above=True)
        self.bound = check_number("bound", 1.5 * threshold if bound is None else bound, threshold)
        self.every = None if every is None else check_whole("every", every, 1)
        self.strengthen = check_number("strengthen", strengthen, 1.0, above=True)
        self.cap = check_number("cap", cap, 1.0)
        self.surprise = check_number("surprise", surprise, 1.0, above=True)

    def _is_due(self, tokens: int) -> bool:
        """Whether so many ``tokens``, learnt since the last check, ask for one."""
        return self.every is not None and tokens >= self.every

    def _within(self, drift: float) -> float:
        """``drift``; raises GuardTripped if it is above ``bound``, as NaN is."""
        if not drift <= self.bound:
            raise GuardTripped(
                f"the guard's held-back text would have a loss {drift:.2%} above the frozen model's, and "
                f"{self.bound:.2%} is allowed; nothing was changed",
                drift,
            )
        return drift

    def _next_strength(self, strength: float, drift: float) -> tuple[float, bool]:
        """The strength after a check that found ``drift``, and whether the drift is above ``bound`` (NaN counts):

        s <- min(cap, max(1, s strengthen^e))
        e = min(1/2, max(-1/16, drift / threshold - 1)), or 1/2 above the bound
        """
        past = not drift <= self.bound
        exponent = _RISE if past else max(-_FALL, min(_RISE, drift / self.threshold - 1))
        return clipped(strength * self.strengthen**exponent, self.cap), past


def clipped(strength: float, cap: float) -> float:
    """``strength`` within [1, cap]."""
    return min(cap, max(1.0, strength))


def pace(loss: float, tokens: int, level: float, surprise: float) -> tuple[float, float]:
    """The factor for the steps of a chunk of ``tokens`` tokens with the mean ``loss``, and the new running level:

    rate = min(1, (surprise level / loss)^4)
    level <- level + min(1, tokens / 65536) (min(loss, surprise level) - level)
    """
    limit = surprise * level
    rate = 1.0 if loss <= limit else (limit / loss) ** 4
    return rate, level + min(1.0, tokens / _LEVEL_TOKENS) * (min(loss, limit) - level)
