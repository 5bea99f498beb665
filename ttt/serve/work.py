"""What a service does for a user besides answering, as jobs: more for users with weights than for users with states."""

from __future__ import annotations

from typing import Any, Protocol

from ttt.conversation import Telling
from ttt.learn.learner import Learner
from ttt.serve import jobs
from ttt.serve.errors import BadRequest
from ttt.serve.jobs import Job
from ttt.serve.sessions import Sessions
from ttt.serve.state_reader import StateReader
from ttt.serve.teaching import Lesson


class Work(Protocol):
    """Makes the jobs of one service; those of `ttt.serve.jobs`.

    What a model's users do not have is refused with BadRequest, when the job is made.
    """

    def cost(self, lesson: Lesson, telling: Telling | None = None) -> int:
        """How many tokens `lesson` is going to read."""

    def lesson(self, user: str, lesson: Lesson, telling: Telling | None = None) -> Job:
        """Learn ``lesson``, read as ``telling`` says; None for the service's way, by the length of the lesson."""

    def study(self, user: str, **options: Any) -> Job:
        """Study what the user said; ``options`` are those of `ttt.Learner.study`."""

    def export(self, user: str) -> Job:
        """Copy the user's weights."""

    def drift(self, user: str) -> Job:
        """Measure how far the user's weights are from the base model's."""

    def taught(self, user: str, most: int) -> Job:
        """Score the newest ``most`` texts that the user taught."""

    def unstudied(self, user: str | None) -> bool:
        """Whether something that ``user`` said was not studied yet."""


class WeightsWork(Work):
    """The work of a service whose users have weights of their own.

    Args:
        learner: of them, with a log of episodes.
        sessions: of the users.
        telling: how what users say is read.
    """

    def __init__(self, learner: Learner, sessions: Sessions, telling: Telling) -> None:
        self.learner, self.sessions, self.telling = learner, sessions, telling

    def lesson(self, user: str, lesson: Lesson, telling: Telling | None = None) -> Job:
        how = telling or self.telling.of(lesson.tokens)
        return Job(
            user, "learn", lambda: jobs.learn(self.learner, self.sessions, user, lesson, how), tokens=lesson.tokens,
            cost=self.cost(lesson, how),
        )  # fmt: skip

    def cost(self, lesson: Lesson, telling: Telling | None = None) -> int:
        return len(lesson.ids) * (telling or self.telling.of(lesson.tokens)).passes

    def study(self, user: str, **options: Any) -> Job:
        return Job(user, "study", lambda: jobs.study(self.learner, self.sessions, user, **options))

    def export(self, user: str) -> Job:
        return Job(user, "export", lambda: jobs.export(self.sessions, user))

    def drift(self, user: str) -> Job:
        return Job(user, "drift", lambda: jobs.drift(self.learner, user))

    def taught(self, user: str, most: int) -> Job:
        return Job(user, "taught", lambda: jobs.taught(self.learner, user, most))

    def unstudied(self, user: str | None) -> bool:
        assert self.learner.episodes is not None
        return any(not episode.studied for episode in self.learner.episodes.of(user))


class StatesWork(Work):
    """The work of a service whose users have states that read what they say.

    Args:
        reader: of the states.
        sessions: of the users.
    """

    def __init__(self, reader: StateReader, sessions: Sessions) -> None:
        self.reader, self.sessions = reader, sessions

    def lesson(self, user: str, lesson: Lesson, telling: Telling | None = None) -> Job:
        return Job(
            user, "learn", lambda: jobs.read(self.reader, self.sessions, user, lesson), tokens=lesson.tokens,
            cost=self.cost(lesson),
        )  # fmt: skip

    def cost(self, lesson: Lesson, telling: Telling | None = None) -> int:
        return lesson.tokens

    def study(self, user: str, **options: Any) -> Job:
        raise _without_weights("study")

    def export(self, user: str) -> Job:
        raise _without_weights("export")

    def drift(self, user: str) -> Job:
        raise _without_weights("drift")

    def taught(self, user: str, most: int) -> Job:
        raise _without_weights("taught")

    def unstudied(self, user: str | None) -> bool:
        return False


def _without_weights(what: str) -> BadRequest:
    return BadRequest(
        f"{what} is for users with weights of their own; a user of this model has a state, which has read what the "
        "user said and keeps no log of it",
        code="unsupported",
    )
