"""Every Triton kernel compiles without a GPU, needs no stack memory and no register spills, and has become no worse.

sm_80 and sm_90 are looked at here, and the kernels that matter most for sm_100 and gfx942. What is compiled is what has
changed since ``bench/kernels/results/aot.json`` was written: a kernel whose fingerprint is in that file gives the same
machine code. Some are compiled all the same, and must be what the file says. All is compiled and compared by
``python -m ttt.ops.triton.aot --target sm_80 sm_90 sm_100 gfx942 --against bench/kernels/results/aot.json``.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

import ttt.ops.triton as package
from ttt.ops.triton.aot_compare import compare, key_of, wide_share, worse

COMMITTED = Path(__file__).parents[2] / "bench" / "kernels" / "results" / "aot.json"
FOREMOST = ("commit._commit", "window_linear._decode_one", "window_linear._decode_few")
NOT_LAUNCHED = {target: {"memory_learn.learn_two", "memory_read.read_two"} for target in ("sm_80", "gfx942")}
"""Kernels that `ttt.ops.triton.memory.why_not` keeps from a target."""
KNOWN = ["--known", str(COMMITTED)]
RUNS = (["sm_80", "sm_90", *KNOWN], ["sm_100", "gfx942", "--kernel", *FOREMOST, *KNOWN])
ANYHOW = ["sm_80", "sm_90", "sm_100", "gfx942", "--kernel", "window_linear._decode_one", "reservoir._insert"]
"""What is compiled, because only others are known."""
CODE = """
import json, sys
from ttt.ops.triton.aot import main
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    if main():
        sys.exit(1)
"""
"""Commands of ``python -m ttt.ops.triton.aot``, in one process: its imports take seconds."""


def rows_of(file):
    return json.loads(file.read_text())["rows"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The rows of `RUNS`, and those of `ANYHOW`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folder = tmp_path_factory.mktemp("aot")
    of_others = {"fingerprint": "of another kernel", "registers": -1}
    others = [{**row, **of_others} for row in rows_of(COMMITTED)]
    (folder / "others.json").write_text(json.dumps({"rows": others}))
    runs = *RUNS, [*ANYHOW, "--known", str(folder / "others.json")]
    files = [folder / f"{number}.json" for number in range(len(runs))]
    commands = [["--json", str(file), "--target", *run] for file, run in zip(files, runs, strict=True)]
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(commands)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, anyhow = map(rows_of, files)
    return [row for each in rows for row in each], anyhow


@pytest.fixture(scope="module")
def table(tables):
    return tables[0]


def kernels():
    """The names of all kernels, which are the jit functions that are launched, with their modules."""
    sources = {file.stem: file.read_text() for file in Path(package.__path__[0]).glob("*.py")}
    launched = {name for text in sources.values() for name in re.findall(r"(\w+)\[.*\]\(", text)}
    return {
        f"{module}.{node.name}"
        for module, text in sources.items()
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
        if node.name in launched
    }


def test_every_kernel_compiles_without_stack_or_spills(table):
    for target in ("sm_80", "sm_90"):
        expected = kernels() - NOT_LAUNCHED.get(target, set())
        assert {row["kernel"] for row in table if row["target"] == target} == expected
    assert all(row["stack"] == row["spills"] == 0 for row in table if row["target"] != "gfx942")


def test_no_kernel_has_become_worse(table):
    committed = json.loads(COMMITTED.read_text())
    if committed["triton"] != triton.__version__:
        pytest.skip(f"{COMMITTED.name} is of Triton {committed['triton']}, this is {triton.__version__}")
    assert {key_of(row) for row in table} <= {key_of(row) for row in committed["rows"]}, "write the file anew"
    assert compare(table, committed["rows"]) == []


def test_what_is_known_is_what_is_compiled(tables):
    committed = json.loads(COMMITTED.read_text())
    if committed["triton"] != triton.__version__:
        pytest.skip(f"{COMMITTED.name} is of Triton {committed['triton']}, this is {triton.__version__}")
    before = {key_of(row): row for row in committed["rows"]}
    assert len(tables[1]) > 8
    for row in tables[1]:
        old = before[key_of(row)]
        assert row == old or row["fingerprint"] != old["fingerprint"], "write the file anew"


def test_the_committed_table_has_every_kernel_for_every_gpu():
    rows = json.loads(COMMITTED.read_text())["rows"]
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        expected = kernels() - NOT_LAUNCHED.get(target, set())
        assert {row["kernel"] for row in rows if row["target"] == target} == expected
    assert {row["target"] for row in rows if "failed" in row} == {"gfx942"}


GOOD = {"stack": 0, "spills": 0, "loads": {"128": 8, "32": 4}, "tensor": 5, "registers": 128}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, []),
        ({"registers": 90, "loads": {"128": 8, "32": 5}}, []),
        ({"spills": 3}, ["spills rose from 0 to 3"]),
        ({"stack": 16}, ["stack rose from 0 to 16"]),
        ({"tensor": 0}, ["no tensor instruction is left of 5"]),
        ({"loads": {"64": 16, "32": 4}}, ["loads of 128 bits carry 0% of the bytes, and carried 89%"]),
    ],
)
def test_changes_for_the_worse_are_named(change, what):
    assert worse({**GOOD, **change}, GOOD) == what


def test_a_kernel_that_no_longer_compiles_is_worse():
    failed = {"failed": "no such precision"}
    assert worse(failed, GOOD) == ["it does not compile any more: no such precision"]
    assert worse(failed, failed) == worse(GOOD, failed) == []


def of_bfloat16(table, kernel):
    rows = [row for row in table if row["kernel"] == kernel and row["variant"].startswith("bfloat16")]
    assert {"sm_80", "sm_90"} <= {row["target"] for row in rows}
    return rows


def test_the_bf16_commit_uses_tensor_cores_and_wide_loads(table):
    for row in of_bfloat16(table, "commit._commit"):
        assert row["tensor"] > 0
        assert row["loads"]["128"] > 0
        if row["target"] == "sm_90":
            # So many registers allow four programs of four warps on a multiprocessor, or three with a momentum.
            assert row["registers"] <= (168 if "momentum" in row["variant"] else 128)
        if row["target"] != "gfx942":  # shared memory holds factors of the products only: the state does not pass it
            assert row["shared"] <= 8192


def test_the_bf16_finish_of_a_panel_has_wide_loads(table):
    for row in of_bfloat16(table, "panels._finish"):
        assert row["loads"]["128"] > 0
        most = 168 if "momentum" in row["variant"] or row["target"] == "sm_80" else 128
        assert row["registers"] <= most


def test_decoding_reads_the_weight_with_wide_loads(table):
    for row in of_bfloat16(table, "window_linear._decode_one"):
        assert wide_share(row) > 0.5, row
