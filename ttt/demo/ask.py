"""``python -m ttt.demo.ask MODEL STORE USER``: ask in a new process what a user told the model in another.

The demo runs this command. MODEL is a folder, or ``-`` for SmolLM2. It prints one line of JSON: the choices for
`ttt.demo.facts.QUESTIONS` with the user's weights, and what became of general knowledge; see `main`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

import ttt
from ttt.conversation import CONVERSATION
from ttt.demo.facts import QUESTIONS
from ttt.demo.knowledge import GENERAL_KNOWLEDGE, as_facts, facts_loss
from ttt.demo.language_model import load
from ttt.demo.questions import Template, choose
from ttt.store import Store, UnknownUser

OTHER = "someone else"


def general_loss(model: Any, template: Template) -> float:
    """Nats of the ends of the sentences in `GENERAL_KNOWLEDGE`, mean over the sentences."""
    return facts_loss(model, as_facts(GENERAL_KNOWLEDGE, lambda text: torch.tensor(template.ids(text))))


def logits_of(model: Any, template: Template, user: str | None) -> Tensor:
    """The logits for the first question's tokens with the weights of ``user``; None: those of the base model."""
    ids = torch.tensor([template.prompt(QUESTIONS[0])])
    with torch.no_grad(), ttt.users(model, [user]):
        return model(input_ids=ids).logits


def main(folder: str, store: str, user: str) -> dict[str, Any]:
    """Load the model and the newest version of ``user`` in ``store``, and ask.

    Returns:
        ``chosen``: the index of the answer chosen for each question; ``nll``: nats of each right answer; ``general``:
        nats of general knowledge with the user's weights; ``same``: whether someone else gets the base model's logits
        to the bit; ``seconds``: of the questions.
    """
    assert CONVERSATION.per_user is not None
    model, tokenizer = load(None if folder == "-" else folder)
    two = dataclasses.replace(CONVERSATION, per_user=dataclasses.replace(CONVERSATION.per_user, slots=2))
    model, template = ttt.adapt_(model, two), Template(tokenizer)
    pool = ttt.Learner(model, episodes=ttt.EpisodeLog()).pool
    assert pool is not None
    try:
        pool.load(user, Store(store).get(user).tensors)
    except UnknownUser:
        pool.open(user)  # one who begins with the base model
    began = time.perf_counter()
    choices = [
        choose(model, template, question, answering=lambda rows: ttt.users(model, [user] * rows))
        for question in QUESTIONS
    ]
    seconds = time.perf_counter() - began
    with ttt.users(model, [user]):
        general = general_loss(model, template)
    same = torch.equal(logits_of(model, template, OTHER), logits_of(model, template, None))
    return {
        "chosen": [choice.chosen for choice in choices], "nll": [choice.nll for choice in choices], "general": general,
        "same": same, "seconds": seconds,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
