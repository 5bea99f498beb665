"""`lact` and `in_place_ttt`, whose fast weights change at the ends of large chunks, and their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.ops.dtypes import accumulation
from ttt.ops.sequence import cpu_steps, kernels, large_chunk, large_chunk_reference
from ttt.ops.sequence.checks import (
    Form,
    bounds_of,
    check_count,
    check_form,
    check_positions,
    check_shape,
    check_state,
    check_tokens,
    refuse_gradients,
    sequences,
)
from ttt.ops.sequence.states import LargeChunkState, by_position, for_sequences, over_sequences, own


def lact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    weights: Sequence[Tensor],
    *,
    momentum: Tensor | None = None,
    chunk_size: int = 512,
    orthogonal: bool = True,
    scale: float | None = None,
    initial_state: LargeChunkState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, LargeChunkState | None]:
    """LaCT's fast weights (Zhang et al. 2025): a SwiGLU that is updated after each chunk, and read in the next.

    The formulas are those of `ttt.ops.sequence.large_chunk`. What is in the present chunk does not affect its outputs:
    LaCT has window attention beside this op for that.

    Args:
        q, k, v: (B, T, H, D), of one dtype: float32, bfloat16, float16 or float64. T may be 0.
        rates: (B, T, H, 3), any floating-point dtype, at least 0: a rate for each of the three weights.
        weights: W_0 (H, D, F), W_1 (H, F, D), W_2 (H, D, F) of a new sequence.
        momentum: (B, T, H) in [0, 1]; None for none.
        chunk_size: tokens of a chunk. A text of any length may be read in any pieces.
        orthogonal: whether updates are orthogonalised by Newton-Schulz steps.
        scale: of q; 1 by default.
        initial_state, output_final_state, cu_seqlens: as in `memory`.
        form: "auto" takes a kernel on CPUs where no gradients are needed and a head's weight has at most 65,536
            numbers, and the torch form otherwise; "chunk" always takes the torch form, "reference" goes token by token.

    Returns:
        (B, T, H, D) in the dtype of q, and the final state, or None. Sums and states are float32 (float64 for
        float64). Every form can be differentiated.

    Raises:
        TypeError, ValueError: for a wrong argument.
    """
    check_tokens(q, k, v)
    _check_swiglu(weights, q, v)
    options = (momentum, chunk_size, scale, initial_state, output_final_state, cu_seqlens, form)
    functions = (large_chunk.swiglu, large_chunk.swiglu_updates)
    return _run("lact", q, k, v, rates, weights, options, *functions, orthogonal, True)


def lact_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    *,
    state: LargeChunkState,
    momentum: Tensor | None = None,
    chunk_size: int = 512,
    orthogonal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """One token of `lact`; the tensors of ``state`` become those after it, in place.

    Args:
        q, k, v: (B, H, D); rates: (B, H, 3); momentum: (B, H); as in `lact`.
        state: as `lact` returns it, or `new_large_chunk_state`. Its rows may be at different positions.

    Returns:
        (B, H, D) in the dtype of q.

    Raises:
        TypeError, ValueError: for a wrong argument; ``state`` is as it was then.
        RuntimeError: if grad mode is on and an argument requires grad (the step has no derivative).
    """
    token = large_chunk.swiglu_token
    return _step(q, k, v, rates, momentum, state, chunk_size, scale, token, orthogonal, 3, "lact_step")


def in_place_ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    weight: Tensor,
    *,
    chunk_size: int = 512,
    scale: float | None = None,
    initial_state: LargeChunkState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, LargeChunkState | None]:
    """In-Place TTT's fast weight (2026): o_t = scale W^T q_t; after each chunk, W <- W + sum of rate_t k_t v_t^T.

    Args:
        q, k: (B, T, H, I): the inputs of the weight, and those that are learnt.
        v: (B, T, H, O), the targets.
        rate: (B, T, H).
        weight: (H, I, O) of a new sequence, such as a pretrained ``down_proj`` transposed, with H = 1.
        chunk_size, scale, initial_state, output_final_state, cu_seqlens, form: as in `lact`.

    Returns:
        (B, T, H, O) in the dtype of q, and the final state, or None.

    Raises:
        TypeError, ValueError: for a wrong argument.
    """
    check_tokens(q, k, v)
    check_shape("rate", rate, tuple(q.shape[:3]), q.device)
    check_shape("weight", weight, (q.shape[2], q.shape[3], v.shape[3]), q.device)
    if weight is None:
        raise TypeError("weight must be a tensor, got None")
    options = (None, chunk_size, scale, initial_state, output_final_state, cu_seqlens, form)
    functions = (large_chunk.linear, large_chunk.linear_updates)
    return _run("in_place_ttt", q, k, v, rate.unsqueeze(-1), [weight], options, *functions, False, False)


def in_place_ttt_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    *,
    state: LargeChunkState,
    chunk_size: int = 512,
    scale: float | None = None,
) -> Tensor:
    """One token of `in_place_ttt`; the tensors of ``state`` become those after it, in place.

    Args:
        q, k: (B, H, I); v: (B, H, O); rate: (B, H); as in `in_place_ttt`.
        state: as `in_place_ttt` returns it, or `new_large_chunk_state`.

    Returns:
        (B, H, O) in the dtype of q.

    Raises:
        TypeError, ValueError: for a wrong argument; ``state`` is as it was then.
        RuntimeError: if grad mode is on and an argument requires grad (the step has no derivative).
    """
    token = large_chunk.linear_token
    return _step(q, k, v, rate, None, state, chunk_size, scale, token, False, 1, "in_place_ttt_step")


def new_large_chunk_state(
    weights: Sequence[Tensor], batch: int, momentum: bool = False, norms: bool = False
) -> LargeChunkState:
    """The state of ``batch`` new sequences, which begin with ``weights`` (H, I, O).

    Args:
        momentum: whether there is a velocity. norms: whether columns keep their norms; both as in `lact`.
    """
    begun = tuple(for_sequences(w, batch) for w in weights)
    zeros = tuple(torch.zeros_like(w) for w in begun)
    return LargeChunkState(
        begun,
        zeros,
        tuple(torch.zeros_like(w) for w in begun) if momentum else (),
        tuple(w.norm(dim=-2, keepdim=True) for w in begun) if norms else (),
        begun[0].new_zeros(batch, begun[0].shape[1]) if momentum else None,
        torch.zeros(batch, dtype=torch.int64, device=begun[0].device),
    )


def _run(name, q, k, v, rates, weights, options, forward, updates, orthogonal, norms):
    momentum, chunk_size, scale, initial_state, output_final_state, cu_seqlens, form = options
    check_count("chunk_size", chunk_size)
    check_form(form)
    batch, tokens, heads = q.shape[:3]
    check_shape("rates", rates, (batch, tokens, heads, len(weights)), q.device)
    check_shape("momentum", momentum, (batch, tokens, heads), q.device)
    bounds = bounds_of(cu_seqlens, batch, tokens)
    rows = sequences(bounds, batch)
    dtype = accumulation(q.dtype)
    if initial_state is None:
        state = new_large_chunk_state([w.to(dtype) for w in weights], rows, momentum is not None, norms)
    else:
        shapes = [tuple(w.shape) for w in weights]
        check_state(
            initial_state, LargeChunkState, _form(shapes, dtype, momentum is not None, norms), rows, q.device
        )  # fmt: skip
        check_positions("chunk_size", initial_state.position, chunk_size)
        state = initial_state
    scale = 1.0 if scale is None else float(scale)
    if form == "auto" and (kernel := kernels.large_chunk(name, q, k, v, rates, momentum, state)):
        begins = None if bounds is None else torch.tensor(bounds)
        out, final = kernel(begins, chunk_size, orthogonal, scale)
        return out, final if output_final_state else None
    if initial_state is not None:
        state = own(state)  # the final state may hold some of its tensors, which steps change
    wide: Any = tuple(None if t is None else t.to(dtype) for t in (q, k, v, rates, momentum))
    wide = (wide[0] * scale, *wide[1:])

    def run(tensors: Any, state: Any) -> Any:
        if form == "reference":
            given: Any = (*tensors, state, forward, chunk_size, orthogonal)
            return large_chunk_reference.recurrent(*given)

        def at_position(tensors: Any, state: Any, position: int) -> Any:
            given: Any = (*tensors, state, forward, updates, chunk_size, orthogonal, position)
            return large_chunk.chunked(*given)

        return at_position(tensors, state, 0) if initial_state is None else by_position(at_position, tensors, state)

    out, final = over_sequences(run, wide, state, bounds)
    return out.to(q.dtype), final if output_final_state else None


def _step(q, k, v, rates, momentum, state, chunk_size, scale, token, orthogonal, count, name):
    if found := cpu_steps.large_chunk(q, k, v, rates, momentum, state, count, chunk_size, scale):
        out, full = found
        if full:
            large_chunk.end_full_(state, chunk_size, orthogonal)
        return out
    check_tokens(q, k, v, dims=3)
    check_count("chunk_size", chunk_size)
    batch, heads = q.shape[:2]
    if count == 1:
        check_shape("rate", rates, (batch, heads), q.device)
        rates = rates.unsqueeze(-1) if isinstance(rates, Tensor) else rates
    else:
        check_shape("rates", rates, (batch, heads, count), q.device)
    check_shape("momentum", momentum, (batch, heads), q.device)
    if not isinstance(state, LargeChunkState) or len(state.weights) != count:
        raise TypeError(f"state must be a LargeChunkState of {count} weights, got {type(state).__name__}")
    dtype = accumulation(q.dtype)
    shapes = [tuple(w.shape[1:]) for w in state.weights]
    check_state(
        state, LargeChunkState, _form(shapes, dtype, momentum is not None, bool(state.norms)), batch, q.device
    )  # fmt: skip
    if state.weights[0].shape[-2] != q.shape[-1] or (count == 1 and state.weights[0].shape[-1] != v.shape[-1]):
        shape = tuple(state.weights[0].shape)
        raise ValueError(f"state's weights must fit q and v, {q.shape[-1]} and {v.shape[-1]} wide, got {shape}")
    refuse_gradients(name, q, k, v, rates, momentum, *state.weights)
    scale = 1.0 if scale is None else float(scale)
    if kernel := kernels.large_chunk_step(name, q, state):
        held = (state.weights, state.sums, state.momentum, state.position)
        out = kernel(q, k, v, rates, momentum, *held, scale)
        large_chunk.end_full_(state, chunk_size, orthogonal)
        return out
    wide: Any = [None if t is None else t.to(dtype) for t in (q, k, v, rates, momentum)]
    given: Any = (wide[0] * scale, *wide[1:], state, token, chunk_size, orthogonal)
    return large_chunk.step_(*given).to(q.dtype)


def _form(shapes: list[tuple[int, ...]], dtype: torch.dtype, momentum: bool, norms: bool) -> Form:
    """The `Form` of a `LargeChunkState` whose weights have these shapes."""
    parts: Form = [(shape, dtype) for shape in shapes]
    kept: Form = [((shape[0], 1, shape[2]), dtype) for shape in shapes] if norms else []
    moving: Form = [(shapes[0][:1], dtype)] if momentum else []
    return [*parts, *parts, *(parts if momentum else []), *kept, *moving, ((), torch.int64)]


def _check_swiglu(weights, q, v):
    heads, width = q.shape[2:]
    if len(weights) != 3 or not isinstance(weights[0], Tensor) or weights[0].dim() != 3:
        raise ValueError(f"weights must be three tensors (H, D, F), (H, F, D), (H, D, F), got {len(weights)}")
    if v.shape[-1] != width:
        raise ValueError(f"v must have the width of q, {width}, got {v.shape[-1]}")
    inner = weights[0].shape[-1]
    for n, (w, shape) in enumerate(zip(weights, [(width, inner), (inner, width), (width, inner)], strict=True)):
        check_shape(f"weights[{n}]", w, (heads, *shape), q.device)
