"""One run of the suite: a person tells a method facts in chats and asks about them in others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.learning.clock import seconds
from bench.learning.facts.contenders import Contender
from bench.learning.facts.known import KNOWN
from bench.learning.facts.methods import FactsMethod
from bench.learning.facts.people import Fact, corrected, of_friends, of_things, other_person, person
from bench.learning.facts.questions import Asked, about_the_neighbour, questions
from bench.learning.language.base import Base
from bench.learning.language.measures import divergence
from ttt.demo.knowledge import Fact as KnownFact
from ttt.demo.knowledge import as_facts, loss
from ttt.demo.questions import Choice, choose, names_the_right_value, written

CHAT = 10  # sentences of one chat
TEXTS, TOKENS = ("prose", "python", "german"), 512
"""Texts on which it is measured what else the model does differently, and the tokens that are read of each."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is said and asked.

    Attributes:
        said: the sentences that a person says, in chats of `CHAT`.
        facts: those that are asked for afterwards.
        by_another: sentences that another person says afterwards to the same model.
    """

    said: list[str]
    facts: list[Fact]
    by_another: list[str] = dataclasses.field(default_factory=list)


def _then(more: Callable[[int], Sequence[str]]) -> Callable[[int], Plan]:
    def plan(seed: int) -> Plan:
        facts = person(seed)
        return Plan([*(fact.told for fact in facts), *more(seed)], facts)

    return plan


def _corrected(seed: int) -> Plan:
    facts = person(seed)
    later = corrected(facts, seed)
    return Plan([fact.told for fact in (*facts, *later)], later)


def _contradicted(seed: int) -> Plan:
    facts = person(seed)
    return Plan([fact.told for fact in facts], facts, [fact.told for fact in other_person(facts, seed)])


SCENARIOS: dict[str, Callable[[int], Plan]] = {
    "ten facts": _then(lambda seed: []),
    "corrected": _corrected,
    "another person": _contradicted,
    "50 things": _then(lambda seed: of_things(seed, 50)),
    "50 of friends": _then(lambda seed: [fact.told for fact in of_friends(seed, 50)]),
    "500 things": _then(lambda seed: of_things(seed, 500)),
}
"""Name -> what the person with a seed says and asks. In all of them the ten facts are told in the first chat."""


def run(base: Base, found: FactsMethod, scenario: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The person ``seed`` tells the method ``found`` what `SCENARIOS` says and asks three questions about each fact.

    Returns:
        A dict of plain values.

        * ``ranks``: of the right value among the ten of its kind, one for each question; 1 is the best
        * ``nll``: nats of the right value, mean over the questions
        * ``written``: share of the questions to which the answer that the model writes names the right value only
        * ``neighbour``: share of the facts that are the model's choice when asked about someone else, too
        * ``general``: nats of how 100 sentences go on that the model knew before
        * ``texts``: nats per token of each of `TEXTS`
        * ``kl``: KL in nats per token from the frozen model on general English
        * ``told_seconds``, ``asked_seconds``: processor time; of the wall clock on a GPU
    """
    plan = SCENARIOS[scenario](seed)
    said, facts = plan.said, plan.facts
    contender = found.make(base, options, seed)
    device = base.device.type
    began = seconds(device)
    for at in range(0, len(said), CHAT):
        contender.tell(said[at : at + CHAT])
    if plan.by_another:
        contender.tell_by_another(plan.by_another)
    told = seconds(device)
    choices = _choices(contender, questions(facts))
    asked = seconds(device)
    answers = _written(contender, questions(facts))
    elsewhere = _choices(contender, about_the_neighbour(facts))
    kl = 0.0
    if contender.model is not base.model:
        head, model = base.model.get_output_embeddings(), contender.model
        with contender.answering(1):
            kl = float(divergence(model, base.general, head, base.frozen_hidden).double().mean())
    general = _general(contender, _known(base))
    with contender.answering(1):
        read = [float(loss(contender.model, ids).mean()) for ids in _texts(base)]
    return {
        "ranks": [choice.rank for choice in choices],
        "nll": round(sum(choice.nll for choice in choices) / len(choices), 5),
        "written": round(sum(answers) / len(answers), 5),
        "neighbour": sum(choice.rank == 1 for choice in elsewhere) / len(elsewhere),
        "general": round(general, 5),
        "texts": [round(each, 5) for each in read],
        "kl": round(kl, 6),
        "told_seconds": round(told - began, 2),
        "asked_seconds": round(asked - told, 2),
    }


@functools.cache
def _known(base: Base) -> list[KnownFact]:
    return as_facts(KNOWN, base.encode)


@functools.cache
def _texts(base: Base) -> list[Tensor]:
    return [base.tokens(name, TOKENS, 0) for name in TEXTS]


@torch.no_grad()
def _general(contender: Contender, known: Sequence[KnownFact]) -> float:
    """`ttt.demo.knowledge.facts_loss`; sentences with as many tokens are read together."""
    by_length: dict[int, list[KnownFact]] = {}
    for fact in known:
        by_length.setdefault(fact[0].shape[1], []).append(fact)
    total = 0.0
    for alike in by_length.values():
        rows = torch.cat([ids for ids, _ in alike])
        with contender.answering(len(rows)):
            logits = contender.model(input_ids=rows[:, :-1]).logits.float()
        each = functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        total += sum(float(mine[-last:].sum()) for mine, (_, last) in zip(each, alike, strict=True))
    return total / len(known)


def _choices(contender: Contender, asked: Sequence[Asked]) -> list[Choice]:
    return [
        choose(contender.model, contender.template, each[0], contender.before(each), contender.answering)
        for each in asked
    ]


def _written(contender: Contender, asked: Sequence[Asked]) -> list[bool]:
    """Whether the model, which writes freely, answers rightly."""
    return [
        names_the_right_value(
            written(contender.model, contender.template, each[0], contender.before(each), contender.answering), each[0]
        )
        for each in asked
    ]
