"""Replay of token sequences while a `ttt.Learner` reads: with labels (ER), or with stored outputs (DER, DER++)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ttt.checks import check_dense, check_number, check_whole
from ttt.learn.stream_rule import Chunk, StreamRule
from ttt.learn.text import check_tokens
from ttt.rules.reservoir import SampleReservoir
from ttt.rules.task.distillation import TopLogits, top_distillation, top_logits

_BATCH = 16  # sequences in a forward pass that stores outputs


class Replayed(StreamRule):
    """What replaying rules share: every ``every``-th learning step, sequences of a reservoir enter the loss.

    A sequence is L + 1 tokens, of which L foretell the next; it is read from an empty context. All sequences of a step
    pass through the model in one batch, and the lowest layer that learns begins their graph.
    """

    def __init__(self, capacity: int, sequences: int, length: int, every: int, seed: int) -> None:
        self.sequences = check_whole("sequences", sequences, 1)
        self.length = check_whole("length", length, 1)
        self.every = check_whole("every", every, 1)
        self.reservoir = SampleReservoir(capacity, seed)
        self.steps = 0

    def attach(self, learner: Any) -> None:
        if self.length > learner.context:
            raise ValueError(f"length must be at most the learner's context of {learner.context}, got {self.length}")
        super().attach(learner)

    def term(self, chunk: Chunk) -> Tensor | None:
        return None if self.steps % self.every or not len(self.reservoir) else self.loss()

    def loss(self) -> Tensor:
        """The loss, summed over tokens, of sequences drawn from the reservoir, which holds some."""
        raise NotImplementedError

    def draw(self) -> dict[str, Tensor]:
        """Fields of up to ``sequences`` sequences, (S, ...) each; ``ids`` (S, L + 1) int64."""
        fields = {name: t for name, t in self.reservoir.draw(self.sequences).items() if t is not None}
        return fields | {"ids": fields["ids"].long()}

    def logits(self, ids: Tensor) -> Tensor:
        """(S, L, V): what the model says of ``ids`` (S, L + 1)."""
        logits = self.learner.model(input_ids=ids[:, :-1], use_cache=False).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def seen(self, chunk: Chunk) -> None:
        self.steps += 1

    def state(self) -> Any:
        return self.steps, self.reservoir.state()

    def load_state(self, state: Any) -> None:
        self.steps, held = state
        self.reservoir.load_state(held)

    def tensors(self) -> Iterable[Tensor]:
        return self.reservoir.tensors()


def pieces_of(base: Tensor, length: int) -> Tensor:
    """Cut the rows of ``base`` (R, T) int64 into pieces (N, length + 1), in which each token but the first is a target.

    Raises:
        TypeError, ValueError: for another dtype or shape, or rows that are too short.
    """
    check_dense("base", base)
    if base.dtype != torch.int64:
        raise TypeError(f"base must be int64, got {base.dtype}")
    if base.ndim != 2 or len(base) == 0 or base.shape[1] <= length:
        raise ValueError(f"base must be rows of more than length = {length} tokens, got shape {tuple(base.shape)}")
    return base.unfold(1, length + 1, length).flatten(0, 1)


def pieces_seen(chunk: Chunk, length: int) -> Tensor:
    """The pieces (N, length + 1) that the chunk completes, without those with a token that may not teach."""
    segment, step = chunk.segment, length + 1
    starts = range(chunk.start // length * length, chunk.end - length + 1, length)
    found = [segment.ids[:, at : at + step] for at in starts]
    if segment.teach is not None:
        found = [p[segment.teach[:, at : at + step].all(1)] for p, at in zip(found, starts, strict=True)]
    return torch.cat(found) if found else segment.ids.new_empty((0, step))


class SequenceReplay(Replayed):
    """Experience replay of text: a few remembered sequences are learnt with every chunk:

        loss += weight sum over S sequences, L tokens of CE(f(x), next token)

    The reservoir samples uniformly from ``base`` and from the stream. The stream is cut into pieces of L tokens, each
    of which enters when its last token was learnt; pieces with padding or a token that may not teach are left out.
    So text that was read is kept, as tokens, in this object and in snapshots. `ttt.Learner.reset` restores ``base``,
    `ttt.Learner.rollback` the state at the snapshot.

    Costs a pass, forward and backward, through the model for S L tokens. They join the chunk's update, at ``lr`` each.

    Args:
        capacity: sequences in the reservoir.
        sequences: S, replayed at each step.
        length: L, tokens learnt of each; at most the learner's context.
        every: replay at each so many learning steps.
        weight: of a replayed token against a new one, >= 0.
        base: (R, T) int64, text that the model knows, T > L.
        stream: whether what is read enters; False for a memory of ``base`` alone.
        seed: of the reservoir and the draws.

    Raises:
        TypeError, ValueError: for a value out of range, a wrong ``base``, or neither base nor stream.
    """

    def __init__(
        self,
        capacity: int,
        sequences: int = 1,
        length: int = 64,
        every: int = 1,
        *,
        weight: float = 1.0,
        base: Tensor | None = None,
        stream: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(capacity, sequences, length, every, seed)
        self.weight = check_number("weight", weight, 0.0)
        if base is None and not stream:
            raise ValueError("stream must be True where base is None, or there is nothing to replay; got False")
        self.stream = stream
        self._base = None if base is None else pieces_of(base, length)
        self._start: Any = None

    def attach(self, learner: Any) -> None:
        if self._base is not None:
            check_tokens(learner.model, self._base)
        super().attach(learner)
        if self._base is not None:
            self.enter(self._base.to(next(learner.model.parameters()).device))
            self._base = None
        self._start = self.state()

    def loss(self) -> Tensor:
        ids = self.draw()["ids"]
        logits = self.logits(ids).flatten(0, 1)
        return self.weight * nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")

    def enter(self, ids: Tensor) -> None:
        """Let ``ids`` (N, L + 1) int64 enter the reservoir."""
        self.reservoir.insert(ids=ids.int())

    def seen(self, chunk: Chunk) -> None:
        super().seen(chunk)
        if self.stream and len(pieces := pieces_seen(chunk, self.length)):
            self.enter(pieces)

    def reset(self) -> None:
        self.load_state(self._start)

    def tensors(self) -> list[Tensor]:
        _, (_, start, _) = self._start
        return [*self.reservoir.tensors(), *start.values()]


class DarkSequenceReplay(SequenceReplay):
    """Dark experience replay of text (DER, DER++; Buzzega et al., NeurIPS 2020), with stored outputs:

        loss += alpha T^2 sum_r KL(softmax(z_r / T) || softmax(f(x_r) / T))  +  beta sum_s CE(f(x_s), next token)

    r and s run over the tokens of two independent draws of S sequences; beta = 0 is DER, beta > 0 is DER++. z are the
    logits that the model gave for the sequence, read as it is replayed, when it had just learnt from it (with base
    text: when the rule was attached). Of each, the k likeliest words are kept, and the rest as one: the divergence is
    `ttt.rules.top_distillation`'s. DER's squared error of logits is the limit of T^2 KL for large T, but for a factor
    2 V and their mean, which no probability depends on (Hinton, Vinyals & Dean, 2015).

    Costs as `SequenceReplay` with 2 S sequences (S where alpha or beta is 0), 8 L k bytes a sequence, and one further
    forward pass of each sequence that the reservoir keeps.

    Args:
        alpha: of the stored outputs, >= 0.
        beta: of the labels, >= 0.
        temperature: T > 0.
        top: k >= 1; the vocabulary's size or more keeps all.
        capacity, sequences, length, every, base, stream, seed: as `SequenceReplay`.

    Raises:
        TypeError, ValueError: as there.
    """

    def __init__(
        self,
        capacity: int,
        sequences: int = 1,
        length: int = 64,
        every: int = 1,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        temperature: float = 2.0,
        top: int = 32,
        base: Tensor | None = None,
        stream: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(capacity, sequences, length, every, base=base, stream=stream, seed=seed)
        self.alpha = check_number("alpha", alpha, 0.0)
        self.beta = check_number("beta", beta, 0.0)
        self.temperature = check_number("temperature", temperature, 0.0, above=True)
        self.top = check_whole("top", top, 1)
        if not alpha and not beta:
            raise ValueError("alpha and beta must not both be 0, or there is nothing to learn; got 0 and 0")

    def loss(self) -> Tensor:
        stored = self.draw()
        labelled = self.draw()["ids"] if self.beta else stored["ids"][:0]
        if not self.alpha:
            stored = {name: t[:0] for name, t in stored.items()}
        count = len(stored["ids"])
        logits = self.logits(torch.cat([stored["ids"], labelled]))
        dark = top_distillation(logits[:count], TopLogits(stored["outputs"], stored["logp"]), self.temperature)
        labels = nn.functional.cross_entropy(logits[count:].flatten(0, 1), labelled[:, 1:].flatten(), reduction="sum")
        return self.alpha * dark + self.beta * labels

    @torch.no_grad()
    def enter(self, ids: Tensor) -> None:
        def fields_of(rows: Tensor) -> dict[str, Tensor | None]:
            parts = ids[rows].split(_BATCH)
            stored = [top_logits(self.logits(part), self.top, self.temperature) for part in parts]
            outputs, logp = map(torch.cat, zip(*stored, strict=True))
            return {"ids": ids[rows].int(), "outputs": outputs, "logp": logp}

        self.reservoir.admit(len(ids), fields_of)
