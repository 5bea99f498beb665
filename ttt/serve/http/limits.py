"""How much one API key may ask for in a minute."""

from __future__ import annotations

import math
import threading
import time

from ttt.serve.errors import TooBusy

_MOST_KEYS = 100_000


class RateLimits:
    """Token buckets for each key: they fill evenly, and hold a minute's worth.

    What a request may generate is counted when it comes, and what it did not generate is given back at its end.

    Args:
        requests, tokens: that a key may ask for in a minute; 0 for no bound.
    """

    def __init__(self, requests: int = 0, tokens: int = 0) -> None:
        self.bounds = {"requests": float(requests), "tokens": float(tokens)}
        self._lock = threading.Lock()
        self._held: dict[tuple[str, str], tuple[float, float]] = {}  # what is left, and when that was so

    def take(self, key: str, *, requests: int = 0, tokens: int = 0) -> None:
        """Count a request of ``key``.

        Raises:
            TooBusy: if there is not enough left; then nothing is counted.
        """
        wanted = {"requests": float(requests), "tokens": float(tokens)}
        now = time.monotonic()
        with self._lock:
            left = {}
            for name, bound in self.bounds.items():
                if not bound or not wanted[name]:
                    continue
                held, since = self._held.get((key, name), (bound, now))
                held = min(bound, held + (now - since) * bound / 60)
                need = min(wanted[name], bound)  # one that is larger than a minute's worth takes all of it
                if held < need:
                    seconds = math.ceil((need - held) * 60 / bound)
                    raise TooBusy(
                        f"this API key may ask for {bound:.0f} {name} in a minute; try again in {seconds} s",
                        retry_after=seconds,
                    )
                left[key, name] = (held - need, now)
            if len(self._held) > _MOST_KEYS:
                self._held = {each: value for each, value in self._held.items() if now - value[1] < 60}
            self._held.update(left)

    def give_back(self, key: str, tokens: int) -> None:
        """Count ``tokens`` less, which ``key`` had asked for and did not get."""
        with self._lock:
            if (key, "tokens") in self._held:
                held, since = self._held[key, "tokens"]
                self._held[key, "tokens"] = (min(self.bounds["tokens"], held + tokens), since)
