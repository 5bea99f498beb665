"""The conversation behind ``ttt chat``: it answers, learns from what was said, and stores what it learnt.

What is learnt stays: every turn's weights are a version in a `ttt.Store`, and a later chat begins with the newest. The
model learns from the user's own words only, after it has answered; the system prompt, the template and its own answers
are read and teach nothing. `Chat.study` reads what was said again until the weights hold it; what was said is kept with
the weights, and goes with them.

Several chats and servers may have one user open. Each turn begins with the newest version of the store, and whatever
adds a version holds the user's lease from before it loads the newest one until the new one is stored: no version is
made of weights that another process has changed or removed since.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ttt
from ttt.calibrating import Progress, calibrated, silent
from ttt.checks import check_type, check_whole
from ttt.conversation import CONVERSATION, Telling
from ttt.learn.chat_template import turn_tokens
from ttt.learn.learner import Learner
from ttt.signals import SignalsDeferred
from ttt.store import (
    DamagedStateWarning,
    Lease,
    Store,
    StoreError,
    UnknownUser,
    Version,
)

_LEASE = 30.0  # seconds that a lease is taken for, and renewed to, while something is learnt


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one turn of a `Chat` did.

    Attributes:
        answer: the model's.
        version: of the user's weights in the store, from this turn; None if nothing was learnt.
        tokens: number of the user's tokens that were learnt, with those that end the turn.
        nll: their mean loss in nats, before they were learnt.
        refused: the store's error, where nothing was learnt because of it; else None.
    """

    answer: str
    version: int | None
    tokens: int
    nll: float
    refused: StoreError | None = None


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


class Chat:
    """A conversation with a model that learns from it.

    Args:
        model: a causal language model of Hugging Face transformers; it is adapted in place, as
            `ttt.conversation.CONVERSATION` says, and calibrated.
        tokenizer: its fast tokenizer, with a chat template.
        store: where the user's versions are kept.
        user: their id.
        max_new_tokens: bound on the length of an answer.
        learn: False: nothing is learnt from this chat.
        telling: how what the user says is read.
        calibration: a file that keeps what is measured on text that the model writes itself, which takes half a minute
            for a model of 135 M parameters on two cores; None for the one in the user's folder for caches, which
            ``ttt serve`` shares.
        progress: shows how far that is, where there is no such file yet.
        notice: called with a sentence where other weights are loaded than those of the turn before: another process has
            stored a version or removed the user, or the newest version is damaged. By default it is a warning.

    Attributes:
        messages: the conversation, as chat templates take it. It begins anew where the weights went back to an earlier
            version, or were forgotten, here or by another process.
        stored: how many versions this chat has stored.

    Raises:
        TypeError, ValueError: for a wrong argument, a tokenizer without a chat template, or a user in the store whose
            weights do not fit the model.
        StoreError: if the store cannot be read, or no sound version is left of the user.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        store: Store,
        user: str,
        *,
        max_new_tokens: int = 128,
        learn: bool = True,
        telling: Telling | None = None,
        calibration: Path | None = None,
        progress: Progress = silent,
        notice: Callable[[str], None] = _warn,
    ) -> None:
        check_type("store", store, Store, "a ttt.Store")
        check_whole("max_new_tokens", max_new_tokens, 1)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"tokenizer must have a chat template, got {type(tokenizer).__name__} without one")
        self.model: Any = ttt.adapt_(model, CONVERSATION)
        self.learner = Learner(self.model, episodes=ttt.EpisodeLog())
        calibrated(self.learner, tokenizer, calibration, progress)
        assert self.learner.pool is not None
        self.pool = self.learner.pool
        self.tokenizer, self.store, self.user = tokenizer, store, user
        self.max_new_tokens, self.learn, self.telling = max_new_tokens, learn, telling or Telling()
        self.notice, self.stored = notice, 0
        self.messages: list[dict[str, str]] = []
        self._version: Version | None = None  # whose weights the pool has; None for a user without a version
        self._unsure = False  # whether the pool may have others than that
        self._load(self._newest())

    def versions(self) -> list[Version]:
        """The user's versions, newest first; empty for a user who is not in the store."""
        try:
            return self.store.history(self.user)
        except UnknownUser:
            return []

    @property
    def version(self) -> int | None:
        """The number of the version that the chat's weights are; None for a user without a version."""
        return None if self._version is None else self._version.number

    def say(self, text: str, streamer: Any = None) -> Turn:
        """Answer ``text``, then learn from it and store what was learnt.

        If the store refuses, as where another process holds the user's lease, the answer is returned, nothing is
        learnt, and `Turn.refused` is its error. Interrupted, as by Ctrl-C, it learns nothing, and the conversation is
        as before; an interrupt that comes while a version is written waits until it is.

        Args:
            streamer: prints the answer as it is written (`transformers.TextStreamer`).

        Raises:
            ValueError: if ``text`` is empty, no valid Unicode, or so long that it leaves no room for an answer.
        """
        check_type("text", text, str, "a string")
        text = text.strip()
        if not text:
            raise ValueError("text must not be empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be valid Unicode, got a lone surrogate at character {error.start}") from None
        refused: StoreError | None = None
        try:
            self._follow()
        except StoreError as error:
            if not self.learn:
                self.notice(f"the store cannot be read: {error}")
            refused = error
        before = self.messages
        asked, ids = self._fitting([*before, {"role": "user", "content": text}])
        with torch.no_grad(), ttt.users(self.model, [self.user]):
            written = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.max_new_tokens, do_sample=False,
                streamer=streamer, pad_token_id=self.tokenizer.eos_token_id,
            )  # fmt: skip
        answer = self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
        turn = Turn(answer, None, 0, float("nan"), refused if self.learn else None)
        if self.learn and refused is None:
            try:
                with self._writing() as lease:
                    # Where the conversation began anew meanwhile, what was said before is forgotten.
                    turn = self._learn(asked if self.messages is before else asked[-1:], answer, lease)
            except StoreError as error:
                turn = dataclasses.replace(turn, refused=error)
        if self.messages is before:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
        return turn

    def study(self) -> tuple[ttt.StudyOutput, int | None]:
        """Read again what the user said since the last study, and store what was learnt (`ttt.Learner.study`).

        Interrupted, it learns nothing.

        Returns:
            What was done, and the new version; None where nothing new was said.

        Raises:
            ValueError: in a chat that learns nothing. FloatingPointError: as `ttt.Learner.study`.
            StoreError: if the store refuses, as `LeaseHeld` where another process has the user; nothing was learnt.
        """
        if not self.learn:
            raise ValueError("study is refused: nothing is learnt in this chat (learn=False)")
        self._follow()
        if self.user not in self.pool.users:  # a lease would add the user to the store
            return ttt.StudyOutput(0, []), None
        with self._writing() as lease:
            output = self.learner.study(self.user)
            return output, self._put(lease) if output.episodes else None

    def rollback(self, version: int) -> int:
        """Go back to an earlier version, which becomes the newest one; the conversation begins anew.

        Returns:
            The number of the new version.

        Raises:
            ValueError: if the store has no such version of the user.
            StoreError: if the store refuses.
        """
        numbers = [found.number for found in self.versions()]
        if version not in numbers:
            raise ValueError(f"version must be one of {sorted(numbers)}, got {version!r}")
        with SignalsDeferred():
            new = self.store.rollback(self.user, version)
            self._unsure, self.messages = True, []
            self.stored += 1
            self._load(self._newest())
        return new

    def forget(self) -> None:
        """Remove everything that was learnt from the user, here and in the store; the conversation begins anew.

        Another chat or server that has the user open can store nothing more of what it has learnt.

        Raises:
            StoreError: if the store failed; then another call completes it.
        """
        self.messages = []
        self._load(None)
        self._unsure = True
        with contextlib.suppress(UnknownUser):
            self.store.forget(self.user)
        self._unsure = False

    # -- the store --------------------------------------------------------------------------------------------------

    def _newest(self) -> Version | None:
        return next(iter(self.versions()), None)

    def _follow(self) -> None:
        """Load the newest version of the store, if another process has stored it, or removed the user."""
        versions = self.versions()
        newest, had = next(iter(versions), None), self._version
        if newest == had and not self._unsure:
            return
        anew = bool(self.messages) and (
            newest is None
            or (had is not None and (had not in versions or any(v.source for v in versions if v.number > had.number)))
        )
        if anew:
            self.messages = []
        if not self._load(newest) or newest == had:
            return
        if newest is None:
            what = f"the store holds nothing of {self.user!r} any more: what was learnt is forgotten"
        else:
            what = f"the newest version in the store is {newest.number} now; it is loaded"
        self.notice(f"{what}; the conversation begins anew" if anew else what)

    def _load(self, newest: Version | None) -> bool:
        """Give the pool the weights of the ``newest`` version in the store; None: those of a new user.

        Returns:
            False if an older version was loaded, because the newest is damaged; `notice` has said so.
        """
        sound = True
        if newest is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DamagedStateWarning)
                found = self.store.get(self.user)
            self.pool.load(self.user, found.tensors)
            if found.damaged:
                sound, (number, reason) = False, found.damaged[0]
                self.notice(f"version {number} is damaged ({reason}); version {found.version} is loaded in its place")
        elif self.user in self.pool.users:
            self.pool.forget(self.user)
        self._version, self._unsure = newest, False
        return sound

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Lease]:
        """Inside, this process alone may add to the user's versions, the newest of which is loaded.

        Unless the block stores a version, the weights are afterwards what they were before it.
        """
        lease, ended = None, threading.Event()
        try:
            with SignalsDeferred():  # an interrupt must not leave a lease that nobody releases
                lease = self.store.lease(self.user, _LEASE)
            threading.Thread(target=_renew, args=(lease, ended), name="ttt-chat-lease", daemon=True).start()
            self._follow()
            before = self.pool.export(self.user) if self.user in self.pool.users else None
            stored = self.stored
            self._unsure = True  # should the weights not be put back below: they are loaded before the next turn
            try:
                yield lease
            finally:
                if self.stored == stored:
                    with SignalsDeferred():
                        if before is not None:
                            self.pool.load(self.user, before)
                        else:
                            self.pool.forget(self.user)
                        self._unsure = False
        finally:
            ended.set()
            if lease is not None:
                with contextlib.suppress(StoreError):  # it expires by itself
                    lease.release()

    def _put(self, lease: Lease) -> int:
        """Store the user's weights: the number of the version."""
        state = self.pool.export(self.user)
        with SignalsDeferred():
            number = self.store.put(lease, state)
            self.stored += 1
            with contextlib.suppress(StoreError):  # it is stored; its entry is read before the next turn
                newest = self._newest()
                if newest is not None and newest.number == number:
                    self._version, self._unsure = newest, False
        return number

    # -- learning ---------------------------------------------------------------------------------------------------

    def _learn(self, asked: list[dict[str, str]], answer: str, lease: Lease) -> Turn:
        ids, mask = self._tokens(asked, prompt=False)
        seen = self.learner.observe(ids, learn_mask=mask, users=[self.user], **self.telling.of(int(mask.sum())).options)
        nll = float(seen.nll[mask[:, 1:]].double().mean())
        return Turn(answer, self._put(lease), int(mask.sum()), nll)

    def _fitting(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], Tensor]:
        """The latest of ``messages`` that leave room for an answer, and their tokens."""
        room = self.learner.context - self.max_new_tokens
        while True:
            ids, _ = self._tokens(messages, prompt=True)
            if ids.shape[1] <= room:
                return messages, ids
            if len(messages) < 3:
                raise ValueError(f"text must have at most about {room} tokens, got {ids.shape[1]}")
            messages = messages[2:]

    def _tokens(self, messages: list[dict[str, str]], *, prompt: bool) -> tuple[Tensor, Tensor]:
        """The tokens (1, T) of ``messages`` in the template, and (1, T) bool: those of the last one's words that teach.

        Args:
            prompt: whether the template's beginning of an answer follows.
        """
        ids, _, teaches = turn_tokens(self.tokenizer, messages, [len(messages) - 1], answer=prompt)
        device = next(self.model.parameters()).device
        return torch.tensor([ids], device=device), torch.tensor([teaches], device=device)


def _renew(lease: Lease, ended: threading.Event) -> None:
    """Extend ``lease`` until ``ended``."""
    while not ended.wait(_LEASE / 4):
        with contextlib.suppress(StoreError):  # whether it still holds is seen when something is stored
            lease.renew()
