"""Generative replay for language models: the model itself writes the text that is replayed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttt.checks import check_number, check_whole
from ttt.learn.protection import anchored
from ttt.learn.text import check_tokens
from ttt.rules.stream.sequence_replay import Replayed
from ttt.rules.task.distillation import TopLogits, top_distillation, top_logits

_BATCH = 32  # sequences written at a time


class SampledReplay(Replayed):
    """Generative replay of text that the model wrote under its anchor weights.

    Shin et al., 2017, with soft targets as in van de Ven & Tolias, 2018. When the rule is attached, and after each
    consolidation, a pool of sequences is sampled under the anchor weights and stored with the outputs that those
    weights give. Every step learns some of them:

        loss += weight T^2 sum over S sequences, L tokens of KL(softmax(f*(x) / T) || softmax(f(x) / T))

    f* are the outputs under the anchor weights, of which the k likeliest are kept one by one and the rest together
    (`ttt.rules.top_distillation`). Only sampled tokens count, up to the first end of text. No input of a user is kept.

    A text begins after one token: ``start``, or by default a token of the model's own distribution, the last of
    ``burn_in`` that it samples after a token drawn uniformly. `ttt.Learner.reset` samples the pool again; loading a
    file does not, so attach the rule afterwards.

    Args:
        pool: sequences sampled at a time.
        sequences: S, replayed at each step.
        length: L, tokens written of each; at most the learner's context, less 1.
        every: replay at each so many learning steps.
        weight: of a replayed token against a new one, >= 0.
        temperature: T > 0, of the distillation; the text is sampled at 1.
        top: k >= 1; the vocabulary's size or more keeps all.
        start: the token that every text begins after, as that which begins a text for the model.
        burn_in: tokens, >= 1.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        pool: int = 64,
        sequences: int = 1,
        length: int = 64,
        every: int = 1,
        *,
        weight: float = 1.0,
        temperature: float = 2.0,
        top: int = 32,
        start: int | None = None,
        burn_in: int = 16,
    ) -> None:
        super().__init__(check_whole("pool", pool, 1), sequences, length, every, seed=0)
        self.weight = check_number("weight", weight, 0.0)
        self.temperature = check_number("temperature", temperature, 0.0, above=True)
        self.top = check_whole("top", top, 1)
        self.start = None if start is None else check_whole("start", start, 0)
        self.burn_in = check_whole("burn_in", burn_in, 1)
        self.generator: Any = None

    def attach(self, learner: Any) -> None:
        longest = max(self.length, 0 if self.start is not None else self.burn_in)
        if longest >= learner.context:
            raise ValueError(
                f"length and burn_in must be below the learner's context of {learner.context}, "
                f"got {self.length} and {self.burn_in}"
            )
        if self.start is not None:
            check_tokens(learner.model, torch.tensor([[self.start]]))
        super().attach(learner)
        self.reset()

    def loss(self) -> Tensor:
        held = self.draw()
        logits, written = self.logits(held["ids"]), held["written"]
        teacher = TopLogits(held["outputs"][written], held["logp"][written])
        return self.weight * top_distillation(logits[written], teacher, self.temperature)

    def consolidated(self) -> None:
        self.refill()

    def reset(self) -> None:
        device = next(self.learner.model.parameters()).device
        self.generator = torch.Generator(device=device).manual_seed(self.learner.config.seed)
        self.reservoir.generator.manual_seed(self.learner.config.seed)
        self.steps = 0
        self.refill()

    @torch.no_grad()
    def refill(self) -> None:
        """Sample the pool anew from the model under its present anchor weights."""
        self.reservoir.seen = 0  # all are overwritten
        left = self.reservoir.capacity
        while left:
            count = min(left, _BATCH)
            with anchored(self.learner.layers):
                ids, written = self._write(count)
                stored = top_logits(self.logits(ids), self.top, self.temperature)
            self.reservoir.insert(ids=ids.int(), written=written, **stored._asdict())
            left -= count

    def _write(self, count: int) -> tuple[Tensor, Tensor]:
        """(ids (count, L + 1), written (count, L) bool: the targets up to the first end of text)."""
        learner, device = self.learner, self.generator.device
        options = {"learn_prompt": False, "do_sample": True, "generator": self.generator}
        if self.start is None:
            words = learner.model.get_input_embeddings().num_embeddings
            first = torch.randint(words, (count, 1), generator=self.generator, device=device)
            first = learner.generate(first, max_new_tokens=self.burn_in, **options).sequences[:, -1:]
        else:
            first = torch.full((count, 1), self.start, device=device)
        end = getattr(getattr(learner.model, "generation_config", None), "eos_token_id", None)
        end = end if isinstance(end, int) else None
        made = learner.generate(first, max_new_tokens=self.length, eos_token_id=end, **options)
        short = self.length - made.mask.shape[1]  # all texts may have ended early
        return torch.nn.functional.pad(made.sequences, (0, short)), torch.nn.functional.pad(made.mask, (0, short))

    def state(self) -> Any:
        return super().state(), self.generator.get_state()

    def load_state(self, state: Any) -> None:
        held, drawn = state
        super().load_state(held)
        self.generator.set_state(drawn)
