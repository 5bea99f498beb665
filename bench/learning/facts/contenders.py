"""What is compared: ways to know in a new chat what was told in an old one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

import ttt
from bench.learning.facts.questions import Asked
from bench.learning.facts.retrieval import nearest
from bench.learning.language.base import CONFIG, Base
from ttt.demo.questions import Message, Template, padded, session, telling

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
    """A `ttt.Learner` that reads every turn ``times`` times, and learns from what the person says.

    With ``study`` it studies after every chat. ``layers`` and ``directions`` replace those of the default; with
    ``rank`` the person has low-rank weights of their own.
    """

    def __init__(self, base: Base, options: Options, seed: int) -> None:
        super().__init__(base, options, seed)
        config = dataclasses.replace(CONFIG, layers=options.get("layers", CONFIG.layers))
        if "directions" in options:
            config = dataclasses.replace(config, protect=[ttt.KroneckerFisher(directions=options["directions"])])
        if "rank" in options:
            config = dataclasses.replace(config, per_user=ttt.LowRank(slots=1, rank=options["rank"], window=64))
        self.learner = base.learner(config)
        self.model = self.learner.model
        self.user = "user" if "rank" in options else None
        if self.learner.pool is not None:
            self.learner.pool.open(self.user)

    def tell(self, sentences: Sequence[str]) -> None:
        for _ in range(self.options.get("times", 1)):
            for sentence in sentences:
                ids, said = self.template.turn(sentence)
                users = None if self.user is None else [self.user]
                self.learner.observe(torch.tensor([ids]), learn_mask=torch.tensor([said]), users=users)
        if self.options.get("study"):
            self.learner.study(self.user)

    def answering(self, rows: int) -> contextlib.AbstractContextManager:
        return super().answering(rows) if self.user is None else ttt.users(self.model, [self.user] * rows)


class LoRA(Contender):
    """Fine-tuning of low-rank weights on the turns of each chat (Hu et al., 2021), with AdamW and PEFT.

    It takes ``steps`` steps on all turns at once, with the loss on what the person says.
    """

    def __init__(self, base: Base, options: Options, seed: int) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__(base, options, seed)
        names = [name.removesuffix(".weight") for name in base.names]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = LoraConfig(r=options["rank"], lora_alpha=2 * options["rank"], target_modules=names)
            model: Any = base.copy()
            self.model = get_peft_model(model, config).eval()

    def tell(self, sentences: Sequence[str]) -> None:
        turns = [self.template.turn(sentence) for sentence in sentences]
        rows = padded([ids for ids, _ in turns])
        targets = torch.full_like(rows, -100)  # ignored by the loss
        for at, (ids, said) in enumerate(turns):
            targets[at, : len(ids)] = torch.where(torch.tensor(said), rows[at, : len(ids)], -100)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=self.options["lr"], weight_decay=0.0)
        for _ in range(self.options["steps"]):
            logits = self.model(input_ids=rows).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
