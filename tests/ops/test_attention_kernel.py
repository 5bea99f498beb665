"""The C++ kernel for the gradients of attention: each instruction set, both dtypes, odd shapes, masks."""

import math

import pytest
import torch
from helpers import assert_close

from ttt.ops import cpu

DTYPES = [torch.float32, torch.bfloat16]
# Batch, heads, heads of keys, queries, keys, width, width of values.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1), (2, 6, 2, 5, 9, 33, 17), (1, 9, 3, 64, 130, 64, 64), (3, 4, 4, 23, 23, 8, 40),
    (1, 4, 1, 70, 90, 16, 16), (1, 2, 1, 1, 37, 20, 20),
]  # fmt: skip


def inputs_of(shape, dtype):
    batch, heads, key_heads, queries, keys, width, value_width = shape
    sizes = (heads, queries, width), (key_heads, keys, width), (key_heads, keys, value_width)
    q, k, v, grad = (torch.randn(batch, *size).to(dtype) for size in (*sizes, (heads, queries, value_width)))
    return q, k, v, grad


def gradients(q, k, v, grad, mask, causal, scale, dtype):
    """By autograd, in plain torch at ``dtype``; a query that sees nothing has the output 0."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (q, k, v))
    group, (queries, keys) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    seen = torch.ones(queries, keys, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    seen = seen if mask is None else seen & mask
    scores = scale * q @ k.repeat_interleave(group, 1).mT
    p = scores.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen, 0.0)
    out = p @ v.repeat_interleave(group, 1)
    return torch.autograd.grad(out, (q, k, v), grad.to(dtype))


def assert_gradients(found, given, mask, causal, scale, first=0):
    dtype = given[0].dtype
    exact = gradients(*given, mask, causal, scale, torch.float64)
    plain = gradients(*given, mask, causal, scale, dtype)
    for name, own, right, other, begin in zip("qkv", found, exact, plain, (0, first, first), strict=True):
        assert own.dtype == dtype
        assert_close(own[:, :, begin:], right[:, :, begin:], other[:, :, begin:], f"d{name}")
        assert not own[:, :, :begin].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(isa, dtype, shape, causal):
    given = inputs_of(shape, dtype)
    kept = [t.clone() for t in given]
    found = cpu.attention_backward(*given, None, causal=causal, scale=0.3)
    assert_gradients(found, given, None, causal, 0.3)
    assert all(torch.equal(t, before) for t, before in zip(given, kept, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_behind_a_cache(isa, dtype, shape):
    """As of a chunk of a text: each query sees the keys before it; of the first keys no gradients are wanted."""
    queries, keys = shape[3:5]
    first = keys - queries
    given, mask = inputs_of(shape, dtype), torch.ones(queries, keys, dtype=torch.bool).tril(first)[None, None]
    found = cpu.attention_backward(*given, mask, causal=False, scale=shape[5] ** -0.5, first=first)
    assert_gradients(found, given, mask, False, shape[5] ** -0.5, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("by_head", [False, True])
def test_masks(isa, dtype, shape, by_head):
    """Random ones, which differ from row to row of the batch; some queries see nothing, others keys in the middle."""
    batch, heads, _, queries, keys = shape[:5]
    mask = torch.rand(batch, heads if by_head else 1, queries, keys) < 0.4
    mask[:, :, 0] = False
    mask[-1, :, -1, : keys // 2] = False
    given = inputs_of(shape, dtype)
    found = cpu.attention_backward(*given, mask, causal=False, scale=0.2)
    assert_gradients(found, given, mask, False, 0.2)
    assert not found[0][:, :, 0].any()
    assert_gradients(cpu.attention_backward(*given, mask, causal=True, scale=0.2), given, mask, True, 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_lie_in_memory_as_models_make_them(isa, dtype):
    """The heads of a token follow each other, keys are the last part of a longer cache, and a mask is expanded."""
    given = inputs_of((2, 6, 2, 7, 11, 24, 24), dtype)
    right = cpu.attention_backward(*given, None, causal=False, scale=0.2)
    q, k, v, grad = given
    moved = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, grad)]
    cached = [torch.cat([torch.full_like(t, math.nan), t], 2)[:, :, 11:] for t in (k, v)]
    mask = torch.ones(1, 1, 1, 11, dtype=torch.bool).expand(2, 1, 7, 11)
    found = cpu.attention_backward(moved[0], *cached, moved[1], mask, causal=False, scale=0.2)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    columns = [t.mT.contiguous().mT for t in given]  # numbers of a row are apart
    found = cpu.attention_backward(*columns, None, causal=False, scale=0.2)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_of_the_batch_are_computed_apart(isa, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        given = inputs_of((3, 4, 2, 9, 14, 16, 16), dtype)
        right = cpu.attention_backward(*given, None, causal=True, scale=0.25)
        alone = cpu.attention_backward(*(t[1:2] for t in given), None, causal=True, scale=0.25)
        assert all(torch.equal(a[1:2], b) for a, b in zip(right, alone, strict=True))
        for spoilt, bad in zip(given, (math.nan, math.inf, -math.inf, math.nan), strict=True):
            spoilt[0, 1, 2, 3] = bad
        found = cpu.attention_backward(*given, None, causal=True, scale=0.25)
        assert all(torch.equal(a[1:], b[1:]) for a, b in zip(found, right, strict=True))
        assert not any(torch.isfinite(t[0]).all() for t in found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(isa, dtype, at, bad):
    given = inputs_of((1, 2, 1, 6, 8, 16, 16), dtype)
    given[at][0, 0, 3, 5] = bad
    found = cpu.attention_backward(*given, None, causal=False, scale=0.25)
    assert not all(torch.isfinite(t).all() for t in found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_query_sees_has_no_effect(isa, dtype):
    given, mask = inputs_of((1, 2, 1, 6, 40, 16, 16), dtype), torch.ones(1, 1, 6, 40, dtype=torch.bool)
    mask[..., 21:25] = False
    right = cpu.attention_backward(*given, mask, causal=False, scale=0.25)
    for t in given[1:3]:
        t[:, :, 21:25] = 1e4
    found = cpu.attention_backward(*given, mask, causal=False, scale=0.25)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert not any(t[:, :, 21:25].any() for t in found[1:])


def test_large_scores(isa):
    """Of which the softmax is 1 at one key, and the exponential of the others is 0."""
    given = inputs_of((1, 2, 2, 5, 7, 8, 8), torch.float32)
    given = given[0] * 100, given[1] * 100, *given[2:]
    assert_gradients(cpu.attention_backward(*given, None, causal=False, scale=1.0), given, None, False, 1.0)


def test_tensors_that_do_not_fit_are_refused_by_name():
    q, k, v, grad = inputs_of((2, 4, 2, 3, 5, 8, 6), torch.float32)
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    right = {"q": q, "k": k, "v": v, "grad": grad, "mask": mask}
    wrong = {
        "k": k.bfloat16(), "v": v[:, :, :4], "grad": grad[:, :2], "mask": mask.float(), "q": q.double(),
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"^{name} must be"):
            cpu.attention_backward(**right | {name: value}, causal=False, scale=0.1)
    for name in ("mask", "v"):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            cpu.attention_backward(**right | {name: right[name][:, :, :2]}, causal=False, scale=0.1)
    for options in ({"scale": 0.0}, {"scale": math.nan}, {"scale": 0.1, "first": 6}, {"scale": 0.1, "first": -1}):
        with pytest.raises(ValueError, match="attention_backward takes scale > 0"):
            cpu.attention_backward(**right, causal=False, **options)
    for changed in ({"q": q[:, :3], "grad": grad[:, :3]}, {"k": k[:, :, :0], "v": v[:, :, :0], "mask": mask[..., :0]}):
        with pytest.raises(ValueError, match="attention_backward takes scale > 0"):
            cpu.attention_backward(**right | changed, causal=False, scale=0.1)
