"""The ops of ``torch.ops.ttt``: schemas, fake implementations and argument checks.

``torch.library.define`` costs about 2.5 us a call where ``torch.library.custom_op`` costs 21 us.
Every check runs before anything is written, so a refused call leaves all tensors as they were.
"""

from __future__ import annotations

import torch

from ttt.checks import check_choice
from ttt.ops import log8
from ttt.ops.arguments import CommitArguments, WindowStepArguments
from ttt.ops.dtypes import accumulation

KINDS = ("fisher", "mas", "si")
MAX_REPLAY_ROWS = 64

_SCHEMAS = {
    "window_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor win_x, Tensor win_delta, Tensor win_eta) -> Tensor"
    ),
    "project_out": "(Tensor x, Tensor basis) -> Tensor",
    "project_out_pair": "(Tensor x, Tensor basis_x, Tensor d, Tensor basis_d) -> (Tensor, Tensor)",
    "commit": (
        "(Tensor(a!) weight, Tensor? anchor, Tensor? importance, Tensor(b!)? trace, Tensor x, Tensor delta, "
        "Tensor eta, Tensor? trace_delta, Tensor? memory, Tensor? seen, Tensor(c!) step, int seed, int replay_rows, "
        "float beta, float eps, float lam, float gamma, str kind, int trace_every=1, Tensor? gate=None, "
        "Tensor(d!)? momentum=None, float mu=0., float decay=0.) -> ()"
    ),
    "window_append": (
        "(Tensor(a!) win_x, Tensor(b!) win_delta, Tensor(c!) win_eta, Tensor(d!)? win_trace, Tensor x, Tensor delta, "
        "Tensor eta, Tensor? trace_delta, int at=0, Tensor(e!)? counters=None, Tensor(f!)? tokens=None, "
        "Tensor? gate=None) -> ()"
    ),
    "window_step": (
        "(Tensor(a!) win_x, Tensor(b!) win_delta, Tensor(c!) win_eta, Tensor(d!)? win_trace, Tensor x, Tensor delta, "
        "Tensor eta, Tensor? trace_delta, Tensor(e!) counters, Tensor(f!)? tokens, Tensor? gate, "
        "Tensor(k!)? win_weight, Tensor? row_weight, int held, Tensor(g!) weight, Tensor? anchor, Tensor? importance, "
        "Tensor(h!)? trace, Tensor? memory, Tensor? seen, "
        "Tensor(i!) step, int seed, int replay_rows, float beta, float eps, float lam, float gamma, str kind, "
        "int trace_every, Tensor(j!)? momentum, float mu, float decay) -> ()"
    ),
    "reservoir_insert": "(Tensor(a!) memory, Tensor(b!) seen, Tensor x, int seed, Tensor? gate=None) -> ()",
    "reservoir_insert_pair": (
        "(Tensor(a!) memory, Tensor(b!) seen, Tensor x, int seed, Tensor? gate, Tensor(c!) memory_d, Tensor d) -> ()"
    ),
    "reservoir_draw": "(Tensor seen, Tensor step, int capacity, int rows, int seed) -> Tensor",
    "low_rank_linear": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor a, Tensor b, Tensor rows, Tensor users) -> Tensor"
    ),
    "low_rank_append": (
        "(Tensor(a!) a, Tensor(b!) b, Tensor(c!) rows, Tensor(d!) eta_sum, Tensor x, Tensor delta, Tensor eta, "
        "Tensor users) -> ()"
    ),
    "low_rank_compress": (
        "(Tensor(a!) a, Tensor(b!) b, Tensor(c!) rows, Tensor(d!) eta_sum, Tensor(e!) lost, Tensor(f!) step, "
        "Tensor slots, int rank, float lam, Tensor? importance_m, Tensor? importance_n, Tensor? memory, "
        "Tensor? seen, int seed, int replay_rows, float beta, float eps) -> ()"
    ),
}

for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"ttt::{_name}", _schema)


def implement(name: str, device: str, function) -> None:
    """Register ``function`` as the implementation of op ``name`` for tensors of type ``device``."""
    torch.library.impl(f"ttt::{name}", device, function)


@torch.library.register_fake("ttt::window_linear")
def _(x, weight, bias, win_x, win_delta, win_eta):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("ttt::project_out")
def _(x, basis):
    return torch.empty_like(x)


@torch.library.register_fake("ttt::project_out_pair")
def _(x, basis_x, d, basis_d):
    return torch.empty_like(x), torch.empty_like(d)


@torch.library.register_fake("ttt::reservoir_insert_pair")
def _(*args):
    return None


@torch.library.register_fake("ttt::commit")
def _(*args):
    return None


@torch.library.register_fake("ttt::window_append")
def _(*args):
    return None


@torch.library.register_fake("ttt::window_step")
def _(*args):
    return None


@torch.library.register_fake("ttt::reservoir_insert")
def _(*args):
    return None


@torch.library.register_fake("ttt::low_rank_linear")
def _(x, weight, bias, a, b, rows, users):
    return x.new_empty((*x.shape[:-1], b.shape[2]))


@torch.library.register_fake("ttt::low_rank_append")
def _(*args):
    return None


@torch.library.register_fake("ttt::low_rank_compress")
def _(*args):
    return None


@torch.library.register_fake("ttt::reservoir_draw")
def _(seen, step, capacity, rows, seed):
    return torch.empty((rows,), dtype=torch.int64, device=seen.device)


def need(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    like: torch.Tensor,
) -> None:
    """Raise ValueError, TypeError or RuntimeError unless ``tensor`` can be the argument ``name`` of an op.

    It must have ``shape`` and one of ``dtypes``, be contiguous, on the device of ``like``, and need no gradient.
    """
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d) for d in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} requires grad, but the op has no derivative; use ttt.nn.Linear, or call it under torch.no_grad()"
        )


def _need_state(name: str, t: torch.Tensor, m: int, n: int, dtypes: tuple[torch.dtype, ...], like) -> None:
    """Importance and trace: a matrix of floats, or the uint8 tensor of `ttt.ops.log8`."""
    if t.dtype == torch.uint8 and torch.float64 not in dtypes:
        need(name, t, (m, log8.width(n)), (torch.uint8,), like)
    else:
        need(name, t, (m, n), dtypes, like)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_window_linear(x, weight, bias, win_x, win_delta, win_eta) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (m, n), got {tuple(weight.shape)}")
    m, n = weight.shape
    need("weight", weight, (m, n), FLOATS, weight)
    dtype = (weight.dtype,)
    if x.ndim < 1 or x.shape[-1] != n:
        raise ValueError(f"x must have shape (..., {n}), got {tuple(x.shape)}")
    need("x", x, tuple(x.shape), dtype, weight)
    if bias is not None:
        need("bias", bias, (m,), dtype, weight)
    c = win_eta.numel()
    need("win_eta", win_eta, (c,), (accumulation(weight.dtype),), weight)
    need("win_x", win_x, (c, n), dtype, weight)
    need("win_delta", win_delta, (c, m), dtype, weight)


def check_project_out(x, basis) -> None:
    if basis.ndim != 2:
        raise ValueError(f"basis must have shape (k, n), got {tuple(basis.shape)}")
    k, n = basis.shape
    if x.ndim < 1 or x.shape[-1] != n:
        raise ValueError(f"x must have shape (..., {n}), got {tuple(x.shape)}")
    need("x", x, tuple(x.shape), FLOATS, x)
    need("basis", basis, (k, n), (x.dtype,), x)


def check_window_append(
    win_x, win_delta, win_eta, win_trace, x, delta, eta, trace_delta, at=0, counters=None, tokens=None, gate=None
) -> None:
    for name, t in (("win_x", win_x), ("win_delta", win_delta)):
        if t.ndim != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {tuple(t.shape)}")
    window, n, m = win_eta.numel(), win_x.shape[1], win_delta.shape[1]
    wide, dtype, count = (accumulation(win_x.dtype),), (win_x.dtype,), (torch.int64,)
    need("win_x", win_x, (window, n), FLOATS, win_x)
    need("win_delta", win_delta, (window, m), dtype, win_x)
    need("win_eta", win_eta, (window,), wide, win_x)
    rows = eta.numel()
    need("eta", eta, (rows,), wide, win_x)
    need("x", x, (rows, n), dtype, win_x)
    need("delta", delta, (rows, m), dtype, win_x)
    if win_trace is not None:
        need("win_trace", win_trace, (window, m), dtype, win_x)
    if trace_delta is not None:
        if win_trace is None:
            raise ValueError("trace_delta needs win_trace, which is None")
        need("trace_delta", trace_delta, (rows, m), dtype, win_x)
    if counters is not None:
        need("counters", counters, (3,), count, win_x)
    if not 0 <= at <= window - rows:
        raise ValueError(f"at must be in [0, {window - rows}] for {rows} rows in a window of {window}, got {at}")
    if tokens is not None:
        if counters is None:
            raise ValueError("tokens needs counters, which is None")
        need("tokens", tokens, (1,), count, win_x)
    if gate is not None:
        need("gate", gate, (1,), count, win_x)


def check_window_step(a: WindowStepArguments) -> None:
    if not 0 <= a.held <= a.win_eta.numel():
        raise ValueError(f"held must be in [0, {a.win_eta.numel()}], got {a.held}")
    need("counters", a.counters, (3,), (torch.int64,), a.win_x)
    check_window_append(*a.append)
    check_commit(a.commit)
    if a.win_weight is not None:
        need("win_weight", a.win_weight, (a.win_eta.numel(),), (a.win_eta.dtype,), a.win_x)
        if a.row_weight is None:
            raise ValueError("win_weight needs row_weight, which is None")
        need("row_weight", a.row_weight, (a.eta.numel(),), (a.win_eta.dtype,), a.win_x)


def check_commit(c: CommitArguments) -> None:
    weight, anchor, importance, trace, momentum, memory = (
        c.weight, c.anchor, c.importance, c.trace, c.momentum, c.memory
    )  # fmt: skip
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (m, n), got {tuple(weight.shape)}")
    m, n = weight.shape
    need("weight", weight, (m, n), FLOATS, weight)
    dtype, wide = (weight.dtype,), accumulation(weight.dtype)
    state = (torch.float64,) if wide == torch.float64 else (torch.float32, torch.bfloat16)
    tokens = c.eta.numel()
    need("eta", c.eta, (tokens,), (wide,), weight)
    need("x", c.x, (tokens, n), dtype, weight)
    need("delta", c.delta, (tokens, m), dtype, weight)
    need("step", c.step, (1,), (torch.int64,), weight)
    if c.gate is not None:
        need("gate", c.gate, (1,), (torch.int64,), weight)
    if anchor is not None:
        need("anchor", anchor, (m, n), dtype, weight)
    if importance is not None:
        _need_state("importance", importance, m, n, state, weight)
    if trace is not None:
        _need_state("trace", trace, m, n, state, weight)
        if log8.is_packed(trace) and c.kind == "si":
            raise ValueError("trace in 8 bits holds values >= 0 only, but with kind = 'si' it has both signs")
    if c.trace_delta is not None:
        need("trace_delta", c.trace_delta, (tokens, m), dtype, weight)
    check_choice("kind", c.kind, KINDS)
    if not 0 <= c.replay_rows <= MAX_REPLAY_ROWS:
        raise ValueError(f"replay_rows must be in [0, {MAX_REPLAY_ROWS}], got {c.replay_rows}")
    if c.replay_rows:
        if memory is None or anchor is None:
            raise ValueError(f"replay_rows = {c.replay_rows} needs memory and anchor; one of them is None")
        if memory.ndim != 2:
            raise ValueError(f"memory must have shape (K, {n}), got {tuple(memory.shape)}")
        need("memory", memory, (c.replay_rows if c.seen is None else memory.shape[0], n), dtype, weight)
        if c.seen is not None:
            need("seen", c.seen, (1,), (torch.int64,), weight)
    if not c.lam >= 0:
        raise ValueError(f"lam must be >= 0, got {c.lam}")
    if c.lam > 0 and (anchor is None or importance is None):
        raise ValueError(f"lam = {c.lam} needs anchor and importance; one of them is None")
    if not c.decay >= 0:
        raise ValueError(f"decay must be >= 0, got {c.decay}")
    if c.decay > 0 and anchor is None:
        raise ValueError(f"decay = {c.decay} needs anchor, which is None")
    if not 0 <= c.mu < 1:
        raise ValueError(f"mu must be in [0, 1), got {c.mu}")
    if c.mu > 0 and momentum is None:
        raise ValueError(f"mu = {c.mu} needs momentum, which is None")
    if momentum is not None:
        need("momentum", momentum, (m, n), state, weight)
    if not 0 < c.gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], got {c.gamma}")
    if not c.eps >= 0:
        raise ValueError(f"eps must be >= 0, got {c.eps}")
    if c.trace_every < 1:
        raise ValueError(f"trace_every must be >= 1, got {c.trace_every}")


def check_reservoir_insert(memory, seen, x, seed, gate=None) -> None:
    if memory.ndim != 2:
        raise ValueError(f"memory must have shape (K, n), got {tuple(memory.shape)}")
    capacity, n = memory.shape
    need("memory", memory, (capacity, n), FLOATS, memory)
    need("seen", seen, (1,), (torch.int64,), memory)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (T, {n}), got {tuple(x.shape)}")
    need("x", x, (x.shape[0], n), (memory.dtype,), memory)
    if gate is not None:
        need("gate", gate, (1,), (torch.int64,), memory)


def check_reservoir_insert_pair(memory, seen, x, seed, gate, memory_d, d) -> None:
    check_reservoir_insert(memory, seen, x, seed, gate)
    if memory_d.ndim != 2 or memory_d.shape[0] != memory.shape[0]:
        raise ValueError(f"memory_d must have shape ({memory.shape[0]}, m), got {tuple(memory_d.shape)}")
    need("memory_d", memory_d, tuple(memory_d.shape), (memory.dtype,), memory)
    need("d", d, (x.shape[0], memory_d.shape[1]), (memory.dtype,), memory)


def check_project_out_pair(x, basis_x, d, basis_d) -> None:
    check_project_out(x, basis_x)
    check_project_out(d, basis_d)
    if d.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"d must have as many rows as x, {tuple(x.shape[:-1])}, got {tuple(d.shape[:-1])}")
    need("d", d, tuple(d.shape), (x.dtype,), x)


def check_reservoir_draw(seen, step, capacity, rows, seed) -> None:
    need("seen", seen, (1,), (torch.int64,), seen)
    need("step", step, (1,), (torch.int64,), seen)
    if capacity < 1:
        raise ValueError(f"capacity must be >= 1, got {capacity}")
    if rows < 0:
        raise ValueError(f"rows must be >= 0, got {rows}")
