"""Calls of the Triton launchers with meta tensors, which reach every kernel; `ttt.ops.triton.aot` compiles them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from ttt.ops import log8, schema
from ttt.ops.arguments import CommitArguments, WindowStepArguments
from ttt.ops.triton import append, commit, delta_rule, experts, low_rank, project, reservoir, window_linear, window_step
from ttt.ops.triton import low_rank_compress as low_rank_compress
from ttt.ops.triton import memory as memory
from ttt.ops.triton import memory_step as memory_step

M, N, CAPACITY = 4096, 4096, 1024


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _state(dtype: torch.dtype) -> torch.Tensor:
    return _meta(M, log8.width(N) if dtype == torch.uint8 else N, dtype=dtype)


def _commit(
    dtype, state, kind, rows, lam, tokens=16, every=1, gated=False, given=False, momentum=None, decay=0.0,
    seed=0,
) -> None:  # fmt: skip
    matrix = _meta(M, N, dtype=dtype)
    counter = _meta(1, dtype=torch.int64)
    commit.commit(*CommitArguments(
        weight=matrix, anchor=matrix, importance=_state(state), trace=_state(state) if kind else None,
        x=_meta(tokens, N, dtype=dtype), delta=_meta(tokens, M, dtype=dtype), eta=_meta(tokens, dtype=torch.float32),
        trace_delta=None, memory=_meta(rows if given else CAPACITY, N, dtype=dtype), seen=None if given else counter,
        step=counter, replay_rows=rows, lam=lam, kind=kind or "fisher", trace_every=every,
        gate=counter if gated else None, seed=seed, momentum=None if momentum is None else _meta(M, N, dtype=momentum),
        mu=0.9 if momentum else 0.0, decay=decay,
    ))  # fmt: skip


def _linear(dtype, tokens, bias=True, window=16) -> None:
    window_linear.window_linear(
        _meta(tokens, N, dtype=dtype), _meta(M, N, dtype=dtype), _meta(M, dtype=dtype) if bias else None,
        _meta(window, N, dtype=dtype), _meta(window, M, dtype=dtype), _meta(window, dtype=torch.float32),
    )  # fmt: skip


def _experts(dtype, transposed, window=64) -> None:
    held = _meta(M, N, dtype=dtype), _meta(window, N, dtype=dtype), _meta(window, M, dtype=dtype)
    layers = [(*held, _meta(window, dtype=torch.float32))] * 64
    experts.experts(_meta(256, M if transposed else N, dtype=dtype), layers, [4] * 64, transposed)


def _append(dtype, on_device) -> None:
    window, rows = (_meta(16, N, dtype=dtype), _meta(16, M, dtype=dtype)), _meta(8, N, dtype=dtype)
    counters = [_meta(k, dtype=torch.int64) for k in (3, 1, 1)] if on_device else [None] * 3
    append.window_append(
        *window, _meta(16, dtype=torch.float32), window[1] if on_device else None, rows, rows,
        _meta(8, dtype=torch.float32), None, 0, *counters,
    )  # fmt: skip


def _step(dtype, state, held=16, kind="fisher", every=1, gated=False, momentum=None, decay=0.0, added=1) -> None:
    matrix, counters = _meta(M, N, dtype=dtype), _meta(3, dtype=torch.int64)
    window, rows = [[_meta(count, k, dtype=dtype) for k in (N, M)] for count in (held, added)]
    eta, new_eta = (_meta(count, dtype=torch.float32) for count in (held, added))
    window_step.window_step(WindowStepArguments(
        *window, eta, window[1] if gated else None, *rows, new_eta, None, counters, counters[:1],
        counters[:1] if gated else None, eta if gated else None, new_eta if gated else None, held, matrix, matrix,
        _state(state), _state(state) if kind else None, None,
        None, counters[:1], 0, 0, 0.0, 0.0, 1.0, 1.0, kind or "fisher", every,
        None if momentum is None else _meta(M, N, dtype=momentum), 0.9 if momentum else 0.0, decay,
    ))  # fmt: skip


def _project(dtype) -> None:
    project.project_out(_meta(8, N, dtype=dtype), _meta(16, N, dtype=dtype))


def _insert(dtype, seed=0) -> None:
    memory, counter = _meta(CAPACITY, N, dtype=dtype), _meta(1, dtype=torch.int64)
    reservoir.reservoir_insert(memory, counter, _meta(16, N, dtype=dtype), seed, counter)


def _draw() -> None:
    counter = _meta(1, dtype=torch.int64)
    reservoir.reservoir_draw(counter, counter, CAPACITY, 16, 0)


def _low_rank(dtype, tokens) -> None:
    pool, rows = (_meta(32, 80, N, dtype=dtype), _meta(32, 80, M, dtype=dtype)), _meta(32, dtype=torch.int32)
    x, y, users = _meta(tokens, N, dtype=dtype), _meta(tokens, M, dtype=dtype), _meta(tokens, dtype=torch.int32)
    low_rank.low_rank_linear(x, _meta(M, N, dtype=dtype), None, *pool, rows, users)
    rates = _meta(32, dtype=torch.float32), _meta(tokens, dtype=torch.float32)
    low_rank.low_rank_append(*pool, rows, rates[0], x, y, rates[1], users)


def _compress(dtype, slots, rank, window, lam=0.0, replay_rows=0, seed=0) -> None:
    pool, rates = [_meta(slots, rank + window, k, dtype=dtype) for k in (N, M)], _meta(slots, dtype=torch.float32)
    counters = _meta(slots, dtype=torch.int64)
    importance = [_meta(k, dtype=torch.float32) if lam else None for k in (M, N)]
    memory, seen = (_meta(CAPACITY, N, dtype=dtype), counters[:1]) if replay_rows else (None, None)
    low_rank_compress.low_rank_compress(
        *pool, _meta(slots, dtype=torch.int32), rates, rates, counters, counters, rank, lam, *importance,
        memory, seen, seed, replay_rows, 0.3, 1e-3,
    )  # fmt: skip


def _delta_rule(dtype, keys, values, gated=True, packed=False) -> None:
    q, v = (_meta(2, 256, 8, width, dtype=dtype) for width in (keys, values))
    rates, state = _meta(2, 256, 8, dtype=torch.float32), _meta(2, 8, keys, values, dtype=torch.float32)
    gate, begins = rates if gated else None, _meta(3, dtype=torch.int64) if packed else None
    if keys <= delta_rule.MOST_KEYS:
        delta_rule.delta_rule(q, q, v, rates, gate, state if packed else None, begins, 0.125)
    now = [None if t is None else t[:, 0] for t in (q, q, v, rates, gate)]
    delta_rule.delta_rule_step(*now, state, 0.125)


def _memory(dtype, width, middle=None, titans=False, packed=False) -> None:
    batch, tokens, heads = 2, 256, 8
    x, factor = _meta(batch, tokens, heads, width, dtype=dtype), _meta(batch, tokens, heads, dtype=torch.float32)
    factors = [factor, *[factor if titans else None] * 2]
    norm = [None if titans else _meta(heads, width, dtype=torch.float32)] * 2
    weights = []
    for inputs, outputs in [(width, width)] if middle is None else [(width, middle), (middle, width)]:
        weights += [_meta(batch, heads, *shape, dtype=torch.float32) for shape in ((inputs, outputs), (outputs,))]
    state = [*norm, 1e-6, weights, weights, weights if titans else [], _meta(batch, dtype=torch.int64)]
    if not memory.why_not(weights):
        begins = _meta(batch + 1, dtype=torch.int64) if packed else None
        memory.memory(x, x, x, *factors, *state, begins, 16, 1.0)
    now = [None if t is None else t[:, 0] for t in (x, x, x, *factors)]
    memory_step.memory_step(*now, *state, 16, 1.0)


def calls(everything: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the launchers, each as (label, call), that reach every kernel, or every variant of every kernel."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    bf16, fp32, fp16, codes = *dtypes, torch.uint8
    few, many = {"tokens": 16}, {"tokens": 2048}
    if everything:
        kinds = (*schema.KINDS, None)
        options = [
            (dtype, state, kind, rows, lam, size)
            for dtype, state, kind, rows, lam, size in itertools.product(
                dtypes, (fp32, bf16, codes), kinds, (0, 16), (0.0, 1.0), (few, many)
            )
            if (state, kind) != (codes, "si")
        ]
        options += itertools.product(dtypes, (fp32,), (None,), (16, 32, 64), (0.0,), (few,))
        options += [
            (dtype, bf16, kind, 16, 1.0, {**size, "every": 4, "gated": True})
            for dtype, kind, size in itertools.product(dtypes, schema.KINDS, (few, many))
        ]
        options += [
            (dtype, state, "fisher", rows, lam, {**size, "momentum": moving, "decay": 0.1, "given": True})
            for dtype, state, rows, lam, size, moving in itertools.product(
                dtypes, (bf16, codes), (0, 16), (0.0, 1.0), (few, many), (bf16, fp32)
            )
        ]
    else:
        options = [
            (bf16, bf16, "fisher", 16, 1.0, few),
            (bf16, codes, "fisher", 16, 1.0, {**few, "gated": True}),
            (bf16, bf16, "si", 64, 1.0, {**few, "every": 4}),
            (bf16, bf16, "fisher", 16, 1.0, many),
            (bf16, codes, "fisher", 0, 1.0, many),
            (fp32, fp32, "fisher", 64, 1.0, few),
            (fp16, bf16, "mas", 0, 1.0, few),
            (bf16, bf16, "fisher", 16, 1.0, {**few, "momentum": bf16, "decay": 0.1, "given": True}),
            (fp32, fp32, "fisher", 16, 1.0, {**few, "momentum": fp32}),
            (bf16, bf16, "fisher", 16, 0.0, {**many, "momentum": bf16, "decay": 0.1}),
        ]
    for *which, size in options:
        dtype, state, kind, rows, lam = which
        extra = "".join(f" {k}={_name(v) if isinstance(v, torch.dtype) else f'{v:g}'}" for k, v in size.items())
        label = f"{_name(dtype)}/{_name(state)} {kind or 'no trace'} R={rows} lam={lam:g}{extra}"
        yield label, lambda a=which, b=size: _commit(*a, **b)
    for dtype in dtypes if everything else dtypes[:2]:
        for tokens in (1, 8, 64) if everything or dtype == torch.bfloat16 else (8,):
            yield f"{_name(dtype)} T={tokens}", lambda a=(dtype, tokens): _linear(*a)
    for tokens, window in itertools.product((1, 8), (64, 128)) if everything else [(1, 128)]:
        label = f"bfloat16 T={tokens} window {window}"
        yield label, lambda a=(tokens, window): _linear(torch.bfloat16, a[0], window=a[1])
    for dtype, transposed in itertools.product(dtypes if everything else dtypes[:2], (False, True)):
        label = f"{_name(dtype)} {'gradients' if transposed else 'outputs'} of experts"
        yield label, lambda a=(dtype, transposed): _experts(*a)
    if everything:
        for window in (16, 128):
            yield f"bfloat16 experts, window {window}", lambda a=window: _experts(torch.bfloat16, False, a)
    steps = [(bf16, bf16, 16, {}), (bf16, codes, 16, {}), (bf16, bf16, 64, {"added": 8})]
    if everything:
        kinds = (*schema.KINDS, None)
        steps += [(dtype, state, 64, {}) for dtype in dtypes for state in (fp32, bf16, codes)]
        steps += [(dtype, bf16, 16, {"kind": kind, "gated": True}) for dtype in dtypes for kind in kinds]
        steps += [(dtype, bf16, 16, {"every": 4, "momentum": bf16, "decay": 0.1}) for dtype in dtypes]
    for dtype, state, window, extra in steps:
        given = "".join(f" {k}={_name(v) if isinstance(v, torch.dtype) else v}" for k, v in extra.items())
        label = f"{_name(dtype)}/{_name(state)} window {window}{given}"
        yield label, lambda a=(dtype, state, window), b=extra: _step(*a, **b)
    for dtype in dtypes if everything else dtypes[:2]:
        yield _name(dtype), lambda a=dtype: _project(a)
    for dtype in dtypes if everything else dtypes[:1]:
        yield _name(dtype), lambda a=dtype: _insert(a)
        for where in (True, False):
            label = f"{_name(dtype)}, counted on the {'device' if where else 'host'}"
            yield label, lambda a=(dtype, where): _append(*a)
    for dtype, tokens in itertools.product(dtypes if everything else dtypes[:2], (32, 2048)):
        yield f"{_name(dtype)} low_rank T={tokens}", lambda a=(dtype, tokens): _low_rank(*a)
    if everything:
        squeezes = [
            (dtype, 32, rank, window, lam, *replayed)
            for dtype, (rank, window), lam, replayed in itertools.product(
                dtypes,
                ((4, 8), (8, 24), (16, 48), (16, 64), (64, 192), (128, 384), (64, 960)),
                (0.0, 1.0),
                ((0,), (4,), (16,), (64,)),
            )
        ]
    else:
        squeezes = [
            (fp32, 32, 16, 64),
            (bf16, 32, 16, 64, 1.0, 4),
            (fp32, 32, 8, 24, 0.0, 32),
        ]
    widths = ((64, 64), (128, 128), (16, 32), (48, 304)) if everything else ((64, 64), (128, 128))
    for dtype, (keys, values) in itertools.product(dtypes if everything else dtypes[:2], widths):
        for gated, packed in itertools.product((True, False), repeat=2) if everything else [(True, True)]:
            label = f"{_name(dtype)} {keys}x{values} gated={gated:d} packed={packed:d}"
            yield label, lambda a=(dtype, keys, values, gated, packed): _delta_rule(*a)
    models = [
        (width, middle, titans)
        for width, middle in ((64, None), (64, 256), (128, None), (128, 512))
        for titans in (False, True)
    ]
    for dtype, (width, middle, titans) in itertools.product(dtypes if everything else dtypes[:1], models):
        label = f"{_name(dtype)} {width}{f'-{middle}' if middle else ''} {'Titans' if titans else 'TTT'}"
        yield label, lambda a=(dtype, width, middle, titans, titans): _memory(*a)
    for a in squeezes:
        dtype, _, rank, window, *rest = a
        label = " ".join(map(str, (_name(dtype), f"slots of {rank}+{window}", *rest)))
        yield label, lambda a=a: _compress(*a)
    yield "int64", _draw


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
