"""The figures of the bench: quartiles, the rows of the JSON, and contenders that are not timed."""

import dataclasses
import time

import numpy as np
import pytest
from tiny_cases import tiny_commit

from bench.kernels import measure, timing
from bench.kernels.case import Case
from bench.kernels.contender import Contender, Unavailable


def test_quartiles_are_those_of_numpy():
    values = [5.0, 1.0, 4.0, 9.0, 2.0, 2.5]
    assert timing.quartiles(values) == pytest.approx(np.percentile(values, [25, 50, 75]))
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_ratios_are_medians_of_the_ratios_of_the_rounds():
    case = tiny_commit(replay=0)
    rate = 2e9  # bytes per second, in the first and second round; half of it in the third
    times = {"ttt": [1e-3, 2e-3, 4e-3], "plain torch": [4e-3, 4e-3, 4e-3], "forward": [1e-4, 1e-4, 1e-4]}
    times["copy"] = [1 / rate, 1 / rate, 2 / rate]
    row = measure.row_of(case, "ttt", times, {"more": 1})
    assert row["us"] == 2000
    assert (row["us_q1"], row["us_q3"]) == (1500, 3000)
    assert row["ratio"] == 0.5
    assert row["ratio_to_forward"] == 20
    assert row["us_above_baseline"] == -2000
    moved = case.bytes("ttt")
    assert row["gb_per_s"] == pytest.approx(moved / 2e-3 / 1e9, rel=1e-5)
    # Rounds: 1e-3 / (moved / rate), twice that, and twice that again at half the rate.
    assert row["percent_of_copy"] == pytest.approx(100 * moved / rate / 2e-3, rel=1e-5)
    assert row["ratio_to_bound"] == pytest.approx(100 / row["percent_of_copy"], rel=1e-5)
    assert row["copy_gb_per_s"] == 2
    assert row["ratio_to_read_bound"] is None
    read = measure.row_of(case, "ttt", times | {"read": [2 / rate, 2 / rate, 4 / rate]}, {})
    assert read["ratio_to_read_bound"] == pytest.approx(row["ratio_to_bound"] / 2, rel=1e-5)
    assert read["read_gb_per_s"] == 1
    assert measure.summary_of_ceilings([row, read]) == {"copy_gb_per_s": 2, "read_gb_per_s": 1}
    assert row["ours"] is True
    assert row["percent_of_matmul"] is None
    assert row["more"] == 1
    assert measure.row_of(case, "plain torch", times, {})["ours"] is False


@dataclasses.dataclass(frozen=True)
class Broken(Case):
    """A case with a contender that is wrong, one that is right, and one that is unavailable."""

    suite, baseline, name = "broken", "good", "case"

    def bytes(self, contender):
        return 8

    def flops(self, contender):
        return None

    def contenders(self):
        def absent():
            raise Unavailable("xyz is not installed")

        def wrong():
            raise AssertionError("off by 3")

        never = lambda: pytest.fail("an unchecked contender ran")  # noqa: E731
        return {
            "ttt": lambda: Contender(never, wrong),
            "good": lambda: Contender(lambda: None, lambda: None),
            "absent": absent,
        }


def test_contenders_that_fail_their_check_are_reported_and_not_timed():
    rows, not_timed = measure.measure(Broken("cpu", "float32"), rounds=3)
    assert [row["contender"] for row in rows] == ["good"]
    assert rows[0]["rounds"] == 3
    assert {(r["contender"], r["reason"], r["failed"]) for r in not_timed} == {
        ("ttt", "AssertionError: off by 3", True),
        ("absent", "xyz is not installed", False),
    }


class Sleeping(Broken):
    """A contender that waits for 20 ms a unit, and computes nothing."""

    def contenders(self):
        return {"ttt": lambda: Contender(lambda: time.sleep(0.02), lambda: None)}


def test_the_clock_of_the_processor_leaves_out_what_a_contender_waits():
    us = {clock: measure.measure(Sleeping("cpu", "float32"), 3, clock=clock)[0][0]["us"] for clock in ("wall", "cpu")}
    assert us["wall"] >= 20_000
    assert us["cpu"] < 10_000
