"""The conversation behind ``ttt chat``: it answers, learns from what was said, and stores what it learnt.

What is learnt stays: every turn's weights are a version in a `ttt.Store`, and a later chat begins with the newest. The
model learns from the user's own words only, after it has answered; the system prompt, the template and its own answers
are read and teach nothing. `Chat.study` reads what was said again until the weights hold it; what was said is kept with
the weights, and goes with them.
"""

from __future__ import annotations

import dataclasses
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
from ttt.store import Store, UnknownUser, Version


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one turn of a `Chat` did.

    Attributes:
        answer: the model's.
        version: of the user's weights in the store, from this turn; None if nothing was learnt.
        tokens: number of the user's tokens that were learnt, with those that end the turn.
        nll: their mean loss in nats, before they were learnt.
    """

    answer: str
    version: int | None
    tokens: int
    nll: float


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

    Raises:
        TypeError, ValueError: for a wrong argument, a tokenizer without a chat template, or a user in the store whose
            weights do not fit the model.
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
        self.messages: list[dict[str, str]] = []
        if self.versions():
            self.pool.load(user, store.get(user).tensors)

    def versions(self) -> list[Version]:
        """The user's versions, newest first; empty for a user who is not in the store."""
        try:
            return self.store.history(self.user)
        except UnknownUser:
            return []

    def say(self, text: str, streamer: Any = None) -> Turn:
        """Answer ``text``, then learn from it and store what was learnt.

        Args:
            streamer: prints the answer as it is written (`transformers.TextStreamer`).

        Raises:
            ValueError: if ``text`` is empty, or so long that it leaves no room for an answer.
        """
        check_type("text", text, str, "a string")
        text = text.strip()
        if not text:
            raise ValueError("text must not be empty")
        asked, ids = self._fitting([*self.messages, {"role": "user", "content": text}])
        with torch.no_grad(), ttt.users(self.model, [self.user]):
            written = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.max_new_tokens, do_sample=False,
                streamer=streamer, pad_token_id=self.tokenizer.eos_token_id,
            )  # fmt: skip
        answer = self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
        turn = self._learn(asked, answer) if self.learn else Turn(answer, None, 0, float("nan"))
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return turn

    def study(self) -> tuple[ttt.StudyOutput, int | None]:
        """Read again what the user said since the last study, and store what was learnt (`ttt.Learner.study`).

        Returns:
            What was done, and the new version; None where nothing new was said.

        Raises:
            ValueError: in a chat that learns nothing. FloatingPointError: as `ttt.Learner.study`.
            StoreError: if the store refuses, as `LeaseHeld` where another process has the user.
        """
        if not self.learn:
            raise ValueError("study is refused: nothing is learnt in this chat (learn=False)")
        if self.user not in self.pool.users:
            return ttt.StudyOutput(0, []), None
        with self.store.lease(self.user) as lease:  # taken first: what could not be stored is not studied
            output = self.learner.study(self.user)
            return output, self.store.put(lease, self.pool.export(self.user)) if output.episodes else None

    def rollback(self, version: int) -> int:
        """Go back to an earlier version, which becomes the newest one; the conversation begins anew.

        Returns:
            The number of the new version.

        Raises:
            ValueError: if the store has no such version of the user.
        """
        numbers = [found.number for found in self.versions()]
        if version not in numbers:
            raise ValueError(f"version must be one of {sorted(numbers)}, got {version!r}")
        new = self.store.rollback(self.user, version)
        self.pool.load(self.user, self.store.get(self.user).tensors)
        self.messages = []
        return new

    def forget(self) -> None:
        """Remove everything that was learnt from the user, here and in the store; the conversation begins anew."""
        if self.user in self.pool.users:
            self.pool.forget(self.user)
        if self.versions():
            self.store.forget(self.user)
        self.messages = []

    def _learn(self, asked: list[dict[str, str]], answer: str) -> Turn:
        ids, mask = self._tokens(asked, prompt=False)
        seen = self.learner.observe(ids, learn_mask=mask, users=[self.user], **self.telling.of(int(mask.sum())).options)
        nll = float(seen.nll[mask[:, 1:]].double().mean())
        return Turn(answer, self._put(), int(mask.sum()), nll)

    def _put(self) -> int:
        with self.store.lease(self.user) as lease:
            return self.store.put(lease, self.pool.export(self.user))

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
