"""What is compared: ways to know in a new chat what was told in an old one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import ttt
from bench.learning.facts import memit
from bench.learning.facts.questions import Asked
from bench.learning.language.base import CONFIG, Base
from ttt.demo.lora import fine_tune, with_lora
from ttt.demo.questions import Message, Template, session, telling
from ttt.demo.retrieval import nearest

Options = Mapping[str, Any]


class Contender:
    """The frozen model; the base of the others.

    Args:
        base: the model.
        options: those of the method.
        seed: of everything random.

    Attributes:
        model: what answers.
        template: writes chats in its tokens.
    """

    def __init__(self, base: Base, options: Options, seed: int) -> None:
        self.base, self.options, self.seed = base, options, seed
        self.template = Template(base.tokenizer)
        self.model: Any = base.model

    def tell(self, sentences: Sequence[str]) -> None:
        """A person says ``sentences`` in one chat, which ends then."""

    def tell_by_another(self, sentences: Sequence[str]) -> None:
        """Another person says ``sentences`` to the same model in a chat of their own."""
        self.tell(sentences)

    def before(self, asked: Asked) -> list[Message]:
        """The messages that stand before the question in the new chat."""
        return []

    def answering(self, rows: int) -> contextlib.AbstractContextManager:
        """A context in which ``model`` answers a batch of ``rows`` rows."""
        return contextlib.nullcontext()


class InContext(Contender):
    """The frozen model with all old chats before the question."""

    def __init__(self, base: Base, options: Options, seed: int) -> None:
        super().__init__(base, options, seed)
        self.told: list[str] = []

    def tell(self, sentences: Sequence[str]) -> None:
        self.told += sentences

    def tell_by_another(self, sentences: Sequence[str]) -> None:
        """Nothing: what is in a context is in nobody else's."""

    def before(self, asked: Asked) -> list[Message]:
        return session(self.told)


class Retrieval(InContext):
    """The frozen model with the ``count`` nearest sentences before the question."""

    def before(self, asked: Asked) -> list[Message]:
        return session([self.told[i] for i in nearest(asked[0].text, self.told, self.options["count"])])


class OwnFact(InContext):
    """The frozen model with the one sentence before the question that answers it, as from perfect retrieval."""

    def before(self, asked: Asked) -> list[Message]:
        return telling(asked[1])


class Online(Contender):
    """A `ttt.Learner` that learns from what the person says.

    ``passes`` and ``emphasis`` are those of `ttt.Learner.observe`.

    With ``study`` it studies after every chat; ``rehearse`` is that of `ttt.Learner.study`. ``layers``
    replaces that of the default, as does ``blocks``: the "first" or "middle" quarter of them. With ``rank`` and
    ``window`` every person has low-rank weights of their own (`ttt.LowRank`). ``beyond`` is noted only: the bound of
    emphasised steps (`ttt.nn.own_loss`). ``budget`` and ``slowest`` are those of a `ttt.DriftBudget`.
    """

    def __init__(self, base: Base, options: Options, seed: int) -> None:
        super().__init__(base, options, seed)
        layers = options.get("layers", CONFIG.layers)
        if "blocks" in options:
            count = base.model.config.num_hidden_layers
            quarter = -(-count // 4)  # as many as "last:0.25" has
            first = {"first": 0, "middle": (count - quarter) // 2}[options["blocks"]]
            layers = list(range(first, first + quarter))
        config = dataclasses.replace(CONFIG, layers=layers)
        if "budget" in options:
            budget = ttt.DriftBudget(options["budget"], options["slowest"])
            config = dataclasses.replace(config, protect=(*config.protect, budget))
        if "rank" in options:
            config = dataclasses.replace(
                config, per_user=ttt.LowRank(slots=2, rank=options["rank"], window=options["window"])
            )
        self.learner = base.learner(config)
        self.model = self.learner.model
        self.user = "user" if "rank" in options else None
        if self.learner.pool is not None and self.user is not None:
            self.learner.pool.open(self.user)

    def tell(self, sentences: Sequence[str]) -> None:
        self._tell(sentences, self.user)

    def tell_by_another(self, sentences: Sequence[str]) -> None:
        self._tell(sentences, None if self.user is None else "another")

    def _tell(self, sentences: Sequence[str], user: str | None) -> None:
        for sentence in sentences:
            ids, said = self.template.turn(sentence)
            tokens, learnt = (torch.tensor([each], device=self.base.device) for each in (ids, said))
            self.learner.observe(
                tokens, learn_mask=learnt, users=None if user is None else [user],
                passes=self.options.get("passes", 1), emphasis=self.options.get("emphasis", 1.0),
            )  # fmt: skip
        if self.options.get("study"):
            kept = {"rehearse": self.options["rehearse"]} if "rehearse" in self.options else {}
            self.learner.study(user, **kept)

    def answering(self, rows: int) -> contextlib.AbstractContextManager:
        return super().answering(rows) if self.user is None else ttt.users(self.model, [self.user] * rows)


class LoRA(Contender):
    """Fine-tuning of low-rank weights on the turns of each chat (`ttt.demo.lora`), with the loss on what is said."""

    def __init__(self, base: Base, options: Options, seed: int) -> None:
        super().__init__(base, options, seed)
        names = [name.removesuffix(".weight") for name in base.names]
        self.model = with_lora(base.copy(), names, options["rank"], seed)

    def tell(self, sentences: Sequence[str]) -> None:
        turns = [self.template.turn(sentence) for sentence in sentences]
        fine_tune(self.model, turns, self.options["lr"], self.options["steps"])


class Memit(Contender):
    """Blocks edited in closed form after each chat (`.memit`): those in the "middle", or the "last" quarter."""

    def __init__(self, base: Base, options: Options, seed: int) -> None:
        super().__init__(base, options, seed)
        count = len(memit.blocks_of(base.model))
        middle, last = range(count // 3, count // 3 + max(1, count // 6)), range(count - max(1, count // 4), count)
        self.layers = {"middle": middle, "last": last}[options["blocks"]]
        self.model = base.copy(dataclasses.replace(CONFIG, layers=list(self.layers)))
        self.moments = memit.second_moments(base.model, self.layers, base.own)

    def tell(self, sentences: Sequence[str]) -> None:
        turns = [self.template.turn(sentence) for sentence in sentences]
        memit.edit(self.model, turns, self.layers, self.moments, self.options["weight"])
