"""Implements the ops on CPU: the C++ kernels for float32 and bfloat16, the reference for the rest."""

from __future__ import annotations

import math
import os

import torch

from ttt.ops import reference, schema
from ttt.ops.arguments import CommitArguments
from ttt.ops.backends import record, unavailable
from ttt.ops.build_report import why_not_built
from ttt.ops.gate import closed
from ttt.ops.modes import must_call_ops

# torch comes first: it brings the OpenMP runtime that the extension then shares.
try:
    from ttt import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C = None
    unavailable["cpu"] = why_not_built(error)

ISA_VARIABLE = "TTT_CPU_ISA"
if _C is not None and os.environ.get(ISA_VARIABLE):
    _C.set_isa(os.environ[ISA_VARIABLE])

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
"""The numbers of dtypes in ``ttt._C``; uint8 is for importance and trace only."""

MASK64 = (1 << 64) - 1

# With more tokens than this, torch's matmul makes the product and the C++ kernel only subtracts the window's part. With
# fewer, one pass of the C++ kernel over W is faster (bench: suite window_linear).
_FUSED_TOKENS = {torch.float32: 4, torch.bfloat16: 8}

FEW_OF_MANY = {torch.float32: (32, 32), torch.bfloat16: (16, 8)}
"""The most rows that one of many layers may have for the kernels to make the products with its weight themselves, for
outputs and for gradients. They were chosen by timing weights of 1024 x 1024 with one thread: up to so many rows, the
kernels took no longer than torch's products."""


def why_not(dtype: torch.dtype) -> str:
    """Empty if the C++ kernels take ``dtype``, else the reason they do not."""
    if _C is None:
        return unavailable["cpu"]
    if dtype not in DTYPE_CODES:
        return f"no C++ kernel for {dtype}"
    return ""


def address(t: torch.Tensor | None) -> int:
    """The address of ``t`` for a kernel; 0 for None."""
    return 0 if t is None else t.data_ptr()


def is_plain(t: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels can read ``t`` at its address: of ``dtype``, contiguous, on the CPU, and of no subclass.

    Wrapper subclasses, such as `DTensor`, hold their numbers in other tensors, and their own address is 0.
    """
    return type(t) is torch.Tensor and t.dtype is dtype and t.is_contiguous() and t.is_cpu


def window_linear(x, weight, bias, win_x, win_delta, win_eta):
    schema.check_window_linear(x, weight, bias, win_x, win_delta, win_eta)
    why = why_not(weight.dtype)
    if why:
        record("window_linear", "reference", why)
        return reference.window_linear(x, weight, bias, win_x, win_delta, win_eta)
    record("window_linear", "cpu")
    m, n = weight.shape
    tokens = math.prod(x.shape[:-1])
    by_torch = tokens > _FUSED_TOKENS[weight.dtype]
    if by_torch:
        y = torch.nn.functional.linear(x, weight, bias)
    else:
        y = x.new_empty((*x.shape[:-1], m))
    _C.window_linear(
        x.data_ptr(), weight.data_ptr(), address(bias), win_x.data_ptr(), win_delta.data_ptr(), win_eta.data_ptr(),
        y.data_ptr(), tokens, m, n, win_eta.numel(), DTYPE_CODES[weight.dtype], torch.get_num_threads(), by_torch,
    )  # fmt: skip
    return y


def project_out(x, basis):
    schema.check_project_out(x, basis)
    why = why_not(x.dtype)
    if why:
        record("project_out", "reference", why)
        return reference.project_out(x, basis)
    record("project_out", "cpu")
    k, n = basis.shape
    y = torch.empty_like(x)
    _C.project_out(
        x.data_ptr(), basis.data_ptr(), y.data_ptr(), x.numel() // n if n else 0, k, n, DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def takes(*tensors: torch.Tensor) -> bool:
    """Whether `row_products`, `row_dots`, `head_scores` and `head_gradient` take these tensors; no dtype is checked
    against another's."""
    return _C is not None and not must_call_ops() and all(
        type(t) is torch.Tensor and t.is_cpu and t.is_contiguous() and t.dtype in (torch.float32, torch.bfloat16)
        for t in tensors
    )  # fmt: skip


def row_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(T, S) float32: the products x_t . y_s of rows ``x`` (T, n) and ``y`` (S, n) of one dtype that `takes` takes.

    Of ``x`` (L, T, n) and ``y`` (L, S, n) they are (L, T, S).

    Raises:
        ValueError: for rows of other lengths, dtypes or layers.
    """
    if x.ndim != y.ndim or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1] or x.dtype != y.dtype:
        raise ValueError(f"y must be rows like x, {x.dtype} {tuple(x.shape)}, got {y.dtype} {tuple(y.shape)}")
    found = x.new_empty((*x.shape[:-1], y.shape[-2]), dtype=torch.float32)
    if x.ndim == 3:
        for one, other, products in zip(x, y, found, strict=True):
            _row_products(one, other, products)
    else:
        _row_products(x, y, found)
    return found


def _row_products(x: torch.Tensor, y: torch.Tensor, found: torch.Tensor) -> None:
    _C.row_products(
        x.data_ptr(), y.data_ptr(), found.data_ptr(), len(x), len(y), x.shape[1], DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip


def row_dots(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(...) float32: the products x_t . y_t of rows ``x`` and ``y`` (..., n) of one dtype, which `takes` takes.

    Raises:
        ValueError: if ``y`` has another shape or dtype.
    """
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(f"y must be like x, {x.dtype} {tuple(x.shape)}, got {y.dtype} {tuple(y.shape)}")
    found = x.new_empty(x.shape[:-1], dtype=torch.float32)
    _C.row_dots(x.data_ptr(), y.data_ptr(), found.data_ptr(), found.numel(), x.shape[-1], DTYPE_CODES[x.dtype])
    return found


def _check_like(name: str, t: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless ``t`` is a tensor of ``shape`` and ``dtype`` on the CPU."""
    if tuple(t.shape) != shape or t.dtype != dtype or not t.is_cpu:
        raise ValueError(f"{name} must be {dtype} {shape} on the CPU, got {t.dtype} {tuple(t.shape)} on {t.device}")


def head_scores(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses of ``targets`` (N,) int64 under ``logits`` (N, V), which `takes` takes.

    Returns:
        Three of (N,) float32: nats, the largest logit, and the sum of exp(logit - the largest).

    Raises:
        IndexError: for a target that is not in [0, V).
        ValueError: for targets of another shape or dtype.
    """
    count, words = logits.shape
    _check_like("targets", targets, (count,), torch.int64)
    targets = targets.contiguous()
    nll, highest, total = logits.new_empty((3, count), dtype=torch.float32)
    _C.head_scores(
        logits.data_ptr(), targets.data_ptr(), nll.data_ptr(), highest.data_ptr(), total.data_ptr(), count, words,
        DTYPE_CODES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return nll, highest, total


def head_gradient(
    logits: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    targets: torch.Tensor,
    wanted: torch.Tensor | None,
    highest: torch.Tensor,
    total: torch.Tensor,
    mass: float,
    most: int,
) -> tuple[torch.Tensor, int]:
    """The gradient of `ttt.learn.head.input_gradient` from the words that matter, with what `head_scores` found.

    Args:
        mean: (d,) of the weight's dtype, the row that stands for the words that are left out.
        most: rows of ``weight`` (V, d) that may matter, each counted once for each token.

    Returns:
        (N, d) of the weight's dtype, and how many rows it was made of; -1 where more than ``most`` matter: the first is
        not written then.

    Raises:
        IndexError: for a target that is not in [0, V).
        ValueError: for a tensor of another shape or dtype.
    """
    (count, words), width = logits.shape, weight.shape[1]
    _check_like("weight", weight, (words, width), weight.dtype)
    _check_like("mean", mean, (width,), weight.dtype)
    _check_like("targets", targets, (count,), torch.int64)
    for name, t in (("highest", highest), ("total", total)):
        _check_like(name, t, (count,), torch.float32)
    if wanted is not None:
        _check_like("wanted", wanted, (count,), torch.bool)
    targets, mean, highest, total = (t.contiguous() for t in (targets, mean, highest, total))
    wanted = None if wanted is None else wanted.contiguous()
    gradient = weight.new_empty((count, width))
    rows = _C.head_gradient(
        logits.data_ptr(), weight.data_ptr(), mean.data_ptr(), targets.data_ptr(), address(wanted), highest.data_ptr(),
        total.data_ptr(), gradient.data_ptr(), count, words, width, most, mass, DTYPE_CODES[logits.dtype],
        DTYPE_CODES[weight.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return gradient, rows


def attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    scale: float,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of softmax attention at its queries, keys and values, computed in float32.

    They are those of ``softmax(scale * q @ k.mT, where mask) @ v`` of every head; a query that sees no key has the
    output 0. Heads of queries that follow each other share a head of keys. Rows of the batch are computed apart.

    Args:
        q: (B, H, Q, D); ``k``: (B, G, K, D) and ``v``: (B, G, K, E), where G divides H and no size is 0; ``grad``: (B,
            H, Q, E), the gradient of the outputs. All are of one dtype, float32 or bfloat16, on the CPU, and of no
            subclass. In each the numbers of a row follow each other in memory.
        mask: (B or 1, H or 1, Q, K) bool, which keys each query sees; None: all.
        causal: let query i see keys 0 to i only.
        scale: of the scores, more than 0.
        first: the gradients of the keys and values before this one are not computed, and are 0.

    Returns:
        dq, dk and dv, like ``q``, ``k`` and ``v``; in memory, the heads of a token follow each other.

    Raises:
        ValueError: for a tensor of another shape or dtype, for ``scale`` <= 0, or for ``first`` outside [0, K].
    """
    (batch, heads, queries, width), (_, key_heads, keys, _), value_width = q.shape, k.shape, v.shape[-1]
    if not scale > 0 or not 0 <= first <= keys or not q.numel() or not k.numel() or not v.numel() or heads % key_heads:
        raise ValueError(
            f"attention_backward takes scale > 0, first in [0, {keys}] and heads that are a multiple of those of the "
            f"keys, got scale={scale}, first={first}, q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"q must be float32 or bfloat16, got {q.dtype}")
    _check_like("k", k, (batch, key_heads, keys, width), q.dtype)
    _check_like("v", v, (batch, key_heads, keys, value_width), q.dtype)
    _check_like("grad", grad, (batch, heads, queries, value_width), q.dtype)
    if mask is not None:
        wanted = tuple(1 if size == 1 else full for size, full in zip(mask.shape, (batch, heads), strict=False))
        _check_like("mask", mask, (*wanted, queries, keys), torch.bool)
        mask = (mask if mask.stride(3) == 1 else mask.contiguous()).expand(batch, heads, queries, keys)
    q, k, v, grad = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v, grad))
    dq, dk, dv = (t.new_empty((batch, t.shape[2], t.shape[1], t.shape[3])).transpose(1, 2) for t in (q, k, v))
    if first:
        dk[:, :, :first] = 0
        dv[:, :, :first] = 0
    given = [q, k, v, grad, mask, dq, dk, dv]
    _C.attention_backward(
        [address(t) for t in given], [(0, 0, 0) if t is None else t.stride()[:3] for t in given],
        (batch, heads, key_heads, queries, keys, first, width, value_width), scale, causal, DTYPE_CODES[q.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv


def window_append(
    win_x, win_delta, win_eta, win_trace, x, delta, eta, trace_delta, at=0, counters=None, tokens=None, gate=None
) -> None:
    args = (win_x, win_delta, win_eta, win_trace, x, delta, eta, trace_delta, at, counters, tokens, gate)
    schema.check_window_append(*args)
    record("window_append", "cpu")  # rows are copied: torch does that as well as any kernel
    reference.window_append(*args)


def why_not_bound(layer) -> str:
    """Empty if `bind_layer` binds a `ttt.nn.Linear`, else the reason it does not."""
    weight = layer.weight
    if why := _why_not_commit(weight, layer.importance, layer.trace):
        return why
    return "" if weight.is_contiguous() else "a weight that is not contiguous"


def bind_layer(layer, moments):
    """The addresses of a `ttt.nn.Linear`, bound for ``ttt._C``, or None where its kernels do not apply.

    ``moments`` (3,) are those of its moments to which learning adds, or None. The bound kernels check counters and row
    numbers only; the layer checks the rest. Valid until a tensor is reallocated.
    """
    weight, recent = layer.weight, layer.recent
    if why_not_bound(layer):
        return None
    m, n = weight.shape
    bound = _C.Layer(
        weight=weight.data_ptr(),
        bias=address(layer.bias),
        win_x=layer.win_x.data_ptr(),
        win_delta=layer.win_delta.data_ptr(),
        win_eta=layer.win_eta.data_ptr(),
        win_trace=address(layer.win_trace),
        recent=address(recent),
        recent_delta=address(layer.recent_delta),
        recent_seen=0 if recent is None else layer.recent_seen.data_ptr(),
        basis=address(layer.basis),
        output_basis=address(layer.output_basis),
        tokens=layer.tokens.data_ptr(),
        win_weight=address(layer.win_weight),
        moments=address(moments),
        agreement=address(layer.agreement),
        m=m,
        n=n,
        window=layer.win_eta.numel(),
        capacity=0 if recent is None else recent.shape[0],
        directions=0 if layer.basis is None else len(layer.basis),
        output_directions=0 if layer.output_basis is None else len(layer.output_basis),
        seed=layer.seed & MASK64,
        dtype=DTYPE_CODES[weight.dtype],
    )
    if not layer.mixes_replay_sources:
        window = layer.win_x, layer.win_delta, layer.win_eta, layer.win_trace
        bound.prepare(_bound_commit(layer.commit_arguments(*window)))
    return bound


def few_tokens(dtype: torch.dtype) -> int:
    """The most tokens for which `window_linear` computes the product itself."""
    return _FUSED_TOKENS[dtype]


def commit(*args) -> None:
    c = CommitArguments(*args)
    schema.check_commit(c)
    if closed(c.gate):
        return
    why = _why_not_commit(c.weight, c.importance if c.lam > 0 else None, c.trace)
    if why:
        record("commit", "reference", why)
        reference.commit(*c._replace(gate=None))
    else:
        record("commit", "cpu")
        _C.commit(_bound_commit(c))
        # The kernel wrote through raw pointers: autograd and functionalization must be told.
        torch.autograd.graph.increment_version(c.written)


def _why_not_commit(weight, importance, trace) -> str:
    why = why_not(weight.dtype)
    if not why and importance is not None and trace is not None and importance.dtype != trace.dtype:
        why = "no C++ kernel for importance and trace of different dtypes"
    return why


def _bound_commit(c: CommitArguments):
    """The arguments as ``_C.Commit``, the structure of addresses and sizes that the C++ kernel takes."""
    (m, n), pulls = c.weight.shape, c.lam > 0
    state = c.importance if pulls else c.trace
    return _C.Commit(
        weight=c.weight.data_ptr(),
        anchor=address(c.anchor if pulls or c.decay > 0 or c.replay_rows else None),
        importance=address(c.importance if pulls else None),
        trace=address(c.trace),
        x=c.x.data_ptr(),
        delta=c.delta.data_ptr(),
        eta=c.eta.data_ptr(),
        trace_delta=c.traced_delta.data_ptr(),
        memory=address(c.memory),
        seen=address(c.seen),
        step=c.step.data_ptr(),
        m=m,
        n=n,
        tokens=c.eta.numel(),
        capacity=c.memory.shape[0] if c.memory is not None and c.replay_rows else 0,
        replay_rows=c.replay_rows,
        trace_every=c.trace_every,
        seed=c.seed & MASK64,
        beta=c.beta,
        eps=c.eps,
        lam=c.lam,
        gamma=c.gamma,
        dtype=DTYPE_CODES[c.weight.dtype],
        state_dtype=0 if state is None else DTYPE_CODES[state.dtype],
        kind=schema.KINDS.index(c.kind),
        threads=torch.get_num_threads(),
        momentum=address(c.momentum),
        mu=c.mu,
        decay=c.decay,
        momentum_dtype=0 if c.momentum is None else DTYPE_CODES[c.momentum.dtype],
    )


def reservoir_insert(memory, seen, x, seed, gate=None) -> None:
    schema.check_reservoir_insert(memory, seen, x, seed, gate)
    if closed(gate):
        return
    if _C is None:
        record("reservoir_insert", "reference", unavailable["cpu"])
        return reference.reservoir_insert(memory, seen, x, seed)
    record("reservoir_insert", "cpu")
    row_bytes = memory.shape[1] * memory.element_size()
    _C.reservoir_insert(
        memory.data_ptr(), seen.data_ptr(), x.data_ptr(), memory.shape[0], x.shape[0], row_bytes, seed & MASK64
    )
    torch.autograd.graph.increment_version([memory, seen])


def reservoir_draw(seen, step, capacity, rows, seed):
    schema.check_reservoir_draw(seen, step, capacity, rows, seed)
    if _C is None:
        record("reservoir_draw", "reference", unavailable["cpu"])
        reference.count_of("seen", seen)
        return reference.reservoir_draw(seen, step, capacity, rows, seed)
    record("reservoir_draw", "cpu")
    index = torch.empty((rows,), dtype=torch.int64)
    _C.reservoir_draw(seen.data_ptr(), step.data_ptr(), index.data_ptr(), capacity, rows, seed & MASK64)
    return index


for _function in (window_linear, project_out, window_append, commit, reservoir_insert, reservoir_draw):
    schema.implement(_function.__name__, "CPU", _function)
