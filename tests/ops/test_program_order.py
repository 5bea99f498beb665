"""No Triton kernel depends on the order in which a GPU starts its programs, and none waits for another program."""

import ast
import signal
from pathlib import Path

import pytest
import torch

from ttt.ops.triton import append, commit, common, low_rank, project, reservoir, window_linear
from ttt.ops.triton import low_rank_compress as compress

pytestmark = pytest.mark.skipif(not common.INTERPRETED, reason="a GPU chooses the order itself")

T, M, N, C = 5, 70, 130, 19


def floats(*shape):
    return torch.randn(shape)


def count(*values):
    return torch.tensor(values)


def decode(tokens):
    args = floats(tokens, N), floats(M, N), floats(M), floats(C, N), floats(C, M), torch.rand(C)
    return args, window_linear.window_linear


def users(tokens):
    args = floats(tokens, N), floats(M, N), None, floats(3, C, N), floats(3, C, M), count(4, C, 0).int()
    return (*args, torch.randint(-1, 3, (tokens,), dtype=torch.int32)), low_rank.low_rank_linear


def appended():
    args = floats(C, N), floats(C, M), torch.zeros(C), None, floats(T, N), floats(T, M), torch.rand(T), None
    return (*args, 0, count(4, 0, 0), count(9), None), append.window_append


def committed(tokens):
    weights = floats(M, N), floats(M, N), torch.rand(M, N), torch.rand(M, N)
    rows = floats(tokens, N), floats(tokens, M), torch.rand(tokens) * 0.01, None
    memory, options = (floats(20, N), count(9), count(3)), (7, 4, 0.3, 1e-3, 0.5, 0.9, "fisher", 1, None)
    return (*weights, *rows, *memory, *options), commit.commit


def compressed():
    counters = [torch.rand(2), torch.rand(2), count(3, 4)]
    return (floats(2, 9, N), floats(2, 9, M), count(9, 7).int(), *counters, count(1, 0), 3, 0.0, None, None, None, None,
            7, 0, 0.3, 1e-3), compress.low_rank_compress  # fmt: skip


CASES = {
    "one token": lambda: decode(1),
    "few tokens": lambda: decode(T),
    "many tokens": lambda: decode(33),
    "users": lambda: users(T),
    "many tokens of users": lambda: users(70),
    "append": appended,
    "commit": lambda: committed(T),
    "panels": lambda: committed(257),
    "compress": compressed,
    "project": lambda: ((floats(T, N), floats(3, N)), project.project_out),
    "insert": lambda: ((floats(4, N), count(30), floats(T, N), 7), reservoir.reservoir_insert),
}


@pytest.fixture
def ends():
    """Raise instead of hanging where a program waits for one that runs later."""

    def stop(number, frame):
        raise TimeoutError("a program waits for one that has not begun")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("case", CASES)
def test_programs_in_the_opposite_order_give_the_same_bits(case, ends, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    given, function = CASES[case]()

    def outcome():
        args = [a.clone() if torch.is_tensor(a) else a for a in given]
        result = function(*args)
        return [t for t in (*args, result) if torch.is_tensor(t)]

    expected, set_place = outcome(), builder.set_grid_idx

    def from_the_end(*place):
        set_place(*(size - 1 - at for size, at in zip(builder.grid_dim, place, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", from_the_end)
    assert all(torch.equal(t, want) for t, want in zip(outcome(), expected, strict=True))


def test_no_loop_goes_on_until_another_program_has_written():
    """A loop whose end depends on an atomic or on a load would wait: a GPU may never start the program that writes."""
    loops = [
        (file.name, ast.unparse(node.test))
        for file in Path(common.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.While)
    ]
    assert loops  # some go on over data in registers
    assert not [loop for loop in loops if "atomic" in loop[1] or "load" in loop[1] or loop[1] == "True"]
