"""Implements the ops on CUDA: the Triton kernels, or the reference (and a record of why) where they do not apply.

Nothing here imports triton or asks for a GPU before the first call with CUDA tensors.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from types import SimpleNamespace

import torch

from ttt.installing import how_to_install
from ttt.ops import composite, reference, schema
from ttt.ops.arguments import CommitArguments, WindowStepArguments
from ttt.ops.backends import record, unavailable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the Triton kernels take."""

if importlib.util.find_spec("triton") is None:
    unavailable["triton"] = f"the package triton is not installed ({how_to_install('triton')})"


@functools.cache
def loaded_kernels() -> SimpleNamespace | None:
    """The launchers of the Triton kernels, by op; None where they cannot be imported."""
    if "triton" in unavailable:
        return None
    try:
        from ttt.ops.triton import append, commit, delta_rule, low_rank, project, reservoir, window_linear, window_step
        from ttt.ops.triton import experts as experts
        from ttt.ops.triton import low_rank_compress as low_rank_compress
        from ttt.ops.triton import memory as memory
        from ttt.ops.triton import memory_step as memory_step
    except ImportError as error:
        unavailable["triton"] = f"the Triton kernels cannot be imported ({error})"
        return None
    return SimpleNamespace(
        window_linear=window_linear.window_linear,
        experts=experts.experts,
        most_rows_of_experts=experts.MOST_ROWS,
        project_out=project.project_out,
        project_out_pair=project.project_out_pair,
        window_append=append.window_append,
        commit=commit.commit,
        window_step=window_step.window_step,
        why_not_step=window_step.why_not,
        reservoir_insert=reservoir.reservoir_insert,
        reservoir_insert_pair=reservoir.reservoir_insert,
        reservoir_draw=reservoir.reservoir_draw,
        low_rank_linear=low_rank.low_rank_linear,
        low_rank_append=low_rank.low_rank_append,
        low_rank_compress=low_rank_compress.low_rank_compress,
        why_not_compress=low_rank_compress.why_not,
        delta_rule=delta_rule.delta_rule,
        delta_rule_step=delta_rule.delta_rule_step,
        most_keys=delta_rule.MOST_KEYS,
        memory=memory.memory,
        memory_step=memory_step.memory_step,
        why_not_memory=memory.why_not,
        why_not_memory_step=memory_step.why_not,
    )


def run_kernel(op: str, on: torch.Tensor, dtype: torch.dtype, *args, fallback=None):
    """Call ``op`` on the device of ``on``: the Triton launcher if there is one for ``dtype``, else the reference.

    ``fallback`` is the reference where it is not in `ttt.ops.reference`.
    """
    kernels = loaded_kernels()
    if kernels is not None and dtype in DTYPES:
        record(op, "triton")
        with torch.cuda.device(on.device):  # Triton launches on the current device, whatever the tensors' is
            return getattr(kernels, op)(*args)
    record(op, "reference", unavailable["triton"] if kernels is None else f"no Triton kernel for {dtype}")
    return (fallback or getattr(reference, op))(*args)


def window_linear(x, weight, bias, win_x, win_delta, win_eta):
    schema.check_window_linear(x, weight, bias, win_x, win_delta, win_eta)
    return run_kernel("window_linear", weight, weight.dtype, x, weight, bias, win_x, win_delta, win_eta)


def why_not_experts(dtype: torch.dtype, counts: Sequence[int]) -> str:
    """Why `experts` cannot be called for layers of ``dtype`` with so many rows each; empty if it can."""
    kernels = loaded_kernels()
    if kernels is None:
        return unavailable["triton"]
    if dtype not in DTYPES:
        return f"no Triton kernel for {dtype}"
    most = kernels.most_rows_of_experts
    return "" if max(counts) <= most else f"an expert gets more than {most} rows"


def experts(x, held, counts, transposed):
    """`ttt.ops.triton.experts.experts`; see `why_not_experts`."""
    kernels = loaded_kernels()
    assert kernels is not None
    with torch.cuda.device(x.device):
        return kernels.experts(x, held, counts, transposed)


def project_out(x, basis):
    schema.check_project_out(x, basis)
    return run_kernel("project_out", x, x.dtype, x, basis)


def project_out_pair(x, basis_x, d, basis_d):
    schema.check_project_out_pair(x, basis_x, d, basis_d)
    return run_kernel("project_out_pair", x, x.dtype, x, basis_x, d, basis_d, fallback=composite.project_out_pair)


def window_append(
    win_x, win_delta, win_eta, win_trace, x, delta, eta, trace_delta, at=0, counters=None, tokens=None, gate=None
) -> None:
    args = (win_x, win_delta, win_eta, win_trace, x, delta, eta, trace_delta, at, counters, tokens, gate)
    schema.check_window_append(*args)
    run_kernel("window_append", win_x, win_x.dtype, *args)
    torch.autograd.graph.increment_version(
        [t for t in (win_x, win_delta, win_eta, win_trace, counters, tokens) if t is not None]
    )


def commit(*args) -> None:
    c = CommitArguments(*args)
    schema.check_commit(c)
    run_kernel("commit", c.weight, c.weight.dtype, *c)
    # A kernel wrote through raw pointers: autograd and functionalization must be told.
    torch.autograd.graph.increment_version([t for t in c.written if t is not c.step])


def window_step(*args) -> None:
    a = WindowStepArguments(*args)
    kernels = loaded_kernels()
    if kernels is None or a.weight.dtype not in DTYPES:
        composite.window_step(*args)  # whose two ops say why
        return
    if why := kernels.why_not_step(a):
        record("window_step", "two ops", why)
        composite.window_step(*args)
        return
    schema.check_window_step(a)
    run_kernel("window_step", a.weight, a.weight.dtype, a)
    torch.autograd.graph.increment_version(
        [t for t in (*a[:4], a.counters, a.tokens, a.win_weight, *a.commit.written) if t is not None]
    )


def reservoir_insert(memory, seen, x, seed, gate=None) -> None:
    schema.check_reservoir_insert(memory, seen, x, seed, gate)
    run_kernel("reservoir_insert", memory, memory.dtype, memory, seen, x, seed, gate)
    torch.autograd.graph.increment_version([memory])


def reservoir_insert_pair(memory, seen, x, seed, gate, memory_d, d) -> None:
    schema.check_reservoir_insert_pair(memory, seen, x, seed, gate, memory_d, d)
    given = memory, seen, x, seed, gate, memory_d, d
    run_kernel("reservoir_insert_pair", memory, memory.dtype, *given, fallback=composite.reservoir_insert_pair)
    torch.autograd.graph.increment_version([memory, memory_d])


def reservoir_draw(seen, step, capacity, rows, seed):
    schema.check_reservoir_draw(seen, step, capacity, rows, seed)
    return run_kernel("reservoir_draw", seen, torch.float32, seen, step, capacity, rows, seed)


for _function in (
    window_linear, project_out, project_out_pair, window_append, window_step, commit, reservoir_insert,
    reservoir_insert_pair, reservoir_draw,
):  # fmt: skip
    schema.implement(_function.__name__, "CUDA", _function)
