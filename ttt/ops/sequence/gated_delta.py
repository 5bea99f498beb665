"""`gated_delta_rule` and its step: checks, packed sequences, and the choice of an implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttt.ops.dtypes import accumulation
from ttt.ops.sequence import cpu_steps, delta_rule, kernels
from ttt.ops.sequence.checks import (
    bounds_of,
    check_count,
    check_form,
    check_shape,
    check_tokens,
    refuse_gradients,
    sequences,
)
from ttt.ops.sequence.states import changes_in_place


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """o_t = scale S_t^T q_t with S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T, a_t = e^{g_t}.

    The gated delta rule (Yang, Kautz and Hatamizadeh 2025); without ``g`` the delta rule of DeltaNet (Schlag et al.
    2021). Each write is a step of size beta_t on |v_t - S^T k_t|^2 / 2, which is stable for beta_t |k_t|^2 in [0, 2].

    Args:
        q, k: (B, T, H, K), of one dtype: float32, bfloat16, float16 or float64. T may be 0.
        v: (B, T, H, V), of that dtype.
        beta: (B, T, H), any floating-point dtype: the step sizes.
        g: (B, T, H), the logarithms of the gates, at most 0; None for gates of 1.
        scale: of the output; K^-1/2 by default.
        initial_state: (B, H, K, V), float32 (float64 for float64); zeros by default.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: (N + 1,), where each of N packed sequences begins, and T. B must be 1 then, and the states have N
            rows.
        chunk_size: tokens of a chunk in the torch form. It changes the speed, and the result by rounding only.
        form: "auto" takes the kernels of the device, with gradients on CPUs only, and the torch form otherwise;
            "chunk" always takes the torch form, "reference" the recurrence token by token.

    Returns:
        (B, T, H, V) in the dtype of q, and the final state, or None. Sums are in float32 (float64 for float64). All
        can be differentiated, by the states too, and any number of times: kernels leave second derivatives to the
        torch form.

    Raises:
        TypeError, ValueError: for a wrong argument.
    """
    check_tokens(q, k, v)
    check_count("chunk_size", chunk_size)
    check_form(form)
    batch, tokens, heads, width = q.shape
    check_shape("beta", beta, (batch, tokens, heads), q.device)
    check_shape("g", g, (batch, tokens, heads), q.device)
    bounds = bounds_of(cu_seqlens, batch, tokens)
    rows = sequences(bounds, batch)
    dtype = accumulation(q.dtype)
    state = _checked_state(initial_state, (rows, heads, width, v.shape[-1]), dtype, q.device, "initial_state")
    scale = width**-0.5 if scale is None else float(scale)
    if form == "auto" and (kernel := kernels.gated_delta_rule(q, k, v, beta, g, state)):
        begins = None if bounds is None else torch.tensor(bounds)
        out, final = kernel(q, k, v, beta, g, state, begins, scale)
        return out, final if output_final_state else None
    size = None if form == "reference" else chunk_size
    out, final = delta_rule.texts(q, k, v, beta, g, state, bounds, scale, size)
    return out, final if output_final_state else None


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    state: Tensor,
    scale: float | None = None,
) -> Tensor:
    """One token of `gated_delta_rule`; ``state`` becomes the state after it, in place.

    Args:
        q, k: (B, H, K); v: (B, H, V); beta, g: (B, H); as in `gated_delta_rule`.
        state: (B, H, K, V), float32 (float64 for float64), contiguous.
        scale: of the output; K^-1/2 by default.

    Returns:
        (B, H, V) in the dtype of q.

    Raises:
        TypeError, ValueError: for a wrong argument; ``state`` is as it was then.
        RuntimeError: if grad mode is on and an argument requires grad (the step has no derivative).
    """
    if (found := cpu_steps.delta_rule(q, k, v, beta, g, state, scale)) is not None:
        return found
    check_tokens(q, k, v, dims=3)
    batch, heads, width = q.shape
    check_shape("beta", beta, (batch, heads), q.device)
    check_shape("g", g, (batch, heads), q.device)
    dtype = accumulation(q.dtype)
    if _checked_state(state, (batch, heads, width, v.shape[-1]), dtype, q.device, "state") is None:
        raise TypeError("state must be a tensor, got None")
    refuse_gradients("gated_delta_rule_step", q, k, v, beta, g, state)
    scale = width**-0.5 if scale is None else float(scale)
    if kernel := kernels.gated_delta_rule_step(q, k, v, beta, g, state):
        return kernel(q, k, v, beta, g, state, scale)
    given: Any = (*(None if t is None else t.to(dtype) for t in (q, k, v, beta, g)), state, scale)
    return delta_rule.step_(*given).to(q.dtype)


def _checked_state(state, shape, dtype, device, name):
    check_shape(name, state, shape, device)
    if state is not None and state.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {state.dtype}")
    if name == "state" and state is not None and not changes_in_place(state):
        raise ValueError("state must be contiguous and no negative view, because it is changed in place")
    return state
