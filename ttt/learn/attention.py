"""The gradients of attention in a learning step on the CPU, from a kernel that suits the few tokens of a chunk.

torch's backward pass of attention also computes gradients for the keys of earlier chunks, which come from the cache and
need none, and it does so for each head of queries that shares a head of keys. Here the outputs are what transformers
computes, to the bit, and `ttt.ops.cpu.attention_backward` makes the gradients. It applies where a model's attention is
transformers' own "sdpa" on plain tensors; everywhere else torch's is used, and `ttt.info()` reports why.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ttt.ops import cpu
from ttt.ops.backends import record
from ttt.ops.modes import must_call_ops

_NAME = "sdpa"  # of the attention whose gradients are replaced, in transformers' table
# The arguments that transformers' function reads. It may get others by name, which it ignores.
_READ = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "position_bias"}
_MOST_KEYS = 16384  # the kernel keeps some hundred numbers of each in float32

_lock = threading.Lock()
_open = 0  # how many blocks of `kernel_attention` have replaced the function, in all threads
_original: Any = None  # transformers' function
_inside = threading.local()


@contextlib.contextmanager
def kernel_attention() -> Iterator[None]:
    """Inside, attention of transformers models that is computed in this thread gets its gradients from the kernel.

    transformers has one table of attention functions for all threads. Others get from it what they got before.
    """
    global _open, _original
    with _lock:
        table, function, why = _found()
        if not why:
            _original, _open = function, _open + 1
            table[_NAME] = _attention
    if why:
        record("attention_backward", "torch", why)
        yield
        return
    before, _inside.here = getattr(_inside, "here", False), True
    try:
        yield
    finally:
        _inside.here = before
        with _lock:
            _open -= 1
            if not _open and table._local_mapping.get(_NAME) is _attention:
                del table[_NAME]


def _found() -> tuple[Any, Any, str]:
    """transformers' table of attention functions, its own function in it, and why that cannot be replaced, if so."""
    if why := cpu.why_not(torch.float32):
        return None, None, why
    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward as own
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table
    except ImportError:
        return None, None, "this release of transformers has no table of attention functions"
    held = getattr(table, "_local_mapping", None)
    if held is None or not _reads(own) <= _READ:
        return None, None, "this release of transformers has another attention function"
    if held.get(_NAME, own) not in (own, _attention) or (_NAME not in held and table.get(_NAME) is not own):
        return None, None, "another function has replaced transformers' attention"
    return table, own, ""


@functools.cache
def _reads(function: Any) -> set[str]:
    """The names of the arguments that ``function`` reads."""
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD}


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args, **kwargs) -> Any:
    """What transformers' function returns for the same arguments."""
    given = module, query, key, value, attention_mask, *args
    if must_call_ops() or not getattr(_inside, "here", False) or not torch.is_grad_enabled() or query.is_cuda:
        return _original(*given, **kwargs)
    if not (query.requires_grad or key.requires_grad or value.requires_grad):
        return _original(*given, **kwargs)
    if why := _unfit(module, query, key, value, attention_mask, args, kwargs):
        record("attention_backward", "torch", why)
        return _original(*given, **kwargs)
    record("attention_backward", "cpu")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scale = kwargs.get("scaling")
    options = {
        "causal": bool(causal) and attention_mask is None and query.shape[2] > 1,
        "scale": query.shape[-1] ** -0.5 if scale is None else float(scale),
        "first": min(_constant_rows(key), _constant_rows(value)),
    }
    return _Attention.apply(query, key, value, attention_mask, options, module, kwargs), None


def _unfit(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, args: tuple, options: dict) -> str:
    """Why the kernel cannot make the gradients; empty if it can."""
    parts = query, key, value
    if any(type(t) is not Tensor or not t.is_cpu or t.ndim != 4 for t in parts):
        return "tensors that are not plain ones on the CPU"
    if query.dtype not in (torch.float32, torch.bfloat16) or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"queries, keys and values of {', '.join(str(t.dtype) for t in parts)}"
    if args or options.get("dropout") or options.get("position_bias") is not None or options.get("softcap") is not None:
        return "dropout, a bias of positions or a softcap"
    scale = options.get("scaling")
    if scale is not None and not (isinstance(scale, float | int) and scale > 0):
        return "a scale that is no number above 0"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    batch, heads, queries, width = query.shape
    groups = getattr(module, "num_key_value_groups", 1)
    if key.shape != (batch, heads // groups, key.shape[2], width) or value.shape[:3] != key.shape[:3]:
        return "queries, keys and values of shapes that do not fit"
    if heads % groups or not all(t.numel() for t in parts) or key.shape[2] > _MOST_KEYS:
        return f"no keys, or more than {_MOST_KEYS}"
    if mask is None:
        return ""
    if type(mask) is not Tensor or mask.dtype != torch.bool:
        return "a mask that is not of bool"
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
    return "" if fits and mask.shape[2:] == (queries, key.shape[2]) else "a mask of another shape"


def _constant_rows(t: Tensor) -> int:
    """How many of the first rows of ``t`` (B, G, K, D) are known to need no gradient: those that a cache held before.

    A cache makes the keys and values of a chunk by joining those it holds, which need no gradient, and the new ones.
    """
    node = t.grad_fn
    if node is None or not node.name().startswith("CatBackward") or len(node.next_functions) != 2:
        return 0
    (held, _), (new, at) = node.next_functions
    shapes = [] if held is not None or new is None else getattr(new, "_input_metadata", [])
    if at >= len(shapes):
        return 0
    batch, heads, rows, width = t.shape
    shape = tuple(shapes[at].shape)
    return rows - shape[2] if len(shape) == 4 and shape == (batch, heads, shape[2], width) else 0


class _Attention(torch.autograd.Function):
    """transformers' function, with the gradients of `ttt.ops.cpu.attention_backward`."""

    @staticmethod
    def forward(ctx, query, key, value, mask, options, module, kwargs):
        ctx.save_for_backward(query, key, value, mask)
        ctx.options = options
        return _original(module, query, key, value, mask, **kwargs)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, mask = ctx.saved_tensors
        gradients = cpu.attention_backward(query, key, value, grad.transpose(1, 2), mask, **ctx.options)
        return *gradients, None, None, None, None
