"""Scoring text under several columns: one after the other, as a mixture, or under the most probable one."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttt.experts.columns import Column
from ttt.learn.stand_in import stand_in
from ttt.nn import Linear

PREFIX = 128  # tokens of a piece by which text that is not learnt is assigned to a column

_LN2 = math.log(2)


class ColumnScorer:
    """Scores text while ``layers`` of ``model`` hold other columns than the active one, which is put back exactly."""

    def __init__(self, model: Any, layers: Sequence[Linear]) -> None:
        self.model, self.layers = model, layers

    def under(self, column: Column | None) -> contextlib.AbstractContextManager[None]:
        """Inside, the layers hold ``column`` instead of the active one; None is the anchor."""
        deltas = [None if column is None else column.delta(i) for i in range(len(self.layers))]
        return stand_in(self.layers, deltas)

    @torch.no_grad()
    def nll(self, ids: Tensor) -> Tensor:
        """(B, T - 1) nats of ``ids`` (B, T) under the layers as they are."""
        logits = self.model(input_ids=ids[:, :-1]).logits.float()
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return nll.view(ids.shape[0], -1)

    def bits(self, ids: Tensor, candidates: Sequence[Column | None]) -> list[Tensor]:
        """(B, T - 1) bits of ``ids`` (B, T) under each of ``candidates``; None is the anchor."""
        found = []
        for column in candidates:
            with self.under(column):
                found.append(self.nll(ids) / _LN2)
        return found

    @torch.no_grad()
    def mixture_nll(self, ids: Tensor, columns: Sequence[Column]) -> Tensor:
        """(B, T - 1) nats of a piece ``ids`` (B, T) by the active column, the anchor and ``columns``.

        The first `PREFIX` tokens are scored by the mixture of all, the others by the one most probable on those; see
        `ttt.GrowingLearner.score`.
        """
        ways: list[Callable[[], contextlib.AbstractContextManager[None]]] = [contextlib.nullcontext]
        ways += [functools.partial(self.under, column) for column in (None, *columns)]
        mixed_tokens = min(PREFIX, ids.shape[1] - 1)
        totals = []
        for way in ways:
            with way():
                totals.append(self.nll(ids[:, : mixed_tokens + 1]).double().cumsum(1))
        total = torch.stack(totals)
        mixed = math.log(len(ways)) - torch.logsumexp(-total, 0)
        nll = torch.zeros((ids.shape[0], ids.shape[1] - 1), device=ids.device)
        nll[:, :mixed_tokens] = mixed.diff(dim=1, prepend=torch.zeros_like(mixed[:, :1]))
        if mixed_tokens < nll.shape[1]:
            best = total[..., -1].argmin(0)
            for number in best.unique().tolist():
                with ways[number]():
                    nll[best == number, mixed_tokens:] = self.nll(ids[best == number])[:, mixed_tokens:]
        return nll
