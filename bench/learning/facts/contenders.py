"""What is compared: ways to know in a new chat what was told in an old one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

import ttt
from bench.learning.facts.base_model import BaseModel
from bench.learning.facts.chat import Message, Question, session, telling
from bench.learning.facts.people import Fact
from bench.learning.facts.retrieval import nearest
from bench.learning.facts.scores import padded

Options = Mapping[str, Any]
MODULES, LAYERS = ("down_proj",), "last:0.25"


class Contender:
    """The frozen model; the base of the others.

    Args:
        base: the model.
        options: those of the method.
        seed: of everything random.

    Attributes:
        model: what answers.
    """

    def __init__(self, base: BaseModel, options: Options, seed: int) -> None:
        self.base, self.options, self.seed = base, options, seed
        self.model: Any = base.model

    def tell(self, facts: Sequence[Fact]) -> None:
        """A person tells ``facts`` in one chat."""

    def before(self, question: Question) -> list[Message]:
        """The messages that stand before ``question`` in the new chat."""
        return []


class InContext(Contender):
    """The frozen model with the whole old chat before the question."""

    def tell(self, facts: Sequence[Fact]) -> None:
        self.facts = list(facts)

    def before(self, question: Question) -> list[Message]:
        return session(self.facts)


class Retrieval(InContext):
    """The frozen model with the ``count`` nearest facts before the question."""

    def before(self, question: Question) -> list[Message]:
        kept = nearest(question.text, [fact.told for fact in self.facts], self.options["count"])
        return session([self.facts[i] for i in kept])


class OwnFact(InContext):
    """The frozen model with the one fact before the question that it asks for: what perfect retrieval could reach."""

    def before(self, question: Question) -> list[Message]:
        return telling(question.fact)


class Online(Contender):
    """A `ttt.Learner` that reads every turn of the chat ``times`` times, and learns from what the person says."""

    def __init__(self, base: BaseModel, options: Options, seed: int) -> None:
        super().__init__(base, options, seed)
        self.learner = base.learner(ttt.TTTConfig(MODULES, LAYERS, lr=options["lr"], seed=seed))
        self.model = self.learner.model

    def tell(self, facts: Sequence[Fact]) -> None:
        for _ in range(self.options["times"]):
            for fact in facts:
                self.learner.observe(torch.tensor([self.base.chat.ids(self.base.chat.text(telling(fact)))]))
        self.learner.flush()


class LoRA(Contender):
    """Fine-tuning of low-rank weights on the turns of the chat (Hu et al., 2021), with AdamW and PEFT.

    It takes ``steps`` steps on all turns at once, with the loss on what the person says and the model replies.
    """

    def __init__(self, base: BaseModel, options: Options, seed: int) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__(base, options, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = LoraConfig(r=options["rank"], lora_alpha=2 * options["rank"], target_modules=list(MODULES))
            self.model = get_peft_model(base.copy(), config).eval()

    def tell(self, facts: Sequence[Fact]) -> None:
        chat = self.base.chat
        turns = [chat.ids(chat.text(telling(fact))) for fact in facts]
        rows = padded(turns)
        targets = rows.clone()
        for row, turn in zip(targets, turns, strict=True):
            row[len(turn) :] = -100  # ignored by the loss
        weights = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=self.options["lr"], weight_decay=0.0)
        for _ in range(self.options["steps"]):
            logits = self.model(input_ids=rows).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
