"""`memory` and its step, of which TTT-Linear, TTT-MLP and Titans are cases: checks and the choice of a form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.ops.dtypes import accumulation
from ttt.ops.sequence import cpu_steps, dual_form, kernels, memory_texts
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
from ttt.ops.sequence.dual_form import Norm
from ttt.ops.sequence.states import MemoryState, changes_in_place, for_sequences, own


def memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    weights: Sequence[Tensor],
    *,
    gate: Tensor | None = None,
    momentum: Tensor | None = None,
    norm: Norm | None = None,
    mini_batch: int = 16,
    scale: float | None = None,
    initial_state: MemoryState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, MemoryState | None]:
    """A memory that is trained on the tokens it reads, and read with the queries: o_t = f(scale q_t; W_t).

    The formulas are those of `ttt.ops.sequence.dual_form`: one or more linear layers with GELU between them, an inner
    layer norm and residual if ``norm`` is given, gradients of |f(k_t) - v_t|^2 / 2 at the first weights of each
    mini-batch, a rate and optionally a gate and a momentum for each token. `ttt_linear`, `ttt_mlp` and `titans` are
    cases of it.

    Args:
        q, k, v: (B, T, H, D), of one dtype: float32, bfloat16, float16 or float64. T may be 0.
        rate: (B, T, H), any floating-point dtype, at least 0.
        weights: W_1, b_1, W_2, b_2, ... of a new sequence: (H, I, O) and (H, O), with D at both ends.
        gate: (B, T, H) in [0, 1], what is kept of the weights; None for 1.
        momentum: (B, T, H) in [0, 1), what is kept of the velocity; None for no velocity.
        norm: `Norm` of weight and bias (H, D); None for neither norm nor residual.
        mini_batch: b, tokens whose gradients are taken at the same weights. A text of any length may be read in any
            pieces: the state knows how far its mini-batch is.
        scale: of q; 1 by default.
        initial_state: of the sequences so far; by default ``weights`` begin new ones.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: (N + 1,), where each of N packed sequences begins, and T. B must be 1 then, and the states have N
            rows.
        form: "auto" takes a kernel of the device where there is one, and the dual form otherwise; with gradients there
            is one on CPUs, for states between two mini-batches. "chunk" always takes the dual form, "reference" goes
            token by token.

    Returns:
        (B, T, H, D) in the dtype of q, and the final state, or None. Sums and states are float32 (float64 for
        float64). All can be differentiated, by the state and its first weights too, and any number of times.

    Raises:
        TypeError, ValueError: for a wrong argument.
    """
    check_tokens(q, k, v)
    check_count("mini_batch", mini_batch)
    check_form(form)
    batch, tokens, heads, width = q.shape
    for name, t in (("rate", rate), ("gate", gate), ("momentum", momentum)):
        check_shape(name, t, (batch, tokens, heads), q.device)
    norm = _checked_model(weights, norm, heads, width, q.device, v)
    bounds = bounds_of(cu_seqlens, batch, tokens)
    rows = sequences(bounds, batch)
    dtype = accumulation(q.dtype)
    if initial_state is None:
        state = new_memory_state([w.to(dtype) for w in weights], rows, momentum is not None)
    else:
        shapes = [tuple(w.shape) for w in weights]
        check_state(initial_state, MemoryState, _form(shapes, dtype, momentum is not None), rows, q.device)
        state = initial_state
    scale = 1.0 if scale is None else float(scale)
    if form == "auto":
        begun = initial_state is not None
        kernel = kernels.memory(q, k, v, rate, gate, momentum, norm, state, mini_batch, begun)
        if kernel:
            begins = None if bounds is None else torch.tensor(bounds)
            out, final = kernel(state, begins, mini_batch, scale)
            return out, final if output_final_state else None
    if initial_state is not None:
        check_positions("mini_batch", state.position, mini_batch)
        state = own(state)  # the final state may hold some of its tensors, which steps change
    position, reference = (0 if initial_state is None else None), form == "reference"
    given: Any = (q, k, v, rate, gate, momentum, norm, state, bounds, mini_batch, scale, position, reference)
    out, final = memory_texts.texts(*given)
    return out, final if output_final_state else None


def memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    *,
    state: MemoryState,
    gate: Tensor | None = None,
    momentum: Tensor | None = None,
    norm: Norm | None = None,
    mini_batch: int = 16,
    scale: float | None = None,
) -> Tensor:
    """One token of `memory`; the tensors of ``state`` become those after it, in place.

    Args:
        q, k, v: (B, H, D); rate, gate, momentum: (B, H); as in `memory`.
        state: as `memory` returns it, or `new_memory_state`; contiguous. Its rows may be at different positions. A
            mini-batch that is longer already than ``mini_batch`` ends with this token.

    Returns:
        (B, H, D) in the dtype of q.

    Raises:
        TypeError, ValueError: for a wrong argument; ``state`` is as it was then.
        RuntimeError: if grad mode is on and an argument requires grad (the step has no derivative).
    """
    found = cpu_steps.memory(q, k, v, rate, gate, momentum, norm, state, mini_batch, scale)
    if found is not None:
        return found
    check_tokens(q, k, v, dims=3)
    check_count("mini_batch", mini_batch)
    batch, heads, width = q.shape
    for name, t in (("rate", rate), ("gate", gate), ("momentum", momentum)):
        check_shape(name, t, (batch, heads), q.device)
    if not isinstance(state, MemoryState):
        raise TypeError(f"state must be a MemoryState, got {type(state).__name__}")
    first = [w[0] if len(w) else w.new_empty(w.shape[1:]) for w in state.weights]
    norm = _checked_model(first, norm, heads, width, q.device, v)
    dtype = accumulation(q.dtype)
    shapes = [tuple(w.shape[1:]) for w in state.weights]
    check_state(state, MemoryState, _form(shapes, dtype, momentum is not None), batch, q.device)
    for name in ("weights", "start", "velocity"):
        if not all(map(changes_in_place, getattr(state, name))):
            raise ValueError(
                f"state.{name} must be contiguous and no negative views, because they are changed in place"
            )
    refuse_gradients("memory_step", q, k, v, rate, gate, momentum, *state.weights)
    scale = 1.0 if scale is None else float(scale)
    if kernel := kernels.memory_step(q, k, v, rate, gate, momentum, norm, state):
        return kernel(state, mini_batch, scale)
    wide: Any = [None if t is None else t.to(dtype) for t in (q * scale, k, v, rate, gate, momentum)]
    wide_norm = None if norm is None else Norm(norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
    given: Any = (*wide, state, wide_norm, mini_batch)
    return dual_form.step_(*given).to(q.dtype)


def new_memory_state(weights: Sequence[Tensor], batch: int, momentum: bool = False) -> MemoryState:
    """The state of ``batch`` new sequences, which begin with ``weights`` (W_1, b_1, ...), (H, I, O) and (H, O)."""
    begun = tuple(for_sequences(w, batch) for w in weights)
    velocity = tuple(torch.zeros_like(w) for w in begun) if momentum else ()
    position = torch.zeros(batch, dtype=torch.int64, device=weights[0].device)
    start = tuple(w.clone() for w in begun)
    return MemoryState(begun, start, velocity, position)


def ttt_linear(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, weight: Tensor, bias: Tensor, norm: Norm, **options
) -> tuple[Tensor, MemoryState | None]:
    """TTT-Linear (Sun et al. 2024): `memory` of one linear layer with an inner layer norm and residual.

    Args:
        weight, bias: (H, D, D), (H, D), the first weights.
        norm: `Norm` of weight and bias (H, D).
        options: ``mini_batch``, ``scale``, ``initial_state``, ``output_final_state``, ``cu_seqlens`` and ``form``
            of `memory`, where the other arguments are described too.
    """
    return memory(q, k, v, rate, (weight, bias), norm=norm, **options)


def ttt_mlp(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, weights: Sequence[Tensor], norm: Norm, **options
) -> tuple[Tensor, MemoryState | None]:
    """TTT-MLP (Sun et al. 2024): `memory` of two linear layers with an inner layer norm and residual.

    Args:
        weights: (H, D, F), (H, F), (H, F, D), (H, D); F is 4 D in the paper.
        norm, options: as of `ttt_linear`.
    """
    if len(weights) != 4:
        raise ValueError(f"weights must be two weights and two biases, got {len(weights)} tensors")
    return memory(q, k, v, rate, weights, norm=norm, **options)


def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    forget: Tensor,
    momentum: Tensor,
    weights: Sequence[Tensor],
    **options,
) -> tuple[Tensor, MemoryState | None]:
    """Titans' long-term memory (Behrouz et al. 2024): `memory` with momentum and a forget gate.

    M_t = (1 - forget_t) M_{t-1} + S_t with S_t = momentum_t S_{t-1} - rate_t grad; where the paper's loss has no factor
    of 1/2, its rate is half of this one.

    Args:
        forget: (B, T, H) in [0, 1]; momentum: (B, T, H) in [0, 1).
        weights: of the memory's layers, as in `memory`.
        options: as of `ttt_linear`, and ``norm``.
    """
    return memory(q, k, v, rate, weights, gate=1 - forget, momentum=momentum, **options)


def _form(shapes: list[tuple[int, ...]], dtype: torch.dtype, momentum: bool) -> Form:
    """The `Form` of a `MemoryState` whose weights have these shapes."""
    parts: Form = [(shape, dtype) for shape in shapes]
    return [*parts, *parts, *(parts if momentum else []), ((), torch.int64)]


def _checked_model(weights, norm, heads, width, device, v):
    if v.shape[-1] != width:
        raise ValueError(f"v must have the width of q, {width}, got {v.shape[-1]}")
    if not weights or len(weights) % 2:
        raise ValueError(f"weights must be a weight and a bias for each layer, got {len(weights)} tensors")
    given = width
    for layer, (w, b) in enumerate(zip(weights[::2], weights[1::2], strict=True), 1):
        if not isinstance(w, Tensor) or w.dim() != 3:
            raise ValueError(f"weight {layer} must be (H, I, O), got {getattr(w, 'shape', type(w).__name__)}")
        wide = width if layer == len(weights) // 2 else w.shape[-1]
        check_shape(f"weight {layer}", w, (heads, given, wide), device)
        check_shape(f"bias {layer}", b, (heads, wide), device)
        given = wide
    if norm is None:
        return None
    norm = Norm(*norm)
    check_shape("norm.weight", norm.weight, (heads, width), device)
    check_shape("norm.bias", norm.bias, (heads, width), device)
    return norm
