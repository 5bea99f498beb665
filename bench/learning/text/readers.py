"""Ways to read a stream. Each scores every byte before it learns from it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import ttt
from bench.learning.text.knn import Datastore
from ttt.demo.model import LN2, bits_per_byte, score, score_in_context
from ttt.learn.huggingface import cache_of, cached


class Reader:
    """Reads with a frozen model, piece by piece, each with an empty context.

    Args:
        model: a causal language model whose tokens are bytes. Readers that learn change it.
    """

    offline = False
    """Whether all learning took place before the stream; then the time of reading does not include it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def read(self, ids: Tensor, start: int, end: int) -> Tensor:
        """Score bytes ``start + 1`` ... ``end`` of ``ids`` (1, T), given byte ``start``; then learn from them.

        The pieces of a segment are read in order, at most `CONTEXT` bytes at a time.

        Returns:
            (1, end - start) losses in nats.
        """
        return score(self.model, ids[:, start : end + 1])

    def bits(self, rows: Tensor) -> float:
        """Mean bits per byte of ``rows`` (N, T), without learning from them."""
        return bits_per_byte(self.model, rows)

    def state_bytes(self) -> int:
        """Bytes kept in addition to the weights of the base model."""
        return 0


class InContext(Reader):
    """Reads with a frozen model and a long context (`score_in_context`)."""

    def read(self, ids: Tensor, start: int, end: int) -> Tensor:
        return score_in_context(self.model, ids, start, end)


class Learning(Reader):
    """Reads with a `ttt.Learner`, with or without rules."""

    def __init__(self, learner: ttt.Learner) -> None:
        super().__init__(learner.model)
        self.learner = learner

    def read(self, ids: Tensor, start: int, end: int) -> Tensor:
        return self.learner.observe(ids[:, start : end + 1]).nll

    def state_bytes(self) -> int:
        held = ttt.memory_usage(self.model).bytes
        rules = [t for rule in getattr(self.learner, "rules", ()) for t in rule.tensors()]
        return sum(held.values()) - held["weight"] + sum(t.numel() * t.element_size() for t in rules)


class Growing(Learning):
    """Reads with a `ttt.GrowingLearner`; text that is not learnt from is scored by `ttt.GrowingLearner.score`."""

    def __init__(self, growing: ttt.GrowingLearner) -> None:
        super().__init__(growing.learner)
        self.growing = growing

    def read(self, ids: Tensor, start: int, end: int) -> Tensor:
        return self.growing.observe(ids[:, start : end + 1]).nll

    def bits(self, rows: Tensor) -> float:
        total = sum(float(self.growing.score(part).sum(dtype=torch.float64)) for part in rows.split(8))
        return total / LN2 / rows[:, 1:].numel()

    def state_bytes(self) -> int:
        return super().state_bytes() + self.growing.bytes()


class Joint(Learning):
    """Learns ``rows`` (N, T) in their order when it is made, then reads the stream without learning from it."""

    offline = True

    def __init__(self, learner: ttt.Learner, rows: Tensor) -> None:
        super().__init__(learner)
        for row in rows.split(1):
            learner.observe(row)

    def read(self, ids: Tensor, start: int, end: int) -> Tensor:
        return self.learner.observe(ids[:, start : end + 1], learn=False).nll


class NearestNeighbours(Reader):
    """The kNN language model: ``weight`` p_kNN + (1 - ``weight``) p, where p is of a frozen model.

    Keys of the `Datastore` are the inputs of the output head, values are the bytes that followed. Those of the stream
    are added chunk by chunk, after the chunk was scored.
    """

    def __init__(self, model: Any, weight: float, temperature: float, neighbours: int, chunk: int = 64) -> None:
        super().__init__(model)
        self.weight, self.temperature, self.chunk = weight, temperature, chunk
        self.store = Datastore(model.get_output_embeddings().in_features, neighbours)

    @torch.no_grad()
    def read(self, ids: Tensor, start: int, end: int) -> Tensor:
        cache, out = None, []
        for at in range(start, end, self.chunk):
            stop = min(at + self.chunk, end)
            step = self.model.base_model(input_ids=ids[:, at:stop], **cached(self.model.base_model, cache))
            cache = cache_of(step)
            hidden, targets = step.last_hidden_state[0].float(), ids[0, at + 1 : stop + 1]
            out.append(self._nll(hidden, targets))
            self.store.add(hidden, targets)
        return torch.cat(out).view(1, -1)

    @torch.no_grad()
    def bits(self, rows: Tensor) -> float:
        total = 0.0
        for part in rows.split(8):
            hidden = self.model.base_model(input_ids=part[:, :-1]).last_hidden_state.flatten(0, 1).float()
            total += float(self._nll(hidden, part[:, 1:].flatten()).sum(dtype=torch.float64))
        return total / LN2 / rows[:, 1:].numel()

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        nll = nn.functional.cross_entropy(head(hidden.to(head.weight.dtype)).float(), targets, reduction="none")
        if not len(self.store):
            return nll
        near = self.store.probability(hidden, targets, self.temperature)
        return -torch.log((1 - self.weight) * torch.exp(-nll) + self.weight * near)

    def state_bytes(self) -> int:
        return self.store.nbytes()


class FineTuning(Reader):
    """Reads with a frozen copy of the model, and after every ``period`` bytes trains the copy on them with AdamW.

    Args:
        parameters: names of the parameters to train; None for all.
        epochs: passes over these bytes. A step is on one row of `CONTEXT` bytes; ``seed`` draws the order of the rows.
    """

    def __init__(
        self, model: Any, parameters: list[str] | None, lr: float, period: int, epochs: int, seed: int
    ) -> None:
        super().__init__(copy.deepcopy(model))
        self.period, self.epochs = period, epochs
        self.rows: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(parameters is None or name in parameters)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=lr)

    def read(self, ids: Tensor, start: int, end: int) -> Tensor:
        nll = score(self.model, ids[:, start : end + 1])
        self.rows.append(ids[:, start : end + 1])
        if sum(row.shape[1] - 1 for row in self.rows) >= self.period:
            self._train()
            self.rows.clear()
        return nll

    def _train(self) -> None:
        for _ in range(self.epochs):
            for i in torch.randperm(len(self.rows), generator=self._generator).tolist():
                row = self.rows[i]
                logits = self.model(input_ids=row[:, :-1]).logits[0].float()
                self._optimizer.zero_grad()
                nn.functional.cross_entropy(logits, row[0, 1:]).backward()
                self._optimizer.step()

    def state_bytes(self) -> int:
        moments = [t for state in self._optimizer.state.values() for t in state.values() if t.ndim]
        return sum(t.numel() * t.element_size() for t in moments) + self.period


def adapted_weights(model: nn.Module, config: ttt.TTTConfig) -> list[str]:
    """Names of the weights of ``model`` that learn after `ttt.adapt_` with ``config``."""
    names = [name for name, _ in ttt.learning_layers(ttt.adapt_(copy.deepcopy(model), config))]
    return [f"{name}.weight" for name in names]
