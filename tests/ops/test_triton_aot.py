"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, and needs no stack memory and no register spills."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ttt.ops.triton as package


@pytest.fixture(scope="module")
def table():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ttt.ops.triton.aot", "--arch"]
    running = [
        subprocess.Popen([*command, arch], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for arch in ("80", "90")
    ]
    rows = []
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, out + err
        header, *lines = out.splitlines()
        names = header.split()
        rows += [dict(zip(names, line.split(maxsplit=len(names) - 1), strict=True)) for line in lines]
    return rows


def kernels():
    """The names of all kernels, which are the jit functions that are launched."""
    sources = [file.read_text() for file in Path(package.__path__[0]).glob("*.py")]
    defined = {
        node.name
        for text in sources
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    }
    return defined & {name for text in sources for name in re.findall(r"(\w+)\[.*\]\(", text)}


def test_every_kernel_compiles_without_stack_or_spills(table):
    for arch in ("80", "90"):
        assert {row["kernel"] for row in table if row["sm"] == arch} == kernels()
    assert all(row["stack"] == row["spills"] == "0" for row in table)


def test_the_bf16_commit_uses_tensor_cores_and_wide_loads(table):
    commits = [row for row in table if row["kernel"] == "_commit" and row["variant"].startswith("bfloat16")]
    assert {row["sm"] for row in commits} == {"80", "90"}
    for row in commits:
        assert int(row["hgmma" if row["sm"] == "90" else "hmma"]) > 0
        assert int(row["ldg128"]) > 0
        if row["sm"] == "90":
            # So many registers allow four programs of four warps on a multiprocessor, or three with a momentum.
            assert int(row["registers"]) <= (168 if "momentum" in row["variant"] else 128)
        # Shared memory holds factors of the products only: the state does not pass through it.
        assert int(row["shared"]) <= 8192


def test_the_bf16_finish_of_a_panel_has_wide_loads(table):
    finishes = [row for row in table if row["kernel"] == "_finish" and row["variant"].startswith("bfloat16")]
    assert {row["sm"] for row in finishes} == {"80", "90"}
    for row in finishes:
        assert int(row["ldg128"]) > 0
        most = 168 if "momentum" in row["variant"] or row["sm"] == "80" else 128
        assert int(row["registers"]) <= most
