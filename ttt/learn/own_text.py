"""Text that a model writes itself, to measure what it knows where no data that it knows is at hand."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.checks import check_whole
from ttt.learn.draw import draw_tokens
from ttt.learn.huggingface import cache_of, cached
from ttt.learn.not_finite import require_finite
from ttt.steps import finish

TOPICS = (
    "the history of Rome", "how plants grow", "cooking pasta", "the solar system", "computer programming", "music",
    "the geography of Africa", "the human body", "a short story about a dog", "economics", "football", "the weather",
    "mathematics", "a letter to a friend", "an ordinary day at work", "animals of the sea",
)  # fmt: skip
"""What a model with a chat template is asked to write about."""

SEQUENCES, LENGTH, _BATCH = 16, 256, 4


def own_text(model: Any, tokenizer: Any = None, *, context: int, seed: int) -> Iterator[Tensor]:
    """Batches of text drawn from ``model``: 16 sequences of `LENGTH` tokens, prompts included, in batches of 4.

    Behind prompts that leave less than half of that, half as many tokens are written all the same.

    Tokens are drawn from the model's whole distribution (temperature 1), so that the text has the variety of what the
    model was trained on. It is written without regard to tokens that end a text.

    Args:
        model: a transformers causal language model in eval mode.
        tokenizer: with a chat template: each sequence answers a request to write about one of `TOPICS`. None, or a
            tokenizer without a template: each begins with the model's token for the beginning of a text.
        context: bound on the length. The sequences have their beginnings, the prompts.
        seed: of the draws.

    Raises:
        ValueError: if there is neither a chat template nor a token to begin with.
    """
    ids = _beginnings(model, tokenizer)[:, : context - 1]
    length = min(max(LENGTH, ids.shape[1] + LENGTH // 2), context)
    written = finish(written_in_steps(model, ids, length, _generator(model, seed)))
    yield from written.split(_BATCH)


def written_text(model: Any, tokenizer: Any = None, *, context: int, seed: int, length: int) -> Tensor:
    """(16, ``length``) int64: text drawn from ``model`` as `own_text` does, without the prompts that it answers.

    Args:
        model, tokenizer, seed: see `own_text`.
        context: bound on prompt and text together. Of a prompt that is too long for it the end is used.
        length: tokens that are written, at most ``context`` - 1.

    Raises:
        ValueError: as `own_text`, and if ``length`` is out of range.
    """
    check_whole("length", length, 1, context - 1)
    ids = _beginnings(model, tokenizer)
    ids = ids[:, -min(ids.shape[1], context - length) :]
    written = finish(written_in_steps(model, ids, ids.shape[1] + length, _generator(model, seed)))
    return written[:, ids.shape[1] :]


def _generator(model: Any, seed: int) -> torch.Generator:
    return torch.Generator(device=next(model.parameters()).device).manual_seed(seed)


def _beginnings(model: Any, tokenizer: Any) -> Tensor:
    """(16, P) int64: what the sequences begin with."""
    prompts = _prompts(model, tokenizer)
    # All are written together: a step of decoding takes about as long for 16 sequences as for 4. Prompts are cut to the
    # shortest: what is lost is the beginning of the template.
    rows = [prompts[row % len(prompts)] for row in range(SEQUENCES)]
    shortest = min(map(len, rows))
    return torch.tensor([row[-shortest:] for row in rows], device=next(model.parameters()).device)


def _prompts(model: Any, tokenizer: Any) -> Sequence[list[int]]:
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": f"Write about {topic}."}], add_generation_prompt=True, tokenize=False
            )
            for topic in TOPICS
        ]
        return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    if (token := first_token(model)) is not None:
        return [[token]]
    raise ValueError(
        "batches must be given for a model whose config names no bos_token_id or eos_token_id to begin a text with "
        "(or tokenizer, one with a chat template)"
    )


def first_token(model: Any) -> int | None:
    """The token that begins a text, by the config of ``model``; None if it names none."""
    config: Any = getattr(model, "config", None)
    # In a model with a vision tower the language model has a config of its own.
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("bos_token_id", "eos_token_id"):
        for each in (config, text):
            token = getattr(each, name, None)
            token = token[0] if isinstance(token, (list, tuple)) and token else token
            if isinstance(token, int) and 0 <= token < words_of(model):
                return token
    return None


def words_of(model: Any) -> int:
    """The number of tokens that ``model`` knows."""
    return model.get_input_embeddings().num_embeddings


def written_in_steps(model: Any, ids: Tensor, length: int, generator: torch.Generator) -> Generator[None, None, Tensor]:
    """``ids`` (B, P) continued to ``length`` tokens that are drawn from the model, a token in each step.

    Raises:
        FloatingPointError: if a logit is not finite.
    """
    cache, step = None, ids
    while ids.shape[1] < length:
        with torch.no_grad():
            out = model(input_ids=step, **cached(model, cache))
        cache, logits = cache_of(out), out.logits[:, -1].float()
        require_finite(model, logits)
        step = draw_tokens(logits.softmax(-1), generator).unsqueeze(1)
        ids = torch.cat([ids, step], 1)
        yield
    return ids
