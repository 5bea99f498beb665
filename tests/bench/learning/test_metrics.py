"""The metrics on matrices computed by hand."""

import math

import pytest

from bench.learning import metrics
from bench.learning.runs import Journal

# Three tasks. Task 0 is best after task 1 (.95), not when it was learnt (.9): BWT and forgetting differ.
R = [
    [0.90, 0.30, 0.10],
    [0.95, 0.80, 0.20],
    [0.50, 0.60, 0.70],
]


def test_average_accuracy_is_the_mean_of_the_last_row():
    assert metrics.average_accuracy(R) == pytest.approx((0.5 + 0.6 + 0.7) / 3)


def test_backward_transfer_divides_by_the_number_of_tasks_less_one():
    assert metrics.backward_transfer(R) == pytest.approx(((0.5 - 0.9) + (0.6 - 0.8)) / 2)


def test_forward_transfer_is_relative_to_the_untrained_model():
    assert metrics.forward_transfer(R, [0.5, 0.25, 0.15]) == pytest.approx(((0.3 - 0.25) + (0.2 - 0.15)) / 2)
    assert metrics.forward_transfer([[1.0, None], [1.0, 1.0]], [0.1, 0.1]) is None


def test_forgetting_is_from_the_best_earlier_row():
    assert metrics.forgetting(R) == pytest.approx(((0.95 - 0.5) + (0.8 - 0.6)) / 2)
    # The last row does not count as an earlier row: forgetting of a task that improved is negative.
    assert metrics.forgetting([[0.5, 0.0], [0.7, 0.9]]) == pytest.approx(-0.2)
    # Accuracy from before a task was learnt does not count.
    assert metrics.forgetting([[0.5, 0.9, 0.0], [0.5, 0.6, 0.0], [0.5, 0.6, 0.1]]) == pytest.approx(0.0)


def test_intransigence_is_joint_training_minus_the_diagonal():
    assert metrics.intransigence(R, [0.92, 0.9, 0.95]) == pytest.approx(((0.92 - 0.9) + (0.9 - 0.8) + (0.95 - 0.7)) / 3)


def test_transfer_and_forgetting_of_a_single_task_are_undefined():
    assert metrics.average_accuracy([[0.4]]) == 0.4
    assert metrics.backward_transfer([[0.4]]) is None
    assert metrics.forward_transfer([[0.4]], [0.1]) is None
    assert metrics.forgetting([[0.4]]) is None


# Bits per byte of domains A, B and C after the segments A B A C B.
BITS = [
    [2.0, None, None],
    [2.3, 1.5, None],
    [1.9, 1.7, None],
    [2.2, 1.6, 1.0],
    [2.4, 1.2, 1.1],
]
VISITS = [0, 1, 0, 2, 1]


def test_forgetting_of_recurring_tasks_is_from_the_best_row_since_the_first_visit():
    # A: 2.4 - 1.9; C: 1.1 - 1.0; B was the last segment's.
    assert metrics.recurring_forgetting(BITS, VISITS) == pytest.approx((0.5 + 0.1) / 2)
    # Without recurrence it is `forgetting` of the negative bits.
    plain = [[None if v is None else -v for v in row] for row in R]
    assert metrics.recurring_forgetting(plain, [0, 1, 2]) == pytest.approx(metrics.forgetting(R))
    assert metrics.recurring_backward_transfer(plain, [0, 1, 2]) == pytest.approx(metrics.backward_transfer(R))
    assert metrics.recurring_forgetting([[1.0]], [0]) is None
    assert metrics.recurring_backward_transfer([[1.0], [0.9]], [0, 0]) is None


def test_backward_transfer_of_recurring_tasks_is_from_the_last_visit():
    # A was last taught in row 2: 1.9 - 2.4; C in row 3: 1.0 - 1.1.
    assert metrics.recurring_backward_transfer(BITS, VISITS) == pytest.approx((-0.5 - 0.1) / 2)


def test_recovery_is_when_the_running_mean_reaches_the_level():
    bits = [4.0, 3.0, 2.0, 2.0, 1.0, 1.0]
    # Means of the latest two: 3.5, 2.5, 2, 1.5, 1.
    assert metrics.recovery(bits, 2.0, 2) == 4
    assert metrics.recovery(bits, 1.95, 2) == 4  # within 5 %
    assert metrics.recovery(bits, 1.9, 2) == 5
    assert metrics.recovery(bits, 0.5, 2) == 6  # never
    assert metrics.recovery(bits, 9.0, 2) == 2


def test_a_share_of_nothing_is_undefined():
    assert metrics.share(1.0, 4.0) == 0.25
    assert metrics.share(1.0, 0.0) is None
    assert metrics.share(1.0, -1.0) is None


def test_the_interval_is_by_students_t():
    mean, width = metrics.interval([0.1, 0.2, 0.3, 0.4, 0.5])
    assert mean == pytest.approx(0.3)
    assert width == pytest.approx(2.776 * math.sqrt(0.025) / math.sqrt(5))
    assert math.isnan(metrics.interval([0.5])[1])
    assert metrics.interval([0.0, 1.0] * 50)[1] == pytest.approx(1.96 * math.sqrt(25 / 99) / 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.average_accuracy([]), "square and not empty"),
        (lambda: metrics.forgetting([[0.1, 0.2], [0.3]]), r"got rows of \[2, 1\]"),
        (lambda: metrics.average_accuracy([[0.1, None], [0.3, None]]), "row 1, column 1, got None"),
        (lambda: metrics.forward_transfer(R, [0.1]), "untrained must hold 3 accuracies, got 1"),
        (lambda: metrics.intransigence(R, [0.1]), "joint must hold 3 accuracies, got 1"),
        (lambda: metrics.interval([]), "at least one number"),
        (lambda: metrics.recurring_forgetting(BITS, [0, 1]), "each of the 5 rows, got 2"),
        (lambda: metrics.recurring_forgetting([[1.0, None], [1.0, None], [1.0, 2.0]], [0, 1, 0]), "column 1, got None"),
    ],
)
def test_bad_matrices_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_journal_keeps_what_another_process_adds_meanwhile(tmp_path):
    def record(scenario):
        return {"scenario": scenario, "method": "frozen", "seed": 0, "options": {}, "protocol": {}}

    mine, other = Journal(tmp_path / "runs.jsonl"), Journal(tmp_path / "runs.jsonl")
    mine.add(record("a"))
    other.add(record("b"))
    mine.rewrite(lambda r: True)
    assert [r["scenario"] for r in Journal(tmp_path / "runs.jsonl").records.values()] == ["a", "b"]
    mine.rewrite(lambda r: r["scenario"] == "b")
    assert [r["scenario"] for r in Journal(tmp_path / "runs.jsonl").records.values()] == ["b"]
