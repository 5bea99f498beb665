"""`GrowingLearner`: a learner with a column of low rank for every domain that it meets, chosen by likelihood."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ttt.atomic import whole_write
from ttt.checks import check_bool, check_number, check_type, check_whole
from ttt.experts import columns, scoring
from ttt.experts.active import ActiveColumn, count_targets, empty_signature
from ttt.experts.columns import Column, compress, merge
from ttt.experts.scoring import ColumnScorer
from ttt.experts.signature import Signature, nearest
from ttt.learn.huggingface import frozen
from ttt.learn.learner import Learner
from ttt.learn.loop import ObserveOutput, read
from ttt.learn.single import SingleWeights
from ttt.learn.text import Text, check_tokens
from ttt.nn.state_access import set_weight
from ttt.signals import SignalsDeferred

_LN2 = math.log(2)

HISTORY = 1000
"""The number of decisions that `GrowingLearner.history` holds."""


@dataclasses.dataclass(frozen=True)
class Switch:
    """A decision of `GrowingLearner`, made when signatures indicated that the domain had changed.

    Attributes:
        tokens: number of tokens read before it.
        kind: ``"stay"`` (the model's own scores did not agree), ``"new"`` or ``"reopen"``.
        column: index of the reopened column; None otherwise.
        bits: per token since the change, of each candidate that was scored: ``"active"`` (as scored before learning),
            ``"anchor"`` and the indices of columns.
    """

    tokens: int
    kind: str
    column: int | None
    bits: dict[str, float]


class GrowingLearner:
    """Reads as `ttt.Learner` does, and learns every domain in a column of low rank of its own:

        growing = ttt.GrowingLearner(ttt.Learner(model))
        output = growing.observe(input_ids)

    The active column is the layers' own weight W: it learns densely, with the same kernels and the same protection.
    When another domain begins it is closed: W - W* is truncated to ``rank`` and stored. A stored column does not change
    until it is reopened or merged. So learning in one domain cannot disturb another, and the anchor stays available.

    **When a domain begins.** The loss is a poor sign of another domain: it changes as much within one. So every column
    has a `Signature`, counts of pairs of tokens, which tells kinds of text apart at almost no cost. After every chunk
    was scored and learnt, log-likelihood ratios are added up (`Evidence`): of each stored column's signature against
    the active one's, and of that of the latest ``recent`` tokens against it. Columns change between two chunks of a
    text, whose context is kept; nothing is ever scored after it was learnt.

    **Which column is next.**

    * If a stored column's signature is better by ``evidence`` bits, the tokens since the change are scored under it. If
      that is better than the anchor, and better by ``margin`` bits per token than the active column was, it is
      reopened: W <- W* + its delta, and learning goes on; closing replaces it. It may be the column that the active one
      was opened from: then what was learnt since is dropped.
    * If the signature of the latest tokens is better by twice ``evidence``, no stored column fits. A new one begins at
      the anchor or at the present W, whichever is better on the tokens since the change. So what carries over from one
      domain to the next is kept.

    A column is stored as it was before the first evidence of the change. A reopened one that is left for a new one
    within 2 ``recent`` tokens was opened by mistake, and stays as it was. A column that gains less than ``margin`` bits
    per token over the anchor is not stored: the anchor knows its text. (The gain is its ``worth``, a running mean over
    the first tokens of every fourth piece of ``context`` tokens.) Beyond ``budget`` columns, the two with the nearest
    signatures are merged: their mean weighted by tokens, truncated to ``rank``.

    The penalty and the replay protect the anchor, for all columns alike; the trace and the sample of recent inputs go
    on through all of them. As the anchor stays available, columns need less protection than one set of weights does.
    `Learner.consolidate` would move the anchor that the stored columns are relative to: it is refused for as long as
    the `GrowingLearner` lives.

    Args:
        learner: whose layers learn; without a guard or a log of episodes, of a model with one set of weights.
        rank: r of stored columns.
        budget: largest number of stored columns.
        margin: bits per token that count as a difference.
        evidence: bits by which another signature must be better.
        recent: number of latest tokens whose signature indicates a new domain; a column reads as many before it may be
            left for a new one.

    Raises:
        ValueError: for a value out of range, or a learner that has a guard or a log of episodes, that serves another
            `GrowingLearner` which has not been deleted, or whose model has weights for each user or experts of a
            mixture that learn.

    Attributes:
        columns: the stored `Column`s; replaced, never written.
        read: number of tokens read.
        history: list of `Switch`, the latest 1000.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        rank: int = 64,
        budget: int = 8,
        margin: float = 0.05,
        evidence: float = 96.0,
        recent: int = 1024,
    ) -> None:
        check_type("learner", learner, Learner, "a ttt.Learner")
        learner.require_single(
            "GrowingLearner", "Learner.observe(input_ids, users=[...]), whose weights have a low rank, too"
        )
        if learner.episodes is not None:
            raise ValueError("learner must have no log of episodes: a study would change whatever column is active")
        if learner.guard is not None:
            raise ValueError("learner must have no guard: its last good state would be another column's")
        learner.access.refuse_several("ttt.GrowingLearner")
        if routed := [layer.name for layer in learner.layers if layer.routed]:
            raise ValueError(f"learner must have no experts of a mixture among its layers, got {routed[0]} and others")
        self.rank, self.budget = check_whole("rank", rank, 1), check_whole("budget", budget, 1)
        self.margin, self.recent = check_number("margin", margin, 0.0), check_whole("recent", recent, 1)
        self.evidence = check_number("evidence", evidence, 0.0, above=True)
        self.learner, self.model, self.layers = learner, learner.model, learner.layers
        self.config, self.context = learner.config, learner.context
        self.scorer = ColumnScorer(self.model, self.layers)
        self.columns: list[Column] = []
        self.read = 0
        self.history: list[Switch] = []
        self._begin(None, self._empty_signature(), 0)
        learner.read_through(self)

    @property
    def active(self) -> int | None:
        """Index of the stored column that the active one replaces when it is closed; None for a new one."""
        return self._active.index

    @property
    def worth(self) -> float:
        """Bits per token that the active column gains over the anchor on its own text; a running mean."""
        return self._active.worth

    @property
    def tokens(self) -> int:
        """Number of tokens learnt in the active column."""
        return self._active.tokens

    def _empty_signature(self) -> Signature:
        return empty_signature(self.model, self.layers[0].weight.device)

    def _begin(self, opened: Column | None, signature: Signature, tokens: int, recent: Sequence[Tensor] = ()) -> None:
        """Let a column be active from now on: the stored one ``opened``, or a new one that has read ``recent``."""
        empty = self._empty_signature()
        self._active = ActiveColumn(opened, self.columns, signature, tokens, recent, empty, self.recent)
        self._active.keep_weights(self.layers)

    # -- read -----------------------------------------------------------------------------------------------------

    def observe(self, input_ids: Tensor, *, learn: bool = True) -> ObserveOutput:
        """As `ttt.Learner.observe`; between chunks the active column may change.

        Without ``learn`` the tokens are scored under the active column, and nothing changes. `score` scores them under
        the column that fits them.
        """
        if not check_bool("learn", learn):
            return self.learner.observe(input_ids, learn=False)
        with self.learner.access.enter("GrowingLearner.observe"), frozen(self.model):
            ids = check_tokens(self.model, input_ids).ids
            starts = range(0, max(ids.shape[1] - 1, 1), self.context)
            parts = [self._read_piece(Text.of(ids[:, start : start + self.context + 1])) for start in starts]
        nll, mask = torch.cat([p.nll for p in parts], 1), torch.cat([p.mask for p in parts], 1)
        return ObserveOutput(nll, mask, sum(p.learned for p in parts), sum(p.rejected for p in parts))

    def _read_piece(self, text: Text) -> ObserveOutput:
        """Read at most ``context`` + 1 tokens."""
        ids, done, probes = text.ids, 0, self._active.begin_piece()

        def after(nll: Tensor, end: int) -> None:
            nonlocal done, probes
            begin, done = done, end
            if probes and (end >= scoring.PREFIX or end == ids.shape[1] - 1):
                probes = False
                (anchor,) = self.bits(ids[:, : end + 1], [None])
                self._active.probe(float(anchor.mean() - nll[:, :end].mean() / _LN2))
            self._after(ids[:, : end + 1], nll[:, :end], begin)

        strategy = SingleWeights(self.learner, text, True)
        return strategy.output(read(text, strategy, self.config.chunk, self.context, after))

    def _after(self, ids: Tensor, nll: Tensor, begin: int) -> None:
        """Change the column if the tokens from ``begin`` on of the piece ``ids`` call for it.

        They were learnt; ``nll`` are the scores of the piece so far.
        """
        count = nll[:, begin:].numel()
        self.read += count
        with SignalsDeferred():
            known = self._active.add(ids[:, begin:], count)
        if known and not self._decide(ids, nll) and self._active.is_calm:
            self._active.keep_weights(self.layers)

    def bits(self, ids: Tensor, candidates: Sequence[Column | None]) -> list[Tensor]:
        """(B, T - 1) bits of ``ids`` (B, T), T <= context + 1, under each of ``candidates``; None is the anchor."""
        with self.learner.access.enter("GrowingLearner.bits"):
            return self.scorer.bits(ids, candidates)

    @torch.no_grad()
    def score(self, input_ids: Tensor) -> Tensor:
        """(B, T - 1) float32, nats of a text that is not learnt, by all columns together; nothing changes.

        Of every piece of ``context`` tokens the first 128 are scored by the mixture of the anchor, the stored columns
        and the active one. All have the same probability before the piece, and each is weighted by the probability
        that it gave the tokens so far:

            p(x_t) = sum_k w_k p_k(x_t)        w_k = prod_{s<t} p_k(x_s) / sum_j prod_{s<t} p_j(x_s)

        The other tokens are scored by the most probable one on those. That takes a forward pass of 128 tokens for each
        column, and one of all tokens.

        Args:
            input_ids: (B, T) int64.
        """
        with self.learner.access.enter("GrowingLearner.score"):
            ids = check_tokens(self.model, input_ids).ids
            pieces = [ids[:, i : i + self.context + 1] for i in range(0, ids.shape[1] - 1, self.context)]
            parts = [self.scorer.mixture_nll(piece, self.columns) for piece in pieces]
            return torch.cat(parts, 1) if parts else torch.zeros((ids.shape[0], 0), device=ids.device)

    @contextlib.contextmanager
    def routed(self, input_ids: Tensor) -> Iterator[str]:
        """Inside, the model has the column that fits a text best: the anchor, a stored one or the active one.

        Afterwards the layers are exactly as before. Do not learn inside.

        Args:
            input_ids: (B, T) int64, at least 2 tokens; its last ``context`` + 1 are scored.

        Yields:
            The name of the column, as in `Switch.bits`.
        """
        with self.learner.access.enter("GrowingLearner.routed"):
            ids = check_tokens(self.model, input_ids).ids
            if ids.shape[1] < 2:
                raise ValueError(f"input_ids must hold at least 2 tokens a row, got {tuple(ids.shape)}")
            ids = ids[:, -self.context - 1 :]
            anchor, *stored = (float(b.mean()) for b in self.scorer.bits(ids, [None, *self.columns]))
            active = self.learner.observe(ids, learn=False).bits
            bits = {"anchor": anchor, "active": active} | {str(i): b for i, b in enumerate(stored)}
            name = min(bits, key=lambda name: bits[name])
            if name == "active":
                yield name
                return
            with self.scorer.under(None if name == "anchor" else self.columns[int(name)]):
                yield name

    # -- columns --------------------------------------------------------------------------------------------------

    def bytes(self) -> int:
        """Memory of the stored columns, and of what is kept of the active one; `ttt.memory` has that of the layers."""
        return sum(column.bytes for column in self.columns) + self._active.bytes()

    def save(self, path: str | os.PathLike) -> None:
        """Write the stored columns to ``path`` (safetensors); `close` first for the active one to be among them."""
        with self.learner.access.enter("GrowingLearner.save"):
            columns.save(self.columns, self.model, path)

    def load(self, path: str | os.PathLike) -> None:
        """Forget every column, the active one too, and take those of ``path``; as `ttt.experts.columns.load` raises."""
        self._restart(columns.load(self.model, path))

    def reset(self) -> None:
        """Forget every column, and what the active one learnt."""
        self._restart([])

    def _restart(self, stored: list[Column]) -> None:
        with self.learner.access.enter("GrowingLearner.reset", repairs=True):
            self.learner.reset()
            self.columns = stored
            self._begin(None, self._empty_signature(), 0)

    def close(self) -> None:
        """Store the active column, if it is worth it, and begin a new one at the anchor."""
        with self.learner.access.enter("GrowingLearner.close"):
            self._active.keep_weights(self.layers)
            self._open(None, 0)

    def _decide(self, ids: Tensor, nll: Tensor) -> bool:
        """Change the column if the evidence and the scores ``nll`` of the piece ``ids`` call for it: whether it did."""
        active = self._active
        asked = [i for i, returned in enumerate(active.returned) if returned.sum > self.evidence]
        if asked:
            since = max(active.returned[i].since for i in asked)
            named, scores = self._compare(ids, nll, asked, since)
            best = min(asked, key=lambda i: scores[i])
            back = scores[best] < named["anchor"] and scores[best] + self.margin <= named["active"]
            self._note(Switch(self.read, "reopen" if back else "stay", best if back else None, named))
            if back:
                self._open(best, since)
                return True
            for i in asked:
                active.returned[i].clear()
        if active.novel.sum > 2 * self.evidence:
            since = active.novel.since
            named, _ = self._compare(ids, nll, [], since)
            self._note(Switch(self.read, "new", None, named))
            self._open(None, since, keep=named["active"] < named["anchor"])
            return True
        return False

    def _note(self, switch: Switch) -> None:
        self.history.append(switch)
        del self.history[:-HISTORY]

    def _compare(
        self, ids: Tensor, nll: Tensor, asked: list[int], since: int
    ) -> tuple[dict[str, float], dict[int, float]]:
        """Bits per token of the last ``since`` of the piece ``ids``: `Switch.bits`, and by column of ``asked``."""
        recent = min(nll.shape[1], max(1, since // nll.shape[0]))
        candidates = [None, *(self.columns[i] for i in asked)]
        anchor, *stored = (float(b[:, -recent:].mean()) for b in self.bits(ids, candidates))
        scores = dict(zip(asked, stored, strict=True))
        named = {"active": float(nll[:, -recent:].mean()) / _LN2, "anchor": anchor}
        return named | {str(i): bits for i, bits in scores.items()}, scores

    def _open(self, index: int | None, since: int, keep: bool = False) -> None:
        """Close the active column as it was ``since`` tokens ago; open the stored one ``index``, or a new one.

        A new one begins at the anchor, or with ``keep`` at the present W.
        """
        active, opened = self._active, None if index is None else self.columns[index]
        recent = active.chunks_since(since)
        mistaken = index is None and since and active.index is not None and active.opened_for < 2 * self.recent
        stores = self.worth >= self.margin and active.calm_tokens and not mistaken
        stored = self._with_active(recent) if stores and (opened is None or index != active.index) else self.columns
        # Merging may have made the opened column part of another: it is opened as it was all the same.
        signature = self._empty_signature() if opened is None else opened.signature.copy()
        for chunk in recent:
            signature.add(chunk)
        tokens = count_targets(recent) if keep else 0 if opened is None else opened.tokens
        with whole_write(self.layers, "changing the column of a GrowingLearner"):
            for i, layer in enumerate(() if keep else self.layers):
                set_weight(layer, None if opened is None else opened.delta(i))
            self.columns = stored
            self._begin(opened, signature, tokens, recent)

    def _with_active(self, recent: Sequence[Tensor]) -> list[Column]:
        """The stored columns and the active one, without what it read in the chunks ``recent``; `budget` at most."""
        active = self._active
        signature = active.signature.copy()
        for chunk in recent:
            signature.add(chunk, -1)
        deltas = [weight - layer.anchor for weight, layer in zip(active.calm_weights, self.layers, strict=True)]
        column = compress(deltas, self.rank, active.calm_tokens, self.worth, signature, self.config.seed)
        stored = list(self.columns)
        if active.index is not None:
            stored[active.index] = column
            return stored
        stored.append(column)
        if len(stored) > self.budget:
            i, j = nearest([c.signature for c in stored])
            stored[i] = merge(stored[i], stored[j], self.rank)
            del stored[j]
        return stored
