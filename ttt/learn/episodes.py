"""`EpisodeLog`: what was learnt from, kept as tokens so that `ttt.Learner.study` can read it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.checks import check_dense, check_whole
from ttt.learn.loop import ObserveOutput
from ttt.learn.text import Text


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """A piece of text that was learnt from.

    Attributes:
        ids: (T,) int64 tokens, on the CPU.
        learn: (T,) bool: the tokens on which a loss is taken; the others are context. False at 0.
        studied: whether `ttt.Learner.study` has read it.
    """

    ids: Tensor
    learn: Tensor
    studied: bool = False


class EpisodeLog:
    """Keeps the newest text that `ttt.Learner.observe` has learnt from, for each user:

        learner = ttt.Learner(model, episodes=ttt.EpisodeLog())
        learner.observe(ids, users=["ada"])
        learner.study("ada")

    With weights for each user the log is part of the user's state: `ttt.Pool.export` and `load` keep it, eviction hands
    it on, and `forget` erases it. With one set of weights everything is kept under the user None: a snapshot has it,
    the files of `ttt.save` do not, and `ttt.load` leaves the log as it is; ``export(None)`` and ``load(None, ...)``
    move it, and ``forget(None)`` empties it.

    Args:
        tokens: largest number of tokens that are kept of a user. The oldest episodes are dropped first.
        length: largest number of tokens of an episode, more than ``before``; longer text becomes several.
        before: number of tokens before the first token of an episode that are kept as its context, such as the
            beginning of a turn in a chat template.

    Raises:
        TypeError, ValueError: for an argument that is no whole number, or out of range.
    """

    prefix = "episodes"
    """Its tensors are ``episodes.{name}`` in a user's state."""

    def __init__(self, tokens: int = 16384, length: int = 256, before: int = 4) -> None:
        self.before = check_whole("before", before, 1)
        self.length = check_whole("length", length, before + 1)
        self.tokens = check_whole("tokens", tokens, length)
        self._held: dict[str | None, list[Episode]] = {}
        self._eras: dict[str | None, object] = {}

    def add(self, user: str | None, ids: Tensor, learn: Tensor, context: int | None = None) -> None:
        """Keep a text of ``user``: ``ids`` (T,) int64, of which the tokens ``learn`` (T,) bool were learnt.

        Each run of learnt tokens becomes an episode, of at most ``context`` tokens. The first token of a text is never
        learnt.

        Raises:
            ValueError: if ``ids`` and ``learn`` are no such tensors. Nothing has changed then.
        """
        if ids.dtype != torch.int64 or learn.dtype != torch.bool or ids.ndim != 1 or ids.shape != learn.shape:
            got = f"{ids.dtype} {tuple(ids.shape)} and {learn.dtype} {tuple(learn.shape)}"
            raise ValueError(f"ids and learn must be (T,) int64 and (T,) bool, got {got}")
        if not len(ids):
            return
        length = self.length if context is None else min(self.length, max(context, 2))
        before = min(self.before, length - 1)
        ids, learn = ids.detach().cpu(), learn.detach().cpu().clone()
        learn[0] = False
        held = self._held.setdefault(user, [])
        edges = torch.diff(learn.long(), prepend=learn.new_zeros(1).long(), append=learn.new_zeros(1).long())
        begins, ends = ((edges == sign).nonzero()[:, 0].tolist() for sign in (1, -1))
        for begin, end in zip(begins, ends, strict=True):
            for at in range(begin, end, length - before):
                part = slice(max(0, at - before), min(end, at + length - before))
                wanted = torch.arange(part.start, part.stop) >= at
                held.append(Episode(ids[part].clone(), wanted))
        total = sum(len(episode.ids) for episode in held)
        while total > self.tokens:
            total -= len(held.pop(0).ids)
        if not held:
            del self._held[user]

    def keep(
        self, text: Text, users: Sequence[str | None] | None, output: ObserveOutput, context: int | None = None
    ) -> None:
        """Keep what ``text`` taught ``users`` (None: the one set of weights), as ``output`` tells.

        Episodes are no longer than ``context``, the learner's.

        A text of which a chunk was rejected is not kept, nor that of a user one of whose chunks was; nor is one during
        which a guard has rolled the layers, or the user, back.
        """
        if users is None and (output.rejected or output.rollbacks):
            return
        untaught = {None, *output.rejected_users, *output.rolled_back_users}
        teach = torch.ones_like(text.ids, dtype=torch.bool) if text.teach is None else text.teach.clone()
        teach[:, 1:] &= text.scored  # the token after a gap was not scored, and so not learnt
        for row, user in enumerate([None] * len(text.ids) if users is None else users):
            if users is None or user not in untaught:
                attend = slice(None) if text.attend is None else text.attend[row]
                self.add(user, text.ids[row][attend], teach[row][attend], context)

    def of(self, user: str | None = None) -> list[Episode]:
        """The episodes of ``user``, oldest first."""
        return list(self._held.get(user, []))

    def mark_studied(self, user: str | None = None) -> None:
        """Mark all episodes of ``user`` as studied."""
        if user in self._held:
            self._held[user] = [dataclasses.replace(episode, studied=True) for episode in self._held[user]]

    # -- a user's state (`ttt.per_user.pool.UserState`) -------------------------------------------------------------

    def export(self, user: str | None) -> dict[str, Tensor]:
        """Copies of everything kept of ``user``: ``ids`` and ``learn`` (N,) of all episodes, ``lengths`` and
        ``studied`` (E,) of each; empty if nothing is kept."""
        held = self._held.get(user, [])
        if not held:
            return {}
        return {
            "ids": torch.cat([episode.ids for episode in held]),
            "learn": torch.cat([episode.learn for episode in held]),
            "lengths": torch.tensor([len(episode.ids) for episode in held]),
            "studied": torch.tensor([episode.studied for episode in held]),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError or TypeError unless ``state`` is what `export` returns, within the bounds of this log."""
        if not state:
            return
        kinds = {"ids": torch.int64, "learn": torch.bool, "lengths": torch.int64, "studied": torch.bool}
        if set(state) != set(kinds):
            raise ValueError(f"episodes needs the tensors {sorted(kinds)}, got {sorted(state)}")
        for name, dtype in kinds.items():
            check_dense(f"episodes.{name}", state[name])
            if state[name].dtype != dtype or state[name].ndim != 1:
                got = f"{state[name].dtype} of shape {tuple(state[name].shape)}"
                raise TypeError(f"episodes.{name} must be {dtype} with one dimension, got {got}")
        lengths, total = state["lengths"], len(state["ids"])
        if len(state["studied"]) != len(lengths) or len(state["learn"]) != total or total > self.tokens:
            raise ValueError(
                f"episodes must hold at most {self.tokens} tokens, with a flag for each token and each episode, got "
                + ", ".join(f"{name}: {len(state[name])}" for name in sorted(state))
            )
        if not len(lengths) or bool((lengths < 2).any()) or bool((lengths > self.length).any()):
            raise ValueError(f"episodes.lengths must be in [2, {self.length}], got {lengths.tolist()[:8]}")
        if int(lengths.sum()) != total or bool((state["ids"] < 0).any()):
            raise ValueError(f"episodes.lengths must add up to {total} tokens that are not negative")
        if bool(state["learn"][lengths.cumsum(0) - lengths].any()):
            raise ValueError("episodes.learn must be False at the first token of an episode")
        if not all(bool(part.any()) for part in state["learn"].split(lengths.tolist())):
            raise ValueError("episodes.learn must be True somewhere in each episode")

    def load(self, user: str | None, state: dict[str, Tensor]) -> None:
        """Keep exactly what `export` returned. The caller checks it first."""
        self._held.pop(user, None)
        if state:
            lengths = state["lengths"].tolist()
            parts = (state[name].cpu().clone().split(lengths) for name in ("ids", "learn"))
            rows = zip(*parts, state["studied"].tolist(), strict=True)
            self._held[user] = [Episode(ids, learn, bool(studied)) for ids, learn, studied in rows]

    def forget(self, user: str | None) -> None:
        """Drop everything that is kept of ``user``; guards do not bring it back."""
        self._held.pop(user, None)
        self._eras.pop(user, None)

    def era(self, user: str | None) -> object:
        """Something that stays the same until ``user`` is forgotten: what was exported in another era is not to be
        loaded again by what undoes learning."""
        return self._eras.setdefault(user, object())
