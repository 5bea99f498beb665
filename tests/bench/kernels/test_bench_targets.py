"""The page of targets: counts of reached and missed targets, and the committed page against the committed results."""

from bench.kernels import targets
from bench.kernels.check import RESULTS, load


def row(tokens: int, percent: float, **more):
    shape = {"case": f"8x8, T = {tokens}", "m": 8, "tokens": tokens, "dtype": "bfloat16", "state": "bfloat16"}
    return {"suite": "commit", "ours": True, **shape, "percent_of_copy": percent, "percent_of_matmul": percent, **more}


def cells(rows):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in targets.lines(rows)[2:]]


def test_rows_that_miss_a_lower_bound_are_listed():
    few, many = cells([row(1, 70.0), row(16, 69.94), row(64, 60.0), row(64, 12.34, dtype="float32", ours=False)])
    assert few[1:4] == ["bfloat16", "1 of 2", "8x8, T = 16: 69.9"]
    assert few[4].startswith("arithmetic")
    assert many[1:] == ["bfloat16", "1 of 1", "", ""]  # without the row of another contender


def test_rows_that_miss_an_upper_bound_are_listed_with_further_figures():
    decode = {"suite": "decode", "ours": True, "dtype": "bfloat16", "state": "8bit", "m": 4096}
    line = cells(
        [{**decode, "case": f"window {w}, 8bit state", "ratio_to_bound": b} for w, b in ((16, 1.1), (64, 1.11))]
    )
    assert line[0][1:4] == ["8bit", "1 of 2", "window 64: 1.11"]
    read = {**decode, "case": "window 64", "ratio_to_bound": 1.3, "ratio_to_read_bound": 1.054}
    assert cells([read])[0][3] == "window 64: 1.30 (1.05 x at the rate of a pure read)"
    parts = {**read, "ratio_to_part_bound": 1.1, "ratio_to_part_sum": 0.96}
    assert cells([parts])[0][3] == (
        "window 64: 1.30 (1.10 x the bound with G and S beside the bytes, 0.96 x with G and S after them)"
    )
    # 64 Mi flops at 0.4 Tflop/s are 168 us, of a bound of 1000 us.
    products = {**decode, "case": "window 64", "n": 4096, "us": 1300, "ratio_to_bound": 1.3, "matmul_tflop_per_s": 0.4}
    assert cells([products])[0][3] == "window 64: 1.30 (G and S at the rate of torch's matmul: 0.17 x)"


def test_the_committed_page_is_made_from_the_committed_results(tmp_path):
    for name in ("commit", "layers"):
        (tmp_path / f"cpu_{name}.json").write_text((RESULTS / f"cpu_{name}.json").read_text())
    targets.main(tmp_path)
    assert (tmp_path / "cpu_targets.md").read_text() == (RESULTS / "cpu_targets.md").read_text()
    assert all(any(target.takes(r) for r in load(RESULTS / "cpu_layers.json")["rows"]) or "commit" in target.title
               for target in targets.TARGETS)  # fmt: skip
