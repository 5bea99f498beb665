"""Whether a model can be read chunk by chunk: it sees no later tokens, and goes on from its cache.

Encoders such as BERT see later tokens, which would be scored as if they had been predicted. Some recurrent models of
transformers begin anew with every chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ttt.learn.huggingface import cache_of, cached

_FIRST, _THEN = 9, 8  # tokens of the two chunks of the trial
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative error of the logits; of 16-bit models 0.1


@torch.no_grad()
def refuse_unreadable(model: Any, chunk: int, context: int) -> None:
    """Raise ValueError if ``model`` sees later tokens, or computes something else in chunks than in one piece.

    It reads a few tokens in one piece, and again with another last one; if its cache holds recurrent states, and not
    keys and values only, also in two chunks. Where each segment has one chunk, nothing need go on from a cache.

    Args:
        chunk: tokens of a chunk, at most. context: tokens of a segment, at most.
    """
    device = next(model.parameters()).device
    words = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, words, (1, _FIRST + _THEN), generator=torch.Generator().manual_seed(0)).to(device)
    wanted = model(input_ids=ids, **cached(model, None)).logits
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % words
    if _differ(model(input_ids=other, **cached(model, None)).logits[:, :-1], wanted[:, :-1]):
        raise ValueError(
            f"model ({type(model).__name__}) sees later tokens, which it would be shown before they are scored; "
            "ttt.Learner reads causal language models (is_decoder=True in the configuration of BERT and its kin). "
            "ttt.learning(model) learns from any loss"
        )
    if chunk >= context:
        return
    out = model(input_ids=ids[:, :_FIRST], **cached(model, None))
    if not _recurrent(cache_of(out)):
        return
    found = model(input_ids=ids[:, _FIRST:], **cached(model, cache_of(out))).logits
    if error := _differ(found, wanted[:, _FIRST:]):
        raise ValueError(
            f"model ({type(model).__name__}) does not go on from its cache in this release of transformers: in chunks "
            f"it computes something else than in one piece (relative error {error:.2g}), as if the text began anew. "
            f"Make chunk = {chunk} at least as large as the learner's context of {context} tokens, so that each text "
            "is read in one piece, or learn by ttt.learning(model)"
        )


def _recurrent(cache: Any) -> bool:
    """Whether a layer of ``cache`` holds states in dictionaries, as those of recurrent blocks are."""
    held = [value for layer in getattr(cache, "layers", []) for value in vars(layer).values()]
    return any(isinstance(t, torch.Tensor) for value in held if isinstance(value, dict) for t in value.values())


def _differ(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error of ``found``, if it is larger than rounding makes it; else 0."""
    error = float((found - wanted).norm() / wanted.norm())
    return error if math.isfinite(error) and error > _TOLERANCE.get(wanted.dtype, 0.1) else 0.0
