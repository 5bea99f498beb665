"""Triton's interpreter computes without its repeated work what it computes with it."""

import pytest
import torch
import triton
import triton.language as tl

from ttt.ops.triton.common import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled")

if INTERPRETED:
    import interpreter
    from triton.runtime import interpreter as triton_interpreter


@triton.jit
def twice(x):
    return x + x


@triton.jit
def words(seed, counter, STREAM: tl.constexpr):
    w0, w1, w2, w3 = tl.philox(seed, counter, counter * 0, counter * 0 + 7, STREAM)
    return w0 ^ w1 ^ w2 ^ w3


@triton.jit
def draw(out, seed, SIZE: tl.constexpr, STREAM: tl.constexpr):
    """Store twice the words of the counters 0, 1, ..., for every program the same; they are drawn two times."""
    k = tl.arange(0, SIZE)
    drawn = words(seed, k.to(tl.uint32), STREAM) + words(seed, k.to(tl.uint32), STREAM) * 0
    tl.store(out + tl.program_id(0) * SIZE + k, twice(drawn.to(tl.int64)))


def launched(programs=3, size=8, seed=5, stream=1):
    out = torch.zeros(programs, size, dtype=torch.int64)
    draw[(programs,)](out, seed, size, stream)
    return out


@pytest.fixture
def as_triton_does(monkeypatch):
    """Set the interpreter back to what it is without `interpreter.work_once`."""

    def set_back():
        monkeypatch.setattr(triton_interpreter.GridExecutor, "__call__", interpreter.triton_launch)
        monkeypatch.setattr(triton_interpreter.InterpretedFunction, "__call__", interpreter.triton_call)
        monkeypatch.setattr(triton_interpreter, "_patch_lang", interpreter.triton_replace)
        monkeypatch.setattr(triton_interpreter, "_get_np_dtype", interpreter.triton_numpy_type)
        monkeypatch.setattr(tl.block_type, "__init__", interpreter.triton_block_type)
        monkeypatch.setattr(tl.tensor, "__init__", interpreter.triton_tensor)
        monkeypatch.setattr(tl.dtype, "__eq__", interpreter.triton_equal)

    return set_back


def test_words_are_those_that_triton_draws(as_triton_does):
    cases = [(seed, stream, size) for seed in (5, 6, 2**63 + 9) for stream in (1, 2) for size in (2, 8, 2048)]
    first, again = ([launched(2, size, seed, stream) for seed, stream, size in cases] for _ in range(2))
    as_triton_does()
    for case, ours, repeated in zip(cases, first, again, strict=True):
        seed, stream, size = case
        wanted = launched(2, size, seed, stream)
        assert torch.equal(ours, wanted), case
        assert torch.equal(repeated, wanted), case
    small = [t[:, :2] for t in first]
    assert len({tuple(t.flatten().tolist()) for t in small}) == 6  # one for each seed and stream


def test_few_words_are_drawn_once(monkeypatch):
    calls = []

    def count(self, *args, **kwargs):
        calls.append(self.fn.__name__)
        return triton_call(self, *args, **kwargs)

    triton_call = interpreter.triton_call
    monkeypatch.setattr(interpreter, "triton_call", count)
    monkeypatch.setattr(interpreter, "drawn", {})
    launched(programs=3)
    launched(programs=3)
    assert (calls.count("words"), calls.count("twice"), calls.count("philox")) == (12, 6, 1)
    calls.clear()
    launched(programs=3, size=2048)
    assert calls.count("philox") == 6  # too many to be kept
    assert len(interpreter.drawn) == 1


def test_the_language_is_replaced_once_a_launch_and_set_back_after_it(monkeypatch):
    replaced, arange = [], tl.arange
    triton_replace = interpreter.triton_replace
    monkeypatch.setattr(interpreter, "triton_replace", lambda f: replaced.append(f.__name__) or triton_replace(f))
    for _ in range(2):
        replaced.clear()
        launched(programs=4)
        assert replaced[0] == "draw"
        assert replaced.count("draw") == 1
        assert not {"twice", "words"} & set(replaced)  # they name the language as the kernel does
        assert tl.arange is arange
    assert not interpreter.replaced


def test_a_launch_that_fails_sets_the_language_back():
    arange = tl.arange
    with pytest.raises(triton_interpreter.InterpreterError):
        launched(size=3)  # a range of Triton's is a power of two
    assert tl.arange is arange
    assert not interpreter.replaced
    assert int(launched(programs=1)[0, 0]) == int(launched(programs=2)[1, 0])


def described(element, shape):
    """What a type and a tensor of it say of themselves, as text; a ``shape`` of None is that of a scalar."""
    kind = element if shape is None else tl.block_type(element, shape)
    tensor = tl.tensor(None, kind)
    of_type = (kind.name, kind.primitive_bitwidth if shape is None else (kind.shape, kind.numel, kind.scalar))
    return str((of_type, tensor.shape, tensor.numel, tensor.dtype, tensor.type, triton_interpreter._get_np_dtype(kind)))


def test_types_and_tensors_are_those_that_triton_makes(as_triton_does):
    elements = [
        tl.int1,
        tl.int32,
        tl.uint32,
        tl.int64,
        tl.float16,
        tl.bfloat16,
        tl.float32,
        tl.pointer_type(tl.float32),
    ]
    shapes = [[1], [16], [tl.constexpr(4), 8], tl.tuple([tl.constexpr(2), tl.constexpr(2), tl.constexpr(32)])]
    cases = [(element, shape) for element in elements for shape in (*shapes, *([] if element.is_ptr() else [None]))]
    first, again = ([described(*case) for case in cases] for _ in range(2))
    kinds = [tl.block_type(element, [size]) for element in elements for size in (2, 4)]
    same = [[a == b for b in (*kinds, *elements)] for a in (*kinds, *elements)]
    for shape in ([3], []):
        with pytest.raises((ValueError, TypeError), match=r"power of 2|0d block_type"):
            tl.block_type(tl.float32, shape)
    as_triton_does()
    assert first == again == [described(*case) for case in cases]
    assert same == [[a == b for b in (*kinds, *elements)] for a in (*kinds, *elements)]
    assert sum(map(sum, same)) == len(same)  # each is equal to itself alone
