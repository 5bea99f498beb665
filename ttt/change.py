"""`Change`: notices that the surprise of a stream has changed, by Page's cumulative sums."""

from __future__ import annotations

_MEMORY = 16  # chunks: short, as surprise falls while a domain is being learnt


class Change:
    """Two-sided CUSUM (Page 1954) on the standardised surprise of chunks::

        z = (s - level) / spread        S+ <- max(0, S+ + z - slack)        S- <- max(0, S- - z - slack)

    An alarm is S+ or S- > alarm. Level and spread (1.25 times the mean absolute deviation) are running means, over the
    latest 16 chunks once there are so many; z enters them clipped to 3. The first ``warm`` chunks raise no alarm.

    Attributes:
        since: chunks since the sum that is now larger left 0: where the change is likeliest to have been.
    """

    def __init__(self, alarm: float, slack: float = 0.5, warm: int = 8) -> None:
        self.alarm, self.slack, self.warm = alarm, slack, warm
        self.restart()

    def restart(self) -> None:
        """Learn level and spread anew."""
        self.level, self.spread, self.count = 0.0, 0.0, 0
        self.clear()

    def clear(self) -> None:
        """Begin the sums anew, at the present level and spread."""
        self._up, self._down = (0.0, 0), (0.0, 0)

    @property
    def since(self) -> int:
        return max(self._up, self._down)[1]

    def update(self, surprise: float) -> bool:
        """Take one chunk's mean surprise; whether there is an alarm."""
        self.count += 1
        spread = max(self.spread, 0.02 * abs(self.level), 1e-6)
        z = (surprise - self.level) / spread if self.count > self.warm else 0.0
        self._up, self._down = self._sum(self._up, z), self._sum(self._down, -z)
        gone = surprise - self.level
        if self.count > self.warm:
            gone = max(-3 * spread, min(3 * spread, gone))
        rate = max(1 / self.count, 1 / _MEMORY)
        self.level += rate * gone
        if self.count > 1:
            self.spread += max(1 / (self.count - 1), 1 / _MEMORY) * (1.25 * abs(gone) - self.spread)
        return max(self._up, self._down)[0] > self.alarm

    def _sum(self, held: tuple[float, int], z: float) -> tuple[float, int]:
        total = max(0.0, held[0] + z - self.slack)
        return total, held[1] + 1 if total else 0
