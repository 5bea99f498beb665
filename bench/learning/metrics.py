"""Measures of continual learning as defined in the literature, and confidence intervals over seeds.

R (T, T): R[i][j] is the accuracy on task j after learning task i, both counted from 0; None if it was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Matrix = Sequence[Sequence[float | None]]

# Student's t, two-sided 95 %, by degrees of freedom 1, 2, ...
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def _square(matrix: Matrix) -> int:
    size = len(matrix)
    if size == 0 or any(len(row) != size for row in matrix):
        raise ValueError(f"matrix must be square and not empty, got rows of {[len(row) for row in matrix]}")
    return size


def _entry(matrix: Matrix, i: int, j: int) -> float:
    value = matrix[i][j]
    if value is None:
        raise ValueError(f"matrix needs a number at row {i}, column {j}, got None")
    return value


def average_accuracy(matrix: Matrix) -> float:
    """ACC = 1/T sum_j R[T-1][j] (Lopez-Paz & Ranzato, "Gradient Episodic Memory", 2017).

    Raises:
        ValueError: if the matrix is not square, or its last row has a gap.
    """
    size = _square(matrix)
    return sum(_entry(matrix, size - 1, j) for j in range(size)) / size


def backward_transfer(matrix: Matrix) -> float | None:
    """BWT = 1/(T-1) sum_{j < T-1} (R[T-1][j] - R[j][j]) (Lopez-Paz & Ranzato); negative is forgetting. None for T = 1.

    Raises:
        ValueError: if the matrix is not square, or an entry it needs is None.
    """
    size = _square(matrix)
    if size == 1:
        return None
    return sum(_entry(matrix, size - 1, j) - _entry(matrix, j, j) for j in range(size - 1)) / (size - 1)


def forward_transfer(matrix: Matrix, untrained: Sequence[float]) -> float | None:
    """FWT = 1/(T-1) sum_{j > 0} (R[j-1][j] - b[j]) (Lopez-Paz & Ranzato), b being the untrained model's accuracies.

    None for T = 1, and if the accuracy on a task before it was learnt was not measured.

    Raises:
        ValueError: if the matrix is not square, or ``untrained`` has another length.
    """
    size = _square(matrix)
    if len(untrained) != size:
        raise ValueError(f"untrained must hold {size} accuracies, got {len(untrained)}")
    before = [matrix[j - 1][j] for j in range(1, size)]
    if size == 1 or any(value is None for value in before):
        return None
    return sum(value - b for value, b in zip(before, untrained[1:], strict=True) if value is not None) / (size - 1)


def forgetting(matrix: Matrix) -> float | None:
    """F = 1/(T-1) sum_{j < T-1} (max_{j <= i < T-1} R[i][j] - R[T-1][j]) (Chaudhry et al., "Riemannian Walk", 2018).

    None for T = 1.

    Raises:
        ValueError: if the matrix is not square, or an entry it needs is None.
    """
    size = _square(matrix)
    if size == 1:
        return None
    lost = [
        max(_entry(matrix, i, j) for i in range(j, size - 1)) - _entry(matrix, size - 1, j) for j in range(size - 1)
    ]
    return sum(lost) / (size - 1)


def intransigence(matrix: Matrix, joint: Sequence[float]) -> float:
    """I = 1/T sum_j (a*[j] - R[j][j]) (Chaudhry et al.; there for the last task, here the mean over all).

    a*[j] is the accuracy on task j of a model trained on tasks 0 to j together.

    Raises:
        ValueError: if the matrix is not square, its diagonal has a gap, or ``joint`` has another length.
    """
    size = _square(matrix)
    if len(joint) != size:
        raise ValueError(f"joint must hold {size} accuracies, got {len(joint)}")
    return sum(best - _entry(matrix, j, j) for j, best in enumerate(joint)) / size


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of the 95 % confidence interval by Student's t); the width for a single value is nan.

    Raises:
        ValueError: if there is no value.
    """
    n = len(values)
    if n == 0:
        raise ValueError("values must hold at least one number, got none")
    mean = sum(values) / n
    if n == 1:
        return mean, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    return mean, t * deviation / math.sqrt(n)


# -- streams of text, measured in bits per byte: lower is better ------------------------------------------------------


def _last_visits(matrix: Matrix, visits: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Column -> (first row, last row) in which its task was taught, without the task of the last row."""
    if not visits or len(matrix) != len(visits):
        raise ValueError(f"visits must name a column for each of the {len(matrix)} rows, got {len(visits)}")
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for row, column in enumerate(visits):
        first.setdefault(column, row)
        last[column] = row
    return {c: (first[c], last[c]) for c in first if c != visits[-1]}


def recurring_forgetting(bits: Matrix, visits: Sequence[int]) -> float | None:
    """`forgetting` for tasks that recur: the mean over tasks of (last row - lowest row before it), in bits per byte.

    Only rows from the one that first taught a task count for it. The task of the last segment is left out.

    Args:
        bits: ``bits[i][j]`` are the bits per byte on task j after segment i.
        visits: ``visits[i]`` is the task that segment i taught.

    Returns:
        None if there is only one task.

    Raises:
        ValueError: if ``visits`` does not name a task for each row, or an entry that is needed is None.
    """
    tasks = _last_visits(bits, visits)
    end = len(bits) - 1
    best = {c: min(_entry(bits, i, c) for i in range(first, end)) for c, (first, _) in tasks.items()}
    lost = [_entry(bits, end, c) - least for c, least in best.items()]
    return sum(lost) / len(lost) if lost else None


def recurring_backward_transfer(bits: Matrix, visits: Sequence[int]) -> float | None:
    """`backward_transfer` for tasks that recur: the mean over tasks of (row that last taught it - last row).

    In bits per byte, so that negative values are forgetting, as for accuracy. For arguments and errors see
    `recurring_forgetting`.
    """
    tasks = _last_visits(bits, visits)
    end = len(bits) - 1
    moved = [_entry(bits, last, c) - _entry(bits, end, c) for c, (_, last) in tasks.items()]
    return sum(moved) / len(moved) if moved else None


def recovery(bits: Sequence[float], level: float, window: int, tolerance: float = 0.05) -> int:
    """Number of bytes read until the mean of the latest ``window`` is at most ``level * (1 + tolerance)``.

    It is at least ``window``, and the length of the segment if the mean never is so low.

    Args:
        bits: bits of each byte of the segment.
        level: bits per byte at the end of the previous segment of the same domain.
    """
    total = sum(bits[: window - 1])
    for end in range(window, len(bits) + 1):
        total += bits[end - 1]
        if total / window <= level * (1 + tolerance):
            return end
        total -= bits[end - window]
    return len(bits)


def share(value: float, of: float) -> float | None:
    """``value / of``; None if ``of`` is not positive."""
    return value / of if of > 0 else None
