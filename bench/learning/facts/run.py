"""One run of the suite: a person tells a method ten facts in one chat and asks about them in others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from bench.learning.facts.base_model import BaseModel, smollm
from bench.learning.facts.chat import questions
from bench.learning.facts.methods import FactsMethod, method
from bench.learning.facts.people import person
from bench.learning.facts.scores import choose, divergence, general_nll, log_softmax


def run(method_name: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """One run with SmolLM2-135M-Instruct; the result of `tell_and_ask`.

    Raises:
        ValueError: for an unknown method.
        FileNotFoundError: if the model is not installed.
    """
    return tell_and_ask(smollm(), method(method_name), seed, options)


def tell_and_ask(base: BaseModel, found: FactsMethod, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The person ``seed`` tells the method ``found`` ten facts and asks three questions about each in new chats.

    Returns:
        A dict of plain values.

        * ``ranks``: of the right value among the ten of its kind, one for each question; 1 is the best
        * ``nll``: nats of the right value, mean over the questions
        * ``general``: nats of the ends of sentences that the model knew before
        * ``drift``: KL in nats per token from the frozen model on general English
        * ``own_drift``: the same on texts that the model wrote itself, which calibration has seen
        * ``told_seconds``, ``asked_seconds``: processor time
    """
    facts = person(seed)
    contender = found.make(base, options, seed)
    began = time.process_time()
    contender.tell(facts)
    told = time.process_time()
    choices = [choose(contender.model, base.chat, q, contender.before(q)) for q in questions(facts)]
    asked = time.process_time()
    english, own = (_drift(base, contender.model, rows) for rows in (base.english, base.own[-4:]))
    return {
        "ranks": [choice.rank for choice in choices],
        "nll": round(sum(choice.nll for choice in choices) / len(choices), 5),
        "general": round(general_nll(contender.model, base.chat), 5),
        "drift": round(english, 6),
        "own_drift": round(own, 6),
        "told_seconds": round(told - began, 2),
        "asked_seconds": round(asked - told, 2),
    }


def _drift(base: BaseModel, model: Any, rows: Any) -> float:
    if model is base.model:
        return 0.0
    each = [divergence(log_softmax(base.model, row), log_softmax(model, row)) for row in rows.split(1)]
    return sum(each) / len(each)
