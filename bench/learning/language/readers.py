"""Ways to read a stream of tokens. Each scores every token before it learns from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import ttt
from bench.learning.language.base import Base
from bench.learning.language.hard import CHUNK
from ttt.demo.knowledge import loss
from ttt.learn.huggingface import cache_of, cached, detached


class Reader:
    """Reads with a frozen model: one forward pass for each segment.

    Args:
        model: a causal language model. Readers that learn change it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def read(self, ids: Tensor) -> Tensor:
        """Score the tokens of a segment after the first, ``ids`` (1, T + 1), with an empty context; learn from them.

        Returns:
            (T,) losses in nats.
        """
        return loss(self.model, ids)


class Learning(Reader):
    """Reads with a `ttt.Learner`."""

    def __init__(self, learner: ttt.Learner) -> None:
        super().__init__(learner.model)
        self.learner = learner

    def read(self, ids: Tensor) -> Tensor:
        return self.learner.observe(ids).nll[0]


class Optimised(Reader):
    """Reads chunk by chunk, and takes one step of Adam on the mean loss of each chunk after it was scored.

    Keys and values of earlier chunks stay in the context as they were computed, as with `ttt.Learner`.

    Args:
        parameters: those that learn.
        lr: of Adam, whose other settings are torch's defaults.
    """

    def __init__(self, model: Any, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(model)
        self.optimizer = torch.optim.Adam([p.requires_grad_(True) for p in parameters], lr=lr)

    def read(self, ids: Tensor) -> Tensor:
        cache, found = None, []
        for at in range(0, ids.shape[1] - 1, CHUNK):
            chunk = ids[:, at : at + CHUNK + 1]
            with torch.enable_grad():
                out = self.model(input_ids=chunk[:, :-1], **cached(self.model, cache))
                each = functional.cross_entropy(out.logits[0].float(), chunk[0, 1:], reduction="none")
                self.optimizer.zero_grad()
                each.mean().backward()
            self.optimizer.step()
            cache = detached(cache_of(out))
            found.append(each.detach())
        return torch.cat(found)


def adam(base: Base, lr: float) -> Reader:
    """Adam on the weights that the learners change."""
    model = base.copy()
    return Optimised(model, [model.get_parameter(name) for name in base.names], lr)


def lora(base: Base, rank: int, alpha: int, lr: float, seed: int) -> Reader:
    """Adam on a LoRA adapter (Hu et al., 2021; PEFT) of the weights that the learners change.

    Args:
        seed: of the adapter's start.
    """
    import peft

    names = [name.removesuffix(".weight") for name in base.names]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = peft.inject_adapter_in_model(config, base.copy())
    return Optimised(model.eval(), [p for name, p in model.named_parameters() if "lora_" in name], lr)
