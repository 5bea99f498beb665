"""Whether a model goes on from its cache: some recurrent models of transformers begin anew with every chunk."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ttt.learn.huggingface import cache_of, cached

_FIRST, _THEN = 9, 8  # tokens of the two chunks of the trial
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative error of the logits; of 16-bit models 0.1


@torch.no_grad()
def refuse_restarting(model: Any, chunk: int, context: int) -> None:
    """Raise ValueError if ``model`` has recurrent states that it does not go on from.

    It reads a few tokens in one piece, and in two chunks with a cache. Models whose cache holds keys and values only
    are not tried, nor are those whose segments have one chunk.

    Args:
        chunk: tokens of a chunk, at most. context: tokens of a segment, at most.
    """
    if chunk >= context:
        return
    device = next(model.parameters()).device
    words = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, words, (1, _FIRST + _THEN), generator=torch.Generator().manual_seed(0)).to(device)
    out = model(input_ids=ids[:, :_FIRST], **cached(model, None))
    if not _recurrent(cache_of(out)):
        return
    found = model(input_ids=ids[:, _FIRST:], **cached(model, cache_of(out))).logits
    wanted = model(input_ids=ids, use_cache=False).logits[:, _FIRST:]
    error = float((found - wanted).norm() / wanted.norm())
    if math.isfinite(error) and error > _TOLERANCE.get(wanted.dtype, 0.1):
        raise ValueError(
            f"model ({type(model).__name__}) does not go on from its cache in this release of transformers: in chunks "
            f"it computes something else than in one piece (relative error {error:.2g}), as if the text began anew. "
            f"Make chunk = {chunk} at least as large as the learner's context of {context} tokens, so that each text "
            "is read in one piece, or learn by ttt.learning(model)"
        )


def _recurrent(cache: Any) -> bool:
    """Whether a layer of ``cache`` holds states in dictionaries, as those of recurrent blocks are."""
    states = [value for layer in getattr(cache, "layers", []) for value in vars(layer).values()]
    return any(isinstance(t, Tensor) for value in states if isinstance(value, dict) for t in value.values())
