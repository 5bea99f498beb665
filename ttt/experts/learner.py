"""`GrowingLearner`: a learner that keeps a column of low rank for every domain it meets, and routes by likelihood."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ttt.checks import check_number, check_whole
from ttt.experts import columns
from ttt.experts.change_detection import Evidence
from ttt.experts.columns import Column, compress, merge
from ttt.experts.signature import Signature, nearest
from ttt.learn.huggingface import frozen
from ttt.learn.learner import Learner, Seen
from ttt.nn.state_access import put, standing_in

_LN2 = math.log(2)
_PROBE = 4  # of so many pieces one is scored under the anchor, too
_PREFIX = 128  # tokens of a piece that are scored for it, and by which text that is not learnt is routed
_SLACK = 0.125  # bits a token by which another signature must be better to count at all


@dataclasses.dataclass(frozen=True)
class Switch:
    """What `GrowingLearner` decided when signatures said that the domain had changed.

    Attributes:
        tokens: tokens read before it.
        kind: ``"stay"`` (the model's own scores did not agree), ``"new"`` or ``"reopen"``.
        column: index of the reopened column; None otherwise.
        bits: per token since the change, by candidate: ``"active"`` (as scored before learning), ``"anchor"`` and the
            indices of the columns; of those that were asked.
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

    **When.** Surprise is a poor sign of another domain: it changes as much within one. So every column has a
    `Signature`, counts of pairs of tokens, which tells kinds of text apart at no cost. After every chunk, scored and
    learnt, log-likelihood ratios are added up (`Evidence`): of each stored column's signature against the active one's,
    and of that of the latest ``recent`` tokens against it. The columns change between two chunks
    of a text, whose context is kept; nothing is ever scored after it was learnt.

    **Where.**

    * If a stored column's signature is better by ``evidence`` bits, the tokens since are scored under it; if it is
      better there than the anchor, and than the active one was by ``margin`` bits a token, it is reopened: W <- W* +
      its delta, learning goes on, and closing replaces it. That may be the one that the active column was opened
      from: what was learnt since is dropped then.
    * If the latest tokens' signature is better by twice ``evidence``, no stored column fits: a new one begins, at the
      anchor, or where W is, whichever is better on the tokens since. So what carries over from one domain to the next
      is not lost.

    What is stored of a column is what it was before the first sign of change; a reopened one that is left for a new
    one within 2 ``recent`` tokens was opened by mistake and stays as it was. A column that gains less than ``margin``
    bits a token over the anchor (its ``worth``, a running mean over the first tokens of every fourth piece of
    ``context`` tokens) is not stored: text that the anchor knows. Beyond ``budget`` columns, the two whose signatures
    are nearest are merged: their mean weighted by tokens, truncated to ``rank``.

    What the penalty and the replay protect is the anchor, for all columns alike; the trace and the sample of recent
    inputs run on through all of them. As the anchor is always at hand, columns need less protection than one set of
    weights does. `Learner.consolidate` would move the anchor under the columns' feet, so do not call it.

    Args:
        learner: whose layers learn; without a guard.
        rank: r of stored columns.
        budget: columns stored at most.
        margin: bits per token that count as a difference.
        evidence: bits by which another signature must be better.
        recent: tokens whose signature tells a new domain, and which a column reads before it may be left for a new one.

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
        rank: int = 64,
        budget: int = 8,
        margin: float = 0.05,
        evidence: float = 96.0,
        recent: int = 1024,
    ) -> None:
        if learner.guard is not None:
            raise ValueError("learner must have no guard: its last good state would be another column's")
        self.rank, self.budget = check_whole("rank", rank, 1), check_whole("budget", budget, 1)
        self.margin, self.recent = check_number("margin", margin, 0.0), check_whole("recent", recent, 1)
        self.evidence = check_number("evidence", evidence, 0.0, above=True)
        self.learner, self.model, self.layers = learner, learner.model, learner.layers
        self.config, self.context = learner.config, learner.context
        self.columns: list[Column] = []
        self.active: int | None = None
        self.read = 0  # altogether
        self.history: list[Switch] = []
        self._began(None, self._empty(), 0)

    def _empty(self) -> Signature:
        return Signature(self.model.get_input_embeddings().num_embeddings, self.layers[0].weight.device)

    def _began(self, opened: Column | None, signature: Signature, tokens: int, recent: Sequence[Tensor] = ()) -> None:
        """A column is active from now on: the stored one ``opened``, or a new one that has read ``recent``."""
        self.active = next((i for i, c in enumerate(self.columns) if c is opened), None)
        self.worth = 0.0 if opened is None else opened.worth
        self.tokens = tokens  # learnt in the active column
        self._opened = 0  # of them since it was opened
        self._probes, self._unprobed = (0 if opened is None else _PROBE), 0
        self._signature, self._latest, self._recent = signature, self._empty(), deque(recent)
        for chunk in recent:
            self._latest.add(chunk)
        self._returned = [Evidence(_SLACK) for _ in self.columns]
        self._novel = Evidence(_SLACK)
        self._note()

    def _note(self) -> None:
        """Remember the active column as it is: there is no sign of change."""
        self._calm = [y.weight.clone() if not y.pending else y.effective_weight() for y in self.layers]
        self._calm_tokens = self.tokens

    # -- reading ----------------------------------------------------------------------------------------------

    def observe(self, input_ids: Tensor, *, learn: bool = True) -> Seen:
        """As `ttt.Learner.observe`; between chunks the active column may change.

        Without ``learn`` the tokens are scored under the active column, and nothing changes; `score` routes them.
        """
        if not learn:
            return self.learner.observe(input_ids, learn=False)
        ids, attend, teach = self.learner._checked(input_ids, None, None)
        parts = []
        with frozen(self.model):
            for start in range(0, max(ids.shape[1] - 1, 1), self.context):
                piece = slice(start, start + self.context + 1)
                parts.append(self._read(ids[:, piece], attend[:, piece], teach[:, piece]))
        nll, mask = torch.cat([p.nll for p in parts], 1), torch.cat([p.mask for p in parts], 1)
        return Seen(nll, mask, sum(p.learned for p in parts), sum(p.rejected for p in parts))

    def _read(self, ids: Tensor, attend: Tensor, teach: Tensor) -> Seen:
        """Read one piece, (B, T <= context + 1)."""
        done, probed = 0, self._unprobed + 1 < _PROBE
        self._unprobed += 1

        def after(nll: Tensor, end: int) -> None:
            nonlocal done, probed
            begin, done = done, end
            if not probed and (end >= _PREFIX or end == ids.shape[1] - 1):
                probed = True
                self._probe(ids[:, : end + 1], nll[:, :end])
            self._after(ids[:, : end + 1], nll[:, :end], begin)

        return self.learner._read(ids, attend, teach, True, pads=False, plain=True, after=after)[0]

    def _probe(self, ids: Tensor, nll: Tensor) -> None:
        """Renew ``worth`` by ``ids``, whose scores before learning are ``nll``."""
        (anchor,) = self.bits(ids, [None])
        gain = float(anchor.mean() - nll.mean() / _LN2)
        if math.isfinite(gain):
            self._probes, self._unprobed = self._probes + 1, 0
            self.worth += max(1 / self._probes, 0.25) * (gain - self.worth)

    def _after(self, ids: Tensor, nll: Tensor, begin: int) -> None:
        """Go on where the tokens from ``begin`` on of the piece ``ids`` say, which were learnt; ``nll``: its scores."""
        chunk = ids[:, begin:]
        count = nll[:, begin:].numel()
        self.read += count
        known = bool(self._recent)
        if known:
            own = self._signature.bits(chunk)
            for column, returned in zip(self.columns, self._returned, strict=True):
                returned.add(own - column.signature.bits(chunk), count)
            if self._held(self._recent) >= self.recent:
                self._novel.add(own - self._latest.bits(chunk), count)
        self._learnt(chunk, count)
        if known and not self._decide(ids, nll) and not any(e.sum for e in (self._novel, *self._returned)):
            self._note()

    def _learnt(self, chunk: Tensor, count: int) -> None:
        self.tokens += count
        self._opened += count
        self._signature.add(chunk)
        self._latest.add(chunk)
        self._recent.append(chunk)
        while self._held(self._recent) - self._held([self._recent[0]]) >= self.recent:
            self._latest.add(self._recent.popleft(), -1)

    @staticmethod
    def _held(chunks: Sequence[Tensor] | deque[Tensor]) -> int:
        return sum(chunk[:, 1:].numel() for chunk in chunks)

    def bits(self, ids: Tensor, candidates: Sequence[Column | None]) -> list[Tensor]:
        """(B, T - 1) bits of ``ids`` (B, T), T <= context + 1, under each of ``candidates``; None is the anchor."""
        found = []
        for column in candidates:
            with self._as(column):
                found.append(self._nll(ids) / _LN2)
        return found

    @torch.no_grad()
    def _nll(self, ids: Tensor) -> Tensor:
        """(B, T - 1) nats of ``ids`` (B, T) under the model as it is."""
        logits = self.model(input_ids=ids[:, :-1]).logits.float()
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return nll.view(ids.shape[0], -1)

    def _as(self, column: Column | None) -> contextlib.AbstractContextManager[None]:
        return standing_in(self.layers, [None if column is None else column.delta(i) for i in range(len(self.layers))])

    @torch.no_grad()
    def score(self, input_ids: Tensor) -> Tensor:
        """(B, T - 1) float32, nats of a text that is not learnt, by all that is known; nothing changes.

        Of every piece of ``context`` tokens the first 128 are scored by the mixture of the anchor, the stored columns
        and the active one, alike likely before the piece, each weighted by how likely it made the tokens before::

            p(x_t) = sum_k w_k p_k(x_t)        w_k = prod_{s<t} p_k(x_s) / sum_j prod_{s<t} p_j(x_s)

        and the others by the likeliest on those. That takes a forward pass of 128 tokens for each, and one of all.

        Args:
            input_ids: (B, T) int64.
        """
        ids, _, _ = self.learner._checked(input_ids, None, None)
        parts = [self._scored(ids[:, i : i + self.context + 1]) for i in range(0, ids.shape[1] - 1, self.context)]
        return torch.cat(parts, 1) if parts else torch.zeros((ids.shape[0], 0), device=ids.device)

    def _scored(self, ids: Tensor) -> Tensor:
        ways: list[Callable[[], contextlib.AbstractContextManager[None]]] = [contextlib.nullcontext]
        ways += [functools.partial(self._as, column) for column in (None, *self.columns)]
        known = min(_PREFIX, ids.shape[1] - 1)
        totals = []
        for way in ways:
            with way():
                totals.append(self._nll(ids[:, : known + 1]).double().cumsum(1))
        total = torch.stack(totals)
        mixed = math.log(len(ways)) - torch.logsumexp(-total, 0)
        nll = torch.zeros((ids.shape[0], ids.shape[1] - 1), device=ids.device)
        nll[:, :known] = mixed.diff(dim=1, prepend=torch.zeros_like(mixed[:, :1]))
        if known < nll.shape[1]:
            best = total[..., -1].argmin(0)
            for number in best.unique().tolist():
                with ways[number]():
                    nll[best == number, known:] = self._nll(ids[best == number])[:, known:]
        return nll

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
        """Of the stored columns, and of what routing keeps of the active one; the rest that the layers hold is
        `ttt.memory`'s."""
        kept = sum(w.numel() * w.element_size() for w in self._calm) + self._signature.bytes + self._latest.bytes
        return sum(column.bytes for column in self.columns) + kept

    def save(self, path: str | os.PathLike) -> None:
        """Write the stored columns to ``path`` (safetensors); `close` first for the active one to be among them."""
        columns.save(self.columns, self.model, path)

    def load(self, path: str | os.PathLike) -> None:
        """Forget every column, the active one too, and take those of ``path``; as `ttt.experts.columns.load` raises."""
        self._restart(columns.load(self.model, path))

    def reset(self) -> None:
        """Forget every column, and what the active one learnt."""
        self._restart([])

    def _restart(self, stored: list[Column]) -> None:
        self.learner.reset()
        self.columns = stored
        self._began(None, self._empty(), 0)

    # -- routing ----------------------------------------------------------------------------------------------

    def _decide(self, ids: Tensor, nll: Tensor) -> bool:
        """Go on where the evidence says, if the model's own scores of the piece agree; whether that is elsewhere."""
        asked = [i for i, returned in enumerate(self._returned) if returned.sum > self.evidence]
        if asked:
            since = max(self._returned[i].since for i in asked)
            named, scores = self._asked(ids, nll, asked, since)
            best = min(asked, key=lambda i: scores[i])
            back = scores[best] < named["anchor"] and scores[best] + self.margin <= named["active"]
            self.history.append(Switch(self.read, "reopen" if back else "stay", best if back else None, named))
            if back:
                self._open(best, since)
                return True
            for i in asked:
                self._returned[i].clear()
        if self._novel.sum > 2 * self.evidence:
            since = self._novel.since
            named, _ = self._asked(ids, nll, [], since)
            self.history.append(Switch(self.read, "new", None, named))
            self._open(None, since, keep=named["active"] < named["anchor"])
            return True
        return False

    def _asked(
        self, ids: Tensor, nll: Tensor, asked: list[int], since: int
    ) -> tuple[dict[str, float], dict[int, float]]:
        """Bits per token of the last ``since`` of the piece ``ids``: `Switch.bits`, and by column of ``asked``."""
        recent = min(nll.shape[1], max(1, since // nll.shape[0]))
        anchor, *stored = (
            float(b[:, -recent:].mean()) for b in self.bits(ids, [None, *(self.columns[i] for i in asked)])
        )
        scores = dict(zip(asked, stored, strict=True))
        named = {"active": float(nll[:, -recent:].mean()) / _LN2, "anchor": anchor}
        return named | {str(i): bits for i, bits in scores.items()}, scores

    def close(self) -> None:
        """Store the active column, if it is worth it, and begin a new one at the anchor."""
        self._note()
        self._open(None, 0)

    def _open(self, index: int | None, since: int, keep: bool = False) -> None:
        """Close the active column as it was ``since`` tokens ago; open the stored one ``index``, or a new one.

        That goes on from W with ``keep``.
        """
        opened = None if index is None else self.columns[index]
        recent: deque[Tensor] = deque()
        while self._recent and self._held(recent) < since:
            recent.appendleft(self._recent.pop())
            self._signature.add(recent[0], -1)
        mistaken = index is None and since and self.active is not None and self._opened < 2 * self.recent
        if (
            self.worth >= self.margin
            and self._calm_tokens
            and not mistaken
            and (opened is None or index != self.active)
        ):
            self._store()
        for i, layer in enumerate(() if keep else self.layers):
            put(layer, None if opened is None else opened.delta(i))
        # Merging may have made the column part of another.
        signature = self._empty() if opened is None else opened.signature.copy()
        for chunk in recent:
            signature.add(chunk)
        tokens = self._held(recent) if keep else 0 if opened is None else opened.tokens
        self._began(opened, signature, tokens, recent)

    def _store(self) -> None:
        deltas = [weight - layer.anchor for weight, layer in zip(self._calm, self.layers, strict=True)]
        column = compress(deltas, self.rank, self._calm_tokens, self.worth, self._signature.copy(), self.config.seed)
        if self.active is not None:
            self.columns[self.active] = column
            return
        self.columns.append(column)
        if len(self.columns) > self.budget:
            i, j = nearest([c.signature for c in self.columns])
            merged = merge(self.columns[i], self.columns[j], self.rank)
            self.columns[i] = merged
            del self.columns[j]
