"""Whether a model can be read chunk by chunk: it sees no later tokens, goes on from its cache, and leaves padding out.

Encoders such as BERT see later tokens, which would be scored as if they had been predicted. Some recurrent models of
transformers begin anew with every chunk. Some decoders count positions through padding.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttt.learn.huggingface import cache_of, cached, masked_inputs
from ttt.learn.text import Text
from ttt.nn.base import Adapted

_FIRST, _THEN = 9, 8  # tokens of the two chunks of the trial
_PADDING = 3
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative error of the logits; of 16-bit models 0.1

# Model -> (its structure, the trials that it has passed), so that the next learner of the model need not repeat them.
_passed: weakref.WeakKeyDictionary[nn.Module, tuple[Any, set[str]]] = weakref.WeakKeyDictionary()


def trials_for(text: Text, chunk: int, context: int, chooses: bool = False) -> set[str]:
    """Names of what a model must be able to do to read ``text`` in chunks of ``chunk`` tokens.

    Where each segment has one chunk, nothing need go on from a cache. Padding matters before a token only. ``chooses``:
    whether some rows of the text teach and others not, or not the same user.
    """
    wanted = {"causal"} | ({"goes on"} if chunk < context else set())
    if text.attend is not None and bool((text.attend[:, 1:] & ~text.attend[:, :-1]).any()):
        wanted.add("padding")
    return wanted | ({"rows"} if chooses else set())


def refuse_unreadable(model: Any, trials: set[str], chunk: int, context: int) -> None:
    """Raise ValueError if ``model`` sees later tokens, or computes something else in chunks or behind padding.

    Also if one of its layers that learn gets other rows than one for each token of a chunk, where it matters whose they
    are. It reads a few tokens in one piece, and again with another last one; in two chunks, if its cache holds
    recurrent states, and not keys and values only; and behind padding. What it has passed is not tried again while its
    structure is the same.

    Args:
        trials: from `trials_for`.
        chunk: tokens of a chunk, at most. context: tokens of a segment, at most.
    """
    structure = _structure(model)
    if model not in _passed or _passed[model][0] != structure:
        _passed[model] = structure, set()
    passed = _passed[model][1]
    if not trials <= passed:
        _try(model, trials - passed, chunk, context)
        passed |= trials


def _structure(model: nn.Module) -> Any:
    """What equals that of ``model`` at another time only if it was made of the same modules, with the same settings."""
    config: Any = getattr(model, "config", None)
    modules = [
        (name, type(module), "forward" in vars(module), len(module._forward_hooks) + len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    return modules, repr(config.to_dict()) if hasattr(config, "to_dict") else repr(config)


@torch.no_grad()
def _try(model: Any, trials: set[str], chunk: int, context: int) -> None:
    device = next(model.parameters()).device
    words = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, words, (1, _FIRST + _THEN), generator=torch.Generator().manual_seed(0)).to(device)
    wanted = model(input_ids=ids, **cached(model, None)).logits
    name = f"model ({type(model).__name__})"
    if "causal" in trials:
        other = ids.clone()
        other[:, -1] = (ids[:, -1] + 1) % words
        if _differ(model(input_ids=other, **cached(model, None)).logits[:, :-1], wanted[:, :-1]):
            raise ValueError(
                f"{name} sees later tokens, which it would be shown before they are scored; ttt.Learner reads causal "
                "language models (is_decoder=True in the configuration of BERT and its kin). ttt.learning(model) "
                "learns from any loss"
            )
    if "goes on" in trials:
        out = model(input_ids=ids[:, :_FIRST], **cached(model, None))
        if _recurrent(cache_of(out)):
            found = model(input_ids=ids[:, _FIRST:], **cached(model, cache_of(out))).logits
            if error := _differ(found, wanted[:, _FIRST:]):
                raise ValueError(
                    f"{name} does not go on from its cache in this release of transformers: in chunks it computes "
                    f"something else than in one piece (relative error {error:.2g}), as if the text began anew. Make "
                    f"chunk = {chunk} at least as large as the learner's context of {context} tokens, so that each "
                    "text is read in one piece, or learn by ttt.learning(model)"
                )
    if "rows" in trials:
        _refuse_other_rows(model, ids.split([_FIRST, _THEN], 1) if chunk < context else [ids])
    if "padding" in trials and (error := _differ(_behind_padding(model, ids), wanted)):
        raise ValueError(
            f"{name} computes something else behind padding than without it (relative error {error:.2g}): its "
            "positions cannot be given, or count through padding. Put padding on the right, or give texts of one length"
        )


def _refuse_other_rows(model: nn.Module, chunks: Sequence[Tensor]) -> None:
    """Raise ValueError unless each layer of ``model`` that learns gets one row for each token of the ``chunks``.

    Latent attention, as that of DeepSeek, computes keys and values of all tokens in the cache anew.
    """
    seen: Counter[str] = Counter()

    def count(name: str, layer: nn.Module, args: Any) -> None:
        seen[name] += args[0].shape[:-1].numel()

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Adapted) and not getattr(m, "routed", 0)]
    hooks = [layer.register_forward_pre_hook(functools.partial(count, name)) for name, layer in layers]
    try:
        cache: Any = None
        for chunk in chunks:
            seen.clear()
            cache = cache_of(model(input_ids=chunk, **cached(model, cache)))
            for name, rows in seen.items():
                if rows != chunk.shape[1]:
                    raise ValueError(
                        f"{name} gets {rows} rows for the {chunk.shape[1]} tokens of a chunk: where users have weights "
                        "of their own, or a mask says which tokens teach, layers must get one row for each token; "
                        "leave it out of target_modules"
                    )
    finally:
        for hook in hooks:
            hook.remove()


def _behind_padding(model: Any, ids: Tensor) -> Tensor:
    """The logits of ``ids`` (1, T) behind padding, (1, T, V)."""
    padded = torch.cat([ids[:, -_PADDING:], ids], 1)
    attend = torch.ones_like(padded, dtype=torch.bool)
    attend[:, :_PADDING] = False
    inputs = masked_inputs(attend, padded.shape[1])
    return model(input_ids=padded, **inputs, **cached(model, None)).logits[:, _PADDING:]


def _recurrent(cache: Any) -> bool:
    """Whether a layer of ``cache`` holds states in dictionaries, as those of recurrent blocks are."""
    held = [value for layer in getattr(cache, "layers", []) for value in vars(layer).values()]
    return any(isinstance(t, Tensor) for value in held if isinstance(value, dict) for t in value.values())


def _differ(found: Tensor, wanted: Tensor) -> float:
    """The relative error of ``found``, if it is larger than rounding makes it; else 0."""
    error = float((found - wanted).norm() / wanted.norm())
    return error if math.isfinite(error) and error > _TOLERANCE.get(wanted.dtype, 0.1) else 0.0
