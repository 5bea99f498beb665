"""`GrowingLearner`: a learner that keeps a column of low rank for every domain it meets, and routes by likelihood."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ttt import columns
from ttt.change import Change
from ttt.checks import check_number, check_whole
from ttt.columns import Column, compress, merge, nearest
from ttt.learner import Learner, Seen
from ttt.nn.state import put, standing_in

_LN2 = math.log(2)
_PROBE = 4  # of so many pieces one is scored under the anchor, too


@dataclasses.dataclass(frozen=True)
class Switch:
    """What `GrowingLearner` decided after an alarm.

    Attributes:
        tokens: tokens read before it.
        kind: ``"stay"``, ``"doubt"`` (not recognised, but not often enough yet), ``"new"`` or ``"reopen"``.
        column: index of the reopened column; None otherwise.
        bits: surprise on the tokens since the change, by candidate: ``"active"`` (as scored before learning),
            ``"anchor"`` and the indices of the columns.
    """

    tokens: int
    kind: str
    column: int | None
    bits: dict[str, float]


class GrowingLearner:
    """Reads like `ttt.Learner`, with a column of low rank for every domain::

        growing = ttt.GrowingLearner(ttt.Learner(model))
        seen = growing.observe(input_ids)

    The active column is the layers' own weight W: it learns densely, through the same kernels, with the same
    protection. When another domain begins it is closed: W - W* is truncated to ``rank`` and stored, and stays as it is
    to the bit, until it is reopened or merged. So one domain's learning cannot disturb another's, and the anchor
    itself is always at hand.

    **When.** A text is read in pieces of at most ``learner.context`` tokens, as `Learner` does; between pieces, if
    the chunks' surprise raised an alarm (`Change`), the tokens since the change, within the last piece, are scored
    under the anchor and every column; so is every fourth piece that the active column does not recognise (below).
    Nothing is ever scored after it was learnt: a piece is scored under the column
    that was active before it, and the active column's score in the comparison is that one.

    **Where.** ``worth`` of a column is how many bits a token less than the anchor's its scores are on its own text,
    a running mean over every fourth piece. A column recognises a text if it is worth at least half as much there.

    * If a stored column recognises the text and is better than the active one by ``margin`` bits a token, the
      best such one is reopened: W <- W* + its delta, learning goes on, and closing replaces it. That may be the one
      that the active column was opened from: what was learnt since is dropped then.
    * Otherwise, if the active column recognises the text, or has read fewer than ``young`` tokens, it stays.
    * Otherwise, after ``patience`` such pieces in a row, a new column begins: at the anchor, or where the closed one
      ended, whichever is better on the text. So what carries over from one domain to the next is not lost.

    A column worth less than ``margin`` when it is closed is not stored (text that the anchor knows). Beyond
    ``budget`` columns, the two with the largest cosine of their deltas are merged: their mean weighted by tokens,
    truncated to ``rank``.

    What the penalty and the replay protect is the anchor, for all columns alike; the trace and the sample of recent
    inputs run on through all of them. `Learner.consolidate` would move the anchor under the columns' feet, so do not
    call it.

    Args:
        learner: whose layers learn; without a guard.
        rank: r of stored columns.
        budget: columns stored at most.
        margin: bits per token that count as a difference.
        alarm: of the CUSUM, in units of the chunks' spread.
        young: tokens that a column reads before it is judged.
        patience: pieces in a row that the active column must not recognise before a new one begins.

    Raises:
        ValueError: for a value out of range, or a learner with a guard.

    Attributes:
        columns: the stored `Column`s; replaced, never written.
        active: index of the column that the active one replaces when it is closed; None for a new one.
        history: list of `Switch`.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        rank: int = 32,
        budget: int = 8,
        margin: float = 0.05,
        alarm: float = 6.0,
        young: int = 2048,
        patience: int = 2,
    ) -> None:
        if learner.guard is not None:
            raise ValueError("learner must have no guard: its last good state would be another column's")
        self.rank, self.budget = check_whole("rank", rank, 1), check_whole("budget", budget, 1)
        self.margin, self.young = check_number("margin", margin, 0.0), check_whole("young", young, 0)
        self.patience = check_whole("patience", patience, 1)
        self.learner, self.model, self.layers = learner, learner.model, learner.layers
        self.config, self.context = learner.config, learner.context
        self.change = Change(check_number("alarm", alarm, 0.0, above=True))
        self.columns: list[Column] = []
        self.active: int | None = None
        self.worth = 0.0
        self.tokens = 0  # learnt in the active column
        self.read = 0  # altogether
        self.history: list[Switch] = []
        self._probes = self._unprobed = self._doubts = 0

    # -- reading ----------------------------------------------------------------------------------------------

    def observe(self, input_ids: Tensor, *, learn: bool = True) -> Seen:
        """As `ttt.Learner.observe`; between pieces of ``context`` tokens the active column may change.

        Without ``learn`` the tokens are scored under the active column, and nothing changes.
        """
        if not learn:
            return self.learner.observe(input_ids, learn=False)
        ids, _, _ = self.learner._checked(input_ids, None, None)
        parts = []
        for start in range(0, max(ids.shape[1] - 1, 1), self.context):
            piece = ids[:, start : start + self.context + 1]
            seen = self.learner.observe(piece)
            parts.append(seen)
            if seen.nll.numel():
                self._after(piece, seen.nll)
        nll, mask = torch.cat([p.nll for p in parts], 1), torch.cat([p.mask for p in parts], 1)
        return Seen(nll, mask, sum(p.learned for p in parts), sum(p.rejected for p in parts))

    def _after(self, piece: Tensor, nll: Tensor) -> None:
        self.tokens += nll.numel()
        self.read += nll.numel()
        chunks = nll.split(self.config.chunk, 1)
        means = torch.stack([c.mean() for c in chunks if 2 * c.shape[1] >= self.config.chunk] or [nll.mean()])
        alarm, since = False, 0
        for surprise in (means / _LN2).tolist():
            alarm = self.change.update(surprise) or alarm
            since = max(since, self.change.since) if alarm else self.change.since
        self._unprobed += 1
        if not alarm and not self._doubts and self._unprobed < _PROBE:
            return
        (anchor,) = self.bits(piece, [None])
        gain = float(anchor.mean() - nll.mean() / _LN2)
        kind = "stay"
        if alarm:
            kind = self._decide(piece, nll, anchor, max(since, 1) * self.config.chunk)
        elif self._doubts or (self.tokens >= self.young and gain < self.worth / 2):  # or a change without an alarm
            kind = self._decide(piece, nll, anchor, nll.shape[1])
        if kind == "stay":
            self._probes, self._unprobed = self._probes + 1, 0
            self.worth += max(1 / self._probes, 0.25) * (gain - self.worth)

    def bits(self, ids: Tensor, candidates: Sequence[Column | None]) -> list[Tensor]:
        """(B, T - 1) bits of ``ids`` (B, T), T <= context + 1, under each of ``candidates``; None is the anchor."""
        found = []
        for column in candidates:
            with self._as(column), torch.no_grad():
                logits = self.model(input_ids=ids[:, :-1]).logits.float()
            nll = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            found.append(nll.view(ids.shape[0], -1) / _LN2)
        return found

    def _as(self, column: Column | None) -> contextlib.AbstractContextManager[None]:
        return standing_in(self.layers, [None if column is None else column.delta(i) for i in range(len(self.layers))])

    @contextlib.contextmanager
    def routed(self, input_ids: Tensor) -> Iterator[str]:
        """Inside, the model is the likeliest for a text: the anchor, a stored column, or the active one; see `Switch`.

        Afterwards all is as it was, to the bit. Do not learn inside.

        Args:
            input_ids: (B, T) int64, at least 2 tokens; its last ``context`` + 1 are scored.

        Returns:
            The name of what was chosen, as in `Switch.bits`.
        """
        ids, _, _ = self.learner._checked(input_ids, None, None)
        if ids.shape[1] < 2:
            raise ValueError(f"input_ids must hold at least 2 tokens a row, got {tuple(ids.shape)}")
        ids = ids[:, -self.context - 1 :]
        anchor, *stored = (float(b.mean()) for b in self.bits(ids, [None, *self.columns]))
        active = self.learner.observe(ids, learn=False).bits
        bits = {"anchor": anchor, "active": active} | {str(i): b for i, b in enumerate(stored)}
        name = min(bits, key=lambda name: bits[name])
        if name == "active":
            yield name
            return
        with self._as(None if name == "anchor" else self.columns[int(name)]):
            yield name

    def bytes(self) -> int:
        """Of the stored columns; what the layers hold beside is `ttt.memory`'s."""
        return sum(column.bytes for column in self.columns)

    def save(self, path: str | os.PathLike) -> None:
        """Write the stored columns to ``path`` (safetensors); `close` first for the active one to be among them."""
        columns.save(self.columns, self.model, path)

    def load(self, path: str | os.PathLike) -> None:
        """Forget every column, the active one too, and take those of ``path``; as `ttt.columns.load` raises."""
        found = columns.load(self.model, path)
        self.reset()
        self.columns = found

    def reset(self) -> None:
        """Forget every column, and what the active one learnt."""
        self.learner.reset()
        self.columns, self.active = [], None
        self.worth, self.tokens = 0.0, 0
        self._probes = self._unprobed = self._doubts = 0
        self.change.restart()

    # -- routing ----------------------------------------------------------------------------------------------

    def _decide(self, piece: Tensor, nll: Tensor, anchored: Tensor, recent: int) -> str:
        """Go on where the last ``recent`` tokens of ``piece`` say; ``anchored``: its `bits` under the anchor.

        Returns:
            `Switch.kind`.
        """
        scores = [anchored, *self.bits(piece, self.columns)]
        anchor, *stored = (float(b[:, -recent:].mean()) for b in scores)
        active = float(nll[:, -recent:].mean()) / _LN2
        known = [
            (bits, i)
            for i, (bits, column) in enumerate(zip(stored, self.columns, strict=True))
            if anchor - bits >= column.worth / 2 and bits + self.margin <= active
        ]
        named = {"active": active, "anchor": anchor} | {str(i): bits for i, bits in enumerate(stored)}
        index: int | None = None
        if known:
            kind, index = "reopen", min(known)[1]
        elif self.tokens < self.young or anchor - active >= self.worth / 2:
            kind, self._doubts = "stay", 0
        else:
            self._doubts += 1
            kind = "doubt" if self._doubts < self.patience else "new"
        self.history.append(Switch(self.read, kind, index, named))
        if kind in ("reopen", "new"):
            self._open(index, keep=kind == "new" and active < anchor)
        else:
            self.change.clear()
        return kind

    def close(self) -> None:
        """Store the active column, if it is worth it, and begin a new one at the anchor."""
        self._open(None)

    def _open(self, index: int | None, keep: bool = False) -> None:
        """Close the active column; open the stored one ``index``, or a new one, which goes on from W with ``keep``."""
        opened = None if index is None else self.columns[index]
        if self.worth >= self.margin and self.tokens and (opened is None or index != self.active):
            self._store()
        for i, layer in enumerate(() if keep else self.layers):
            put(layer, None if opened is None else opened.delta(i))
        # Merging may have moved the column, or made it part of another.
        self.active = next((i for i, c in enumerate(self.columns) if c is opened), None)
        self.worth, self.tokens = (0.0, 0) if opened is None else (opened.worth, opened.tokens)
        self._probes, self._unprobed, self._doubts = (0 if opened is None else _PROBE), 0, 0
        self.change.restart()

    def _store(self) -> None:
        deltas = [layer.effective_weight() - layer.anchor for layer in self.layers]
        column = compress(deltas, self.rank, self.tokens, self.worth, self.config.seed)
        if self.active is not None:
            self.columns[self.active] = column
            return
        self.columns.append(column)
        if len(self.columns) > self.budget:
            i, j = nearest(self.columns)
            merged = merge(self.columns[i], self.columns[j], self.rank)
            self.columns[i] = merged
            del self.columns[j]
