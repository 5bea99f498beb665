"""The commands of the bench: run, merge, check and plot."""

import dataclasses
import json
import shutil

import pytest
import torch
from tiny_cases import tiny_commit
from typer.testing import CliRunner

from bench.kernels import check, merge, plot, run, suites
from bench.kernels.suites.growth import layer_memory


def test_merge_joins_the_results_of_several_runs(tmp_path):
    row = {"suite": "decode", "dtype": "float32", "copy_gb_per_s": 3.0}
    parts: list = [{"machine": {"command": name}, "ceilings": {}, "not_timed": []} for name in "ab"]
    for part, name in zip(parts, "ab", strict=True):
        part["rows"] = [row | {"suite": name}]
    found = merge.merged(parts)
    assert [r["suite"] for r in found["rows"]] == ["a", "b"]
    assert found["machine"]["command"] == "a; b"
    assert found["ceilings"] == {"copy_gb_per_s": 3.0}
    (tmp_path / "a.json").write_text(json.dumps(parts[0]))
    merge.main(tmp_path / "out.json", [tmp_path / "missing.json", tmp_path / "a.json"])
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 1
    with pytest.raises(SystemExit, match="none of"):
        merge.main(tmp_path / "out.json", [tmp_path / "missing.json"])


def test_merge_replaces_cases_that_were_measured_again():
    row = {"suite": "sequence", "dtype": "float32", "contender": "ttt"}
    rows = [[row | {"case": case, "us": us} for case, us in found] for found in ((("a", 1), ("b", 2)), (("a", 3),))]
    rows[1].append(rows[1][0] | {"contender": "torch"})
    not_timed = [[row | {"case": case, "reason": "no memory"} for case in cases] for cases in ("ab", "")]
    parts = [
        {"machine": {"command": c, "commit": c, "date": c}, "ceilings": {}, "not_timed": failed, "rows": of_part}
        for c, of_part, failed in zip("xy", rows, not_timed, strict=True)
    ]
    found = merge.merged(parts)
    assert found["rows"] == [*rows[1], rows[0][1]]
    assert found["not_timed"] == [not_timed[0][1]]
    assert found["parts"] == [{"command": c, "commit": c, "date": c} for c in "xy"]


@pytest.fixture(scope="module")
def first_results(tmp_path_factory):
    """(file with the results of a run of tiny cases, what the run printed)."""
    cases = [tiny_commit(), tiny_commit("bfloat16", 0), dataclasses.replace(tiny_commit(), tokens=64)]
    file = tmp_path_factory.mktemp("run") / "results" / "tiny.json"
    arguments = ["--suite", "commit", "--rounds", "3", "--json", str(file), "--only", "24x40"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(suites.SUITES, "commit", lambda device: cases)
        done = CliRunner().invoke(run.app, arguments)
    assert done.exit_code == 0, done.output
    return file, done.output


@pytest.fixture
def results(first_results, tmp_path):
    """`first_results` in a folder of their own."""
    file, printed = first_results
    folder = tmp_path / "results"
    folder.mkdir()
    return shutil.copy(file, folder / file.name), printed


def test_run_writes_rows_and_prints_a_table(results):
    file, printed = results
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 9
    assert not found["not_timed"]
    assert {"device", "isa", "threads", "torch", "commit", "date", "command", "kind"} <= set(found["machine"])
    assert found["clock"] == "wall"
    assert found["ceilings"]["copy_gb_per_s"] > 0
    for row in found["rows"]:
        assert 0 < row["us_q1"] <= row["us"] <= row["us_q3"]
        assert (row["percent_of_matmul"] is not None) == (row["tokens"] == 64)
        if row["contender"] == row["baseline"]:
            assert row["ratio"] == 1
    assert "24x40, T = 5, R = 2" in printed
    assert "of copy" in printed


def test_run_refuses_unknown_suites_cases_and_devices():
    done = CliRunner().invoke(run.app, ["--suite", "comit"])
    assert done.exit_code != 0
    assert "comit" in done.output
    done = CliRunner().invoke(run.app, ["--only", "no such case"])
    assert done.exit_code != 0
    done = CliRunner().invoke(run.app, ["--clock", "cpu", "--threads", "2"])
    assert done.exit_code != 0
    assert "got cpu and 2" in done.output
    if not torch.cuda.is_available():
        done = CliRunner().invoke(run.app, ["--device", "cuda"])
        assert done.exit_code != 0


def changed(file, name, change):
    found = json.loads(file.read_text())
    change(found)
    other = file.parent / name
    other.write_text(json.dumps(found))
    return other


def test_check_fails_if_a_ratio_is_25_percent_worse(results, monkeypatch):
    file, _ = results
    invoke = CliRunner().invoke

    def worse(factor):
        def change(found):
            for row in found["rows"]:
                if row["ours"] and row["dtype"] == "bfloat16":
                    row["ratio_to_forward"] *= factor

        return change

    assert invoke(check.app, [str(file), "--against", str(file)]).exit_code == 0
    for factor, code in ((1.24, 0), (1.27, 1), (0.2, 0)):
        new = changed(file, "new.json", worse(factor))
        done = invoke(check.app, [str(new), "--against", str(file)])
        assert done.exit_code == code, done.output
    done = invoke(check.app, [str(changed(file, "new.json", worse(1.5))), "--against", str(file)])
    assert "+50 %" in done.output
    assert "1 of " in done.output
    # Against the folder of committed results, which the new file is not part of.
    monkeypatch.setattr(check, "RESULTS", file.parent)
    assert invoke(check.app, [str(changed(file, "new.json", worse(1.5)))]).exit_code == 1
    other = changed(file, "other.json", lambda found: found["machine"].update(device="another processor"))
    done = invoke(check.app, [str(other), "--against", str(file)])
    assert done.exit_code == 0
    assert "No committed result of another processor" in done.output


def test_check_reads_only_files_written_by_run():
    """The folder of results also has those of `bench.kernels.store`."""
    found = {path.name: check.load(path) for path in check.RESULTS.glob("*.json")}
    written = {n for n in found if n.startswith("cpu_") or n == "gpu.json"}
    assert {name for name, results in found.items() if results is not None} == written
    assert "store.json" in found
    kinds = {check.kind_of(results) for results in found.values() if results is not None}
    assert all(check.committed(list(check.RESULTS.glob("*.json")), kind) for kind in kinds)


def test_check_fails_if_ours_was_not_timed(results):
    file, _ = results
    row = {"suite": "commit", "case": "c", "dtype": "float32", "contender": "ttt", "reason": "off", "failed": True}
    new = changed(file, "new.json", lambda found: found["not_timed"].append(row))
    assert CliRunner().invoke(check.app, [str(new), "--against", str(file)]).exit_code == 1


def test_a_picture_has_the_date_of_what_it_shows(results):
    file, _ = results

    def dated(found, date, suite):
        found["machine"]["date"] = date
        for row in found["rows"]:
            row["suite"] = suite

    older = changed(file, "older.json", lambda found: dated(found, "2026-01-01", "growth"))
    newer = changed(file, "newer.json", lambda found: dated(found, "2026-02-02", "commit"))
    assert plot.gather([older, newer], "cpu")[0]["date"] == "2026-02-02"
    machine, _, rows = plot.gather([older, newer], "cpu", "growth")
    assert machine["date"] == "2026-01-01"
    assert {row["suite"] for row in rows} == {"growth"}
    assert plot.gather([newer], "cpu", "growth") is None


def test_plot_draws_roofline_and_growth(results, monkeypatch):
    file, _ = results
    growth = [
        {"suite": "growth", "curve": curve, "dtype": dtype, "contender": contender, "us": 2.0 + i, "us_q1": 1.0,
         "us_q3": 5.0, "m": 64 << i, "n": 64, "tokens": 1 << i, "replay": i, "window": 4 << i, "adapted": f"last {i}",
         "model": "llama", "memory_bytes": layer_memory(64, 64, dtype)}
        for curve in ("d", "T", "replay rows", "window", "adapted layers")
        for dtype in ("float32", "bfloat16")
        for contender in ("ttt", "forward", "observe")
        for i in range(3)
    ]  # fmt: skip
    for row in growth:
        row["case"] = f"{row['curve']} {row['m']}"
    changed(file, "tiny.json", lambda found: found["rows"].extend(growth))
    (file.parent / "demo.json").write_text("{}")  # of another kind
    done = CliRunner().invoke(plot.app, ["--results", str(file.parent), "--out", str(file.parent / "out")])
    assert done.exit_code == 0, done.output
    for name in ("roofline_cpu.png", "growth_cpu.png"):
        assert (file.parent / "out" / name).read_bytes()[:4] == b"\x89PNG"
    assert "no results on cuda" in done.output
