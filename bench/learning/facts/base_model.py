"""The language model that is told facts, texts that it wrote itself, and general English."""

from __future__ import annotations

import copy
import functools
import pydoc_data.topics
from typing import Any

import torch
from torch import Tensor

import ttt
from bench.learning.facts.chat import Chat
from ttt.demo.language_model import load_language_model

TOPICS = (
    "the history of Rome", "how plants grow", "cooking pasta", "the solar system", "Python programming", "music",
    "the geography of Africa", "the human body", "a short story about a dog", "economics", "football", "the weather",
    "mathematics", "a letter to a friend", "computers", "animals",
)  # fmt: skip
"""What the model is asked to write about, for texts that show what it knows."""
OWN_TOKENS, ENGLISH_ROWS, ENGLISH_TOKENS = 128, 4, 128


class BaseModel:
    """A frozen language model, and what the methods of the suite need of it.

    Args:
        model: a transformers causal language model. It is never changed.
        chat: writes chats in its tokens.
        own: (N, T) int64, texts that it wrote itself: what it should not forget.
        english: (M, T) int64, general English on which its change is measured.
    """

    def __init__(self, model: Any, chat: Chat, own: Tensor, english: Tensor) -> None:
        self.model, self.chat, self.own, self.english = model.eval(), chat, own, english

    def copy(self) -> Any:
        """A model of its own for one method."""
        return copy.deepcopy(self.model)

    def learner(self, config: ttt.TTTConfig) -> ttt.Learner:
        """A learner with ``config`` on a copy of the model, calibrated with what the model wrote itself."""
        learner = ttt.Learner(ttt.adapt_(self.copy(), config))
        if config.calibrates:
            learner.calibrate(self.own.split(4))
        return learner


@functools.cache
def smollm() -> BaseModel:
    """SmolLM2-135M-Instruct, with texts about `TOPICS` that it writes when it is first asked for.

    Raises:
        FileNotFoundError, ImportError: as `ttt.demo.language_model.load_language_model`.
    """
    model, tokenizer = load_language_model()
    chat = Chat(tokenizer)
    english = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    ids = torch.tensor(chat.ids(english[:20_000])[: ENGLISH_ROWS * ENGLISH_TOKENS]).view(ENGLISH_ROWS, ENGLISH_TOKENS)
    return BaseModel(model, chat, own_texts(model, chat, seed=0), ids)


@torch.no_grad()
def own_texts(model: Any, chat: Chat, seed: int) -> Tensor:
    """(N, `OWN_TOKENS`) int64: what ``model`` writes about each of `TOPICS` at temperature 1, with the question."""
    prompts = [chat.ids(chat.text([{"role": "user", "content": f"Write about {t}."}], answer=True)) for t in TOPICS]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = []
        for prompt in prompts:
            new = OWN_TOKENS - len(prompt)
            ids, one = torch.tensor([prompt]), {"max_new_tokens": new, "min_new_tokens": new, "top_k": 0}
            rows.append(model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, pad_token_id=0, **one))
    return torch.cat(rows)
