"""Bounds on what a `ttt.serve.service.Service` takes at a time."""

from __future__ import annotations

import dataclasses

from ttt.checks import check_real, check_whole
from ttt.serve.errors import BadRequest


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on what a `Service` takes at a time.

    Attributes:
        rows: largest number of sequences that are generated at a time.
        waiting: largest number of requests, and of jobs on users' weights, that wait.
        waiting_per_user: largest number of them of one user; 0 for half of ``waiting``, but at least 1.
        learning_tokens: largest number of tokens that are to be read, to learn from them, with context, in all passes.
            A single lesson may have more.
        context: largest number of tokens of a sequence, prompt and continuation.
        prefill: tokens of a prompt that are read between two steps of the others.
        learning_share: the part of the time, above 0 and at most 1, that work on users' weights may take while answers
            are generated. With nothing to generate it takes all of it.
        prefix_cache: bytes of keys and values that are kept for requests which begin with the same tokens; 0 for none.
        study_after: seconds after which what an idle user said is studied, if nothing else is to be done; 0 for never.
    """

    rows: int = 8
    waiting: int = 128
    waiting_per_user: int = 0
    learning_tokens: int = 262_144
    context: int = 2048
    prefill: int = 128
    learning_share: float = 0.5
    prefix_cache: int = 0
    study_after: float = 30.0

    def __post_init__(self) -> None:
        if self.waiting_per_user == 0:
            object.__setattr__(self, "waiting_per_user", max(1, self.waiting // 2))
        for name in ("rows", "waiting", "waiting_per_user", "learning_tokens", "prefill"):
            check_whole(name, getattr(self, name), 1)
        check_whole("context", self.context, 2)
        check_whole("prefix_cache", self.prefix_cache, 0)
        check_real("study_after", self.study_after, low=0.0)
        if not check_real("learning_share", self.learning_share, low=0.0, high=1.0) > 0:
            raise ValueError("learning_share must be above 0, got 0: users would wait for their learning forever")

    def check_n(self, n: int) -> None:
        """Raise BadRequest if a request asks for more than ``rows`` continuations."""
        if n > self.rows:
            raise BadRequest(
                f"n must be at most {self.rows}, the number of texts that are generated at a time, got {n}", param="n"
            )
