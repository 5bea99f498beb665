"""Figures of a sequence of tasks, by their definitions in the literature, and intervals over seeds.

R (T x T): R[i][j] is the accuracy on task j after learning task i, both counted from 0. None where there is none.
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

    None for T = 1, and where a task cannot be answered before it was learnt.

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

    The maximum is over the rows before the last, from the one that learnt the task. None for T = 1.

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
    """(mean, half width of the 95 % interval by Student's t); the width of a single value is nan.

    Raises:
        ValueError: for no value.
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
