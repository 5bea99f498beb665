"""Numbers for Prometheus. No label names a user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Is told by a `ttt.serve.service.Service` what happens, and shows it to Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.prompt_tokens = Counter(
            "ttt_prompt_tokens", "Tokens of prompts, read or found in the prefix cache.", **made
        )
        self.reused_tokens = Counter("ttt_reused_tokens", "Tokens of prompts found in the prefix cache.", **made)
        self.reuses = Counter("ttt_prefix_hits", "Requests of which tokens were found in the prefix cache.", **made)
        self.completion_tokens = Counter("ttt_completion_tokens", "Tokens that were generated.", **made)
        self.learnt_tokens = Counter("ttt_learnt_tokens", "Tokens that were learnt.", **made)
        self.learning_seconds = Counter("ttt_learning_seconds", "Time that learning took.", **made)
        self.studies = Counter("ttt_studied_episodes", "Pieces of text that were studied.", **made)
        self.study_seconds = Counter("ttt_study_seconds", "Time that studies took.", **made)
        self.failures = Counter("ttt_failures", "What failed, by kind.", ["kind"], **made)
        self.missed_turns = Counter("ttt_missed_turns", "Turns answered as queued that were not learnt.", **made)
        self.trips = Counter("ttt_guard_trips", "Lessons and studies that a user's guard has undone.", **made)
        self.evictions = Counter("ttt_evictions", "Users whose slot was given to another one.", **made)
        self.opening = Histogram("ttt_user_open_seconds", "Reading a user from the store.", buckets=_SECONDS, **made)
        self.writing = Histogram("ttt_store_write_seconds", "Writing a version.", buckets=_SECONDS, **made)
        self.first_token = Histogram(
            "ttt_first_token_seconds", "From a request's arrival to its first token.", buckets=_SECONDS, **made
        )
        self.requests = Counter("ttt_requests", "Requests, by route and status.", ["route", "status"], **made)

    def watch(self, name: str, about: str, read: Callable[[], float]) -> None:
        """Show the value that ``read`` returns whenever it is asked for."""
        Gauge(name, about, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self.registry)

    # -- `ttt.serve.service.Observer` ---------------------------------------------------------------------------------

    def served(self, prompt: int, completion: int) -> None:
        self.prompt_tokens.inc(prompt)
        self.completion_tokens.inc(completion)

    def reused(self, tokens: int) -> None:
        self.reused_tokens.inc(tokens)
        self.reuses.inc()

    def learnt(self, tokens: int, seconds: float) -> None:
        self.learnt_tokens.inc(tokens)
        self.learning_seconds.inc(seconds)

    def studied(self, episodes: int, seconds: float) -> None:
        self.studies.inc(episodes)
        self.study_seconds.inc(seconds)

    def failed(self, kind: str) -> None:
        self.failures.labels(kind).inc()

    def missed(self) -> None:
        self.missed_turns.inc()

    def tripped(self) -> None:
        self.trips.inc()

    def evicted(self) -> None:
        self.evictions.inc()

    def opened(self, seconds: float) -> None:
        self.opening.observe(seconds)

    def stored(self, seconds: float) -> None:
        self.writing.observe(seconds)
