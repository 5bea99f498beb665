"""What all runs of a process share: the model, samples of its own, and the texts on which it is tested afterwards."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ttt
from bench.learning.language import texts
from bench.learning.language.hard import HARD, READS, Encode
from bench.learning.language.measures import final_hidden
from bench.learning.text.readers import adapted_weights
from ttt.demo.knowledge import GENERAL_KNOWLEDGE, Fact, as_facts
from ttt.demo.language_model import load_language_model
from ttt.learn.own_text import own_text

CONTEXT = 1024
CONFIG = ttt.TTTConfig(target_modules=["down_proj"], layers="last:0.25")
"""The default configuration of the package. Its layers are those that every method changes."""


def as_json(config: ttt.TTTConfig) -> dict[str, Any]:
    """All settings, as JSON holds them: lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


GENERAL = (4, 512)  # rows and tokens of the text on which what was kept is measured


class Base:
    """A language model that is not adapted, from which the runs of a process make their readers.

    Args:
        model: a causal language model in eval mode.
        encode: text -> its tokens (T,) int64.
        sample: makes texts (N, T) of the model's own, for calibration. Called once, when they are first needed.
        facts: short sentences and how they go on.
        tokenizer: the model's, where chats are written.

    Tokens, and all that is made of the model, are on the model's device.
    """

    def __init__(
        self,
        model: Any,
        encode: Encode,
        sample: Callable[[], Tensor],
        facts: Sequence[tuple[str, str]],
        tokenizer: Any = None,
    ) -> None:
        self.model = model.requires_grad_(False)
        self.device = next(model.parameters()).device
        self._encode = encode
        self._sample, self.tokenizer = sample, tokenizer
        self.names = adapted_weights(model, CONFIG)
        self.facts: list[Fact] = as_facts(facts, self.encode)
        rows, length = GENERAL
        self.general = self.encode(texts.english()[: texts.KNOWN // 2])[: rows * length].view(rows, length)
        self._learners: dict[ttt.TTTConfig, ttt.Learner] = {}

    def encode(self, text: str) -> Tensor:
        """The tokens (T,) int64 of ``text``."""
        return self._encode(text).to(self.device)

    @functools.cached_property
    def own(self) -> Tensor:
        """(N, T) int64: texts of the model's own."""
        return self._sample()

    @functools.cached_property
    def frozen_hidden(self) -> list[Tensor]:
        """What the model's output head gets on each row of ``general``: (1, T, d)."""
        return [final_hidden(self.model, row) for row in self.general.split(1)]

    def copy(self, config: ttt.TTTConfig = CONFIG) -> nn.Module:
        """A copy of the model with weights of its own where methods learn with ``config``; all others are shared."""
        names = self.names if config == CONFIG else adapted_weights(self.model, config)
        shared = {id(p): p for name, p in self.model.named_parameters() if name not in names}
        return copy.deepcopy(self.model, shared)

    def learner(self, config: ttt.TTTConfig) -> ttt.Learner:
        """A learner that has learnt nothing, calibrated on ``own`` if ``config`` needs that.

        There is one for each configuration: calling this again resets it.
        """
        if config not in self._learners:
            model = ttt.adapt_(self.copy(config), config)
            learner = ttt.Learner(model, context=CONTEXT, episodes=ttt.EpisodeLog())
            if config.calibrates:  # as `learner.calibrate(tokenizer=...)` does, with a text that is drawn once
                learner.calibrate(self.own.split(1))
            self._learners[config] = learner
        self._learners[config].reset()
        return self._learners[config]

    def tokens(self, name: str, count: int, part: int) -> Tensor:
        """(1, count + 1) int64: tokens of a text, or of a hard one; the first is only context.

        Args:
            part: which part of the text, counted from 0; for a hard text the seed of its random draws.

        Raises:
            ValueError: if the text has no such part.
            FileNotFoundError: if the text is not on this machine.
        """
        if name in HARD:
            generator = torch.Generator().manual_seed(part)
            ids = HARD[name](self._encode, self.model.config.vocab_size, count + 1, generator)
        else:
            ids = self.encode(texts.read(name))[part * count : (part + 1) * count + 1]
        if len(ids) <= count:
            raise ValueError(f"the text {name!r} is too short for part {part} of {count} tokens")
        return ids[None].to(self.device)


def segments(ids: Tensor) -> Iterator[Tensor]:
    """The parts of ``ids`` (1, T + 1) that are read with one context: of `CONTEXT` tokens and the one after them."""
    for start in range(0, ids.shape[1] - 1, CONTEXT):
        yield ids[:, start : start + CONTEXT + 1]


def check_text(name: str) -> None:
    """Raise FileNotFoundError, which says what to install, if the text or hard text ``name`` is not on this machine."""
    for each in READS.get(name, ()) if name in HARD else (name,):
        texts.read(each)


@functools.cache
def smollm(device: str = "cpu") -> Base:
    """SmolLM2-135M-Instruct on ``device``.

    Raises:
        FileNotFoundError: if its package is not installed; it says how to install it.
    """
    model, tokenizer = load_language_model()
    model.to(device)

    def encode(text: str) -> Tensor:
        return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]

    def sample() -> Tensor:
        return torch.cat(list(own_text(model, tokenizer, context=CONTEXT, seed=CONFIG.seed)))

    return Base(model, encode, sample, GENERAL_KNOWLEDGE, tokenizer)
