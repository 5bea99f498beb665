"""Implements ops that do the work of two ops, by calling these, on devices that have no kernel for both at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.ops import schema
from ttt.ops.arguments import WindowStepArguments
from ttt.ops.gate import gated


def window_step(*args) -> None:
    """Commit the window if it is full, and append the new rows."""
    a = WindowStepArguments(*args)
    schema.check_window_step(a)
    full = a.counters[1:2]
    if a.win_weight is not None and a.row_weight is not None:
        first = torch.where(a.counters[1] != 0, 0, a.counters[0])
        rows = first + torch.arange(len(a.row_weight), device=a.row_weight.device)
        a.win_weight.index_copy_(0, rows, gated(a.gate, a.row_weight, a.win_weight[rows]))
    torch.ops.ttt.commit(*a.commit._replace(gate=full if a.gate is None else full * a.gate))
    torch.ops.ttt.window_append(*a.append)


def project_out_pair(x: Tensor, basis_x: Tensor, d: Tensor, basis_d: Tensor) -> tuple[Tensor, Tensor]:
    """`ttt.ops.project_out` of x (..., n) and of d (..., m)."""
    schema.check_project_out_pair(x, basis_x, d, basis_d)
    return torch.ops.ttt.project_out(x, basis_x), torch.ops.ttt.project_out(d, basis_d)


def reservoir_insert_pair(
    memory: Tensor, seen: Tensor, x: Tensor, seed: int, gate: Tensor | None, memory_d: Tensor, d: Tensor
) -> None:
    """`ttt.ops.reservoir_insert` of x (T, n) and of d (T, m), of which the same rows are kept."""
    schema.check_reservoir_insert_pair(memory, seen, x, seed, gate, memory_d, d)
    torch.ops.ttt.reservoir_insert(memory_d, seen.clone(), d, seed, gate)
    torch.ops.ttt.reservoir_insert(memory, seen, x, seed, gate)


for _function in (window_step, project_out_pair, reservoir_insert_pair):
    schema.implement(_function.__name__, "CompositeExplicitAutograd", _function)
