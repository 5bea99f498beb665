"""The model of the GPU kernels' times, and the predictions that it wrote."""

import json

import pytest

from bench.kernels import predict
from bench.kernels.predict import ASSUMED, CEILINGS, Work, resident, seconds

CODE = {"registers": 64, "shared": 0, "warps": 4, "loads": {"128": 8}}


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(128, 4096, 4, 4), (124, 4096, 4, 4), (54, 1024, 8, 4), (255, 0, 8, 1), (32, 100 * 1024, 4, 2), (16, 0, 1, 32)],
)
def test_programs_that_a_multiprocessor_holds(registers, shared, warps, programs):
    assert resident(registers, shared, warps) == programs


def test_a_large_launch_takes_the_larger_of_its_bounds():
    many, copy = 132 * 8 * 10, CEILINGS["H100"]["copy"]
    assert seconds(Work(copy), many, CODE, "H100") == (ASSUMED["start"] + 1, "bytes")
    assert seconds(Work(copy, 2 * 790e12), many, CODE, "H100") == (ASSUMED["start"] + 2, "flops")
    assert seconds(Work(copy, 2 * 54e12, "float32"), many, CODE, "H200")[1] == "flops"
    assert seconds(Work(0, steps=16), 1, CODE, "H100") == (ASSUMED["start"] + 8e-6, "steps")
    # In 8.25 rounds the last one is nearly empty.
    assert seconds(Work(0, 790e12), 132 * 8 * 8 + 264, CODE, "H100")[0] == pytest.approx(9 / 8.25, rel=1e-5)


def test_few_programs_do_not_fill_the_memory():
    """132 programs of 128 threads with 128 bytes each: 2.2 MB in flight, of the 2.4 MB that 3 TB/s need."""
    took, by = seconds(Work(3e9), 132, CODE, "H100")
    assert by == "bytes"
    assert took == pytest.approx(1e-3 * 2.4e6 / (132 * 128 * 128) + ASSUMED["start"])


def test_the_committed_predictions_are_those_of_the_model():
    found = json.loads(predict.RESULTS.read_text())
    assert found["what"] == "predictions of a model, not measurements"
    assert (found["ceilings"], found["assumed"]) == (CEILINGS, ASSUMED)
    for row in found["rows"]:
        assert row["predicted"] == {gpu: predict.of_row(row, gpu) for gpu in CEILINGS}
        assert all(times["us"] > times["bound_us"] for times in row["predicted"].values())
