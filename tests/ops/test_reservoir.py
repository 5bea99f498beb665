import pytest
import torch
from scipy.stats import chisquare

from ttt import ops
from ttt.ops import reference
from ttt.ops.triton import reservoir as kernel
from ttt.ops.triton.common import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("capacity", [1, 7, 33])
def test_insert_matches_the_reference_in_any_portions(capacity, dtype):
    rows = torch.randn(127, 5).to(dtype)
    memory, seen = torch.zeros(capacity, 5, dtype=dtype), torch.tensor([0])
    expected, expected_seen = memory.clone(), seen.clone()
    for part in rows.split([0, 1, 30, 90, 6]):
        ops.reservoir_insert(memory, seen, part.contiguous(), seed=11)
    reference.reservoir_insert(expected, expected_seen, rows, 11)
    assert torch.equal(memory, expected)
    assert int(seen) == int(expected_seen) == 127


def test_every_row_is_kept_with_the_same_probability():
    capacity, total, trials = 8, 40, 4000
    counts = torch.zeros(total)
    for trial in range(trials):
        memory, seen = torch.full((capacity, 1), -1.0), torch.tensor([0])
        ops.reservoir_insert(memory, seen, torch.arange(total).float().view(-1, 1), seed=trial)
        counts[memory.flatten().long()] += 1
    assert int(counts.sum()) == capacity * trials
    # Rows of one trial exclude each other, so the statistic is smaller than chi-square.
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_draws_are_uniform_and_match_the_reference():
    counts = torch.zeros(10)
    for step in range(3000):
        index = ops.reservoir_draw(torch.tensor([10]), torch.tensor([step]), capacity=32, rows=5, seed=2)
        counts += torch.bincount(index, minlength=10)
        if step % 500 == 0:
            expected = reference.reservoir_draw(torch.tensor([10]), torch.tensor([step]), 32, 5, 2)
            assert torch.equal(index, expected)
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_draw_from_an_empty_memory():
    index = ops.reservoir_draw(torch.tensor([0]), torch.tensor([0]), capacity=4, rows=3)
    assert index.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("change", "error"),
    [({"x": torch.zeros(2, 6)}, ValueError), ({"x": torch.zeros(2, 5).double()}, TypeError),
     ({"memory": torch.zeros(5, 8).T}, ValueError), ({"seen": torch.zeros(1)}, TypeError),
     ({"gate": torch.zeros(1)}, TypeError), ({"gate": torch.zeros(2, dtype=torch.int64)}, ValueError)],
)  # fmt: skip
def test_refused_insert_changes_nothing(change, error):
    case = {"memory": torch.randn(8, 5), "seen": torch.tensor([3]), "x": torch.randn(2, 5)} | change
    before = {k: t.clone() for k, t in case.items()}
    with pytest.raises(error):
        ops.reservoir_insert(**case)
    for k, t in before.items():
        assert torch.equal(case[k], t)


@pytest.mark.parametrize("by", ["kernel", "op"])
def test_of_a_pair_the_same_rows_are_kept(by):
    insert = kernel.reservoir_insert if by == "kernel" else torch.ops.ttt.reservoir_insert_pair
    memory, other = torch.zeros(7, 5, device=DEVICE), torch.zeros(7, 1030, device=DEVICE)
    seen, alone, alone_seen = torch.tensor([0], device=DEVICE), memory.clone(), torch.tensor([0], device=DEVICE)
    for rows in (1, 9, 30):
        x = torch.randn(rows, 5, device=DEVICE)
        d = torch.cat([x, torch.randn(rows, 1025, device=DEVICE)], 1)
        for gate in (0, 1):
            insert(memory, seen, x, 11, torch.tensor([gate], device=DEVICE), other, d)
        ops.reservoir_insert(alone, alone_seen, x, seed=11)
        assert torch.equal(memory, alone)
        assert torch.equal(other[:, :5], alone)
        assert int(seen) == int(alone_seen)


def test_a_pair_that_does_not_fit_is_refused():
    memory, seen, x = torch.zeros(7, 5), torch.tensor([0]), torch.randn(2, 5)
    for other, d, message in (
        (torch.zeros(6, 3), torch.randn(2, 3), r"memory_d must have shape \(7, m\), got \(6, 3\)"),
        (torch.zeros(7, 3), torch.randn(3, 3), r"d must have shape \(2, 3\), got \(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.ttt.reservoir_insert_pair(memory, seen, x, 1, None, other, d)
    assert int(seen) == 0
    assert not memory.any()
