"""Text that a model writes itself, to measure what it knows where no data that it knows is at hand."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.learn.draw import draw_tokens
from ttt.learn.huggingface import cache_of, cached
from ttt.steps import finish

TOPICS = (
    "the history of Rome", "how plants grow", "cooking pasta", "the solar system", "computer programming", "music",
    "the geography of Africa", "the human body", "a short story about a dog", "economics", "football", "the weather",
    "mathematics", "a letter to a friend", "an ordinary day at work", "animals of the sea",
)  # fmt: skip
"""What a model with a chat template is asked to write about."""

SEQUENCES, LENGTH, _BATCH = 16, 256, 4


def own_text(model: Any, tokenizer: Any = None, *, context: int, seed: int, length: int = LENGTH) -> Iterator[Tensor]:
    """Batches of text drawn from ``model``: 16 sequences of ``length`` tokens, in batches of 4.

    Tokens are drawn from the model's whole distribution (temperature 1), so that the text has the variety of what the
    model was trained on. It is written without regard to tokens that end a text.

    Args:
        model: a transformers causal language model in eval mode.
        tokenizer: with a chat template: each sequence answers a request to write about one of `TOPICS`. None, or a
            tokenizer without a template: each begins with the model's token for the beginning of a text.
        context: bound on the length.
        seed: of the draws.
        length: tokens of a sequence, with what it begins with.

    Raises:
        ValueError: if there is neither a chat template nor a token to begin with.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    prompts = _prompts(model, tokenizer)
    # All are written together: a step of decoding takes about as long for 16 sequences as for 4. Prompts are cut to the
    # shortest: what is lost is the beginning of the template.
    rows = [prompts[row % len(prompts)] for row in range(SEQUENCES)]
    shortest = min(map(len, rows))
    ids = torch.tensor([row[-shortest:] for row in rows], device=device)
    written = finish(written_in_steps(model, ids[:, : context - 1], min(length, context), generator))
    yield from written.split(_BATCH)


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
        cache, p = cache_of(out), out.logits[:, -1].float().softmax(-1)
        if not bool(torch.isfinite(p).all()):
            raise FloatingPointError("the model's logits are not finite, so that no text can be drawn from them")
        step = draw_tokens(p, generator).unsqueeze(1)
        ids = torch.cat([ids, step], 1)
        yield
    return ids
