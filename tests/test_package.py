"""The package as a user sees it: import, info, command line and builds; and the selection of quick tests."""

import io
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import selection
import torch
from typer.testing import CliRunner

import ttt
from ttt.cli import app
from ttt.demo.model import model_folder
from ttt.ops.backends import JOINED, MANY
from ttt.ops.build_report import why_not_built

ROOT = Path(__file__).parent.parent


def python(*args, **environment):
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


def test_import_is_light_and_needs_no_gpu_no_triton_no_transformers():
    code = """
import sys
for name in ("triton", "transformers", "matplotlib", "rich"):
    sys.modules[name] = None  # importing it raises
import ttt
ttt.info(file=None)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def imports():
    """What three processes find that import torch and then ttt: the CPU seconds of ttt, and modules before and after.

    Without garbage collection: a full one looks at all of torch's objects, which takes 0.1 s, and may fall into this
    import or not.
    """
    code = """
import gc, json, sys, time
import torch
before = sorted(sys.modules)
gc.disable()
began = time.process_time()
import ttt
seconds = time.process_time() - began
print(json.dumps([seconds, before, sorted(sys.modules)]))
"""
    # The first of them may have to compile the sources, which it keeps for the others.
    return [json.loads(python("-c", code, PYTHONDONTWRITEBYTECODE="").stdout) for _ in range(3)]


def test_importing_ttt_imports_little_that_torch_does_not(imports):
    """Packages of its parts would take longer than ttt itself."""
    torch_s, all_s = map(set, imports[0][1:])
    more = {name.partition(".")[0] for name in all_s - torch_s} - set(sys.stdlib_module_names)
    assert more == {"ttt", "safetensors"}
    parts = {name for name in all_s if name.startswith("ttt.")}
    for late in ("cli", "serve", "chat", "demo", "rules", "sequence_models", "store", "ops.triton", "nn.sequence"):
        assert f"ttt.{late}" not in parts, late


def test_importing_ttt_takes_at_most_300_milliseconds_more_than_torch(imports):
    """It takes 0.2 s of CPU time on an AMD EPYC; the rest is a margin for slower and busy machines."""
    assert statistics.median(seconds for seconds, _, _ in imports) <= 0.3


def test_all_public_names_exist_and_are_documented():
    for name in ttt.__all__:
        assert getattr(ttt, name).__doc__, name


def test_info_says_what_is_active():
    found = ttt.info(file=None)
    assert found["isa"] in found["isas"]
    assert set(found["ops"]) == set(ttt.ops.__all__) | set(JOINED) | set(MANY)
    done = python("-m", "ttt", "info")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "threads", "isa", found["isa"], "window_linear", "cpu"):
        assert word in done.stdout


def test_info_is_a_dict_that_shows_itself_as_a_report_and_prints_nothing_unasked(capsys):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    ttt.adapt_(model, ttt.TTTConfig(target_modules=["0"]))
    found = ttt.info(model=model)
    assert capsys.readouterr().out == ""
    assert (found["learning"], isinstance(found, dict), json.loads(json.dumps(found))) == (["0"], True, dict(found))
    lines = repr(found).splitlines()
    assert "learning    0" in lines
    assert f"torch       {torch.__version__}" in lines
    file = io.StringIO()
    assert ttt.info(file, model=model) == found
    assert file.getvalue() == f"{found}\n"
    for key in list(found):  # whatever a caller takes out
        del found[key]
        assert f"{key:12}" not in repr(found)


@pytest.mark.parametrize("isa", ["portable"])
def test_instruction_set_can_be_forced(isa):
    done = python("-m", "ttt", "info", TTT_CPU_ISA=isa)
    assert f"{isa} (forced by TTT_CPU_ISA)" in done.stdout
    done = python("-c", "import ttt", TTT_CPU_ISA="mmx")
    assert done.returncode != 0
    assert "isa must be one that this processor has" in done.stderr


def test_installs_without_a_compiler_and_says_why(tmp_path):
    done = python(
        "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"),
        PATH=str(tmp_path), CXX="", TTT_REQUIRE_KERNELS="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "lib" / "ttt" / "_build.json").read_text())
    assert report["built"] is False
    assert "no C++ compiler found" in report["reason"]


COUNTING = """#!/bin/sh
for word; do [ "$before" = -o ] && out=$word; before=$word; done
cd {folder} && mkdir -p running && : > running/$$
for wait in $(seq 200); do
  ls running | wc -l >> counts
  grep -qx {jobs} counts && break
  sleep 0.1
done
sleep 0.1
rm running/$$
: > "$out"
"""


def jobs_at_a_time(folder, jobs, setup=(), **environment):
    """The most compilers that ran at a time, in a build whose compiler counts them and first waits for ``jobs``."""
    compiler = folder / "counting"
    compiler.write_text(COUNTING.format(folder=shlex.quote(str(folder)), jobs=jobs))
    compiler.chmod(0o755)
    done = python(
        *setup, "setup.py", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp"),
        CXX=str(compiler), TTT_REQUIRE_KERNELS="1", **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [int(line) for line in (folder / "counts").read_text().split()]
    assert len(counts) >= 4  # objects and the library
    return max(counts)


@pytest.mark.parametrize("jobs", [1, 2])
def test_as_many_objects_are_compiled_at_a_time_as_max_jobs_says(tmp_path, jobs):
    assert jobs_at_a_time(tmp_path, jobs, MAX_JOBS=str(jobs)) == jobs


def test_no_more_objects_are_compiled_at_a_time_than_there_are_cores(tmp_path):
    one = (
        "import os, sys; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    assert jobs_at_a_time(tmp_path, 1, ("-c", one), MAX_JOBS="") == 1


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5"])
def test_other_values_of_max_jobs_are_refused(tmp_path, jobs):
    folders = "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")
    done = python("setup.py", "build_ext", *folders, MAX_JOBS=jobs, TTT_REQUIRE_KERNELS="0")
    assert done.returncode != 0
    assert f"MAX_JOBS must be a whole number from 1 on, got {jobs!r}" in done.stderr
    assert not (tmp_path / "lib").exists()


SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
FAILED = json.dumps({"built": False, "reason": "RuntimeError: no compiler"})


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "have not been built in {folder}; pip install --editable . builds them"),
        ({"_build.json": FAILED}, "were not built when ttt was installed: RuntimeError: no compiler"),
        ({"_build.json": "{"}, "have not been built in {folder}; pip install --editable . builds them"),
        ({"_build.json": '{"built": true, "reason": ""}', "_C.cpython-27-other.so": ""},
         "were built for another Python (_C.cpython-27-other.so); reinstall ttt with this one"),
        ({"_build.json": FAILED, f"_C{SUFFIX}": ""}, "cannot import name '_C'"),
    ],
)  # fmt: skip
def test_why_the_kernels_cannot_be_imported(tmp_path, files, why):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    said = why_not_built(ImportError("cannot import name '_C'"), tmp_path)
    assert why.format(folder=tmp_path) in said
    assert "\n" not in said


def test_the_demo_says_which_folder_has_no_model(tmp_path, monkeypatch):
    done = CliRunner().invoke(app, ["demo", "--byte"], env={"TTT_BYTE_MODEL": str(tmp_path)})
    assert done.exit_code == 1
    missing = f"{tmp_path} has no config.json and no model.safetensors"
    assert f"the byte-level model is missing: {missing}; TTT_BYTE_MODEL must name the folder" in done.stderr
    monkeypatch.setenv("TTT_BYTE_MODEL", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} has no model.safetensors; TTT_BYTE_MODEL")):
        model_folder()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert model_folder() == tmp_path


def test_the_demo_refuses_a_text_that_is_missing(tmp_path):
    done = CliRunner().invoke(app, ["demo", "--text", str(tmp_path / "none.txt")])
    assert done.exit_code == 2
    assert re.search(r"does\W+not\W+exist", done.stderr)


def test_without_the_extension_the_reference_runs_and_info_says_so():
    code = """
import sys
sys.modules["ttt._C"] = None
import torch, ttt
layer = ttt.nn.Linear(6, 4, config=ttt.TTTConfig(window=2, replay_capacity=4))
for _ in range(3):
    with ttt.learning(layer):
        layer(torch.randn(3, 6)).square().sum().backward()
found = ttt.info(file=None)
assert found["isa"] is None and "cpu" in found["missing"], found
assert any("commit on reference" in k for k in found["slow_calls"]), found["slow_calls"]
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_library_has_no_libtorch():
    from ttt import _C

    done = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True)
    assert done.returncode == 0
    assert "torch" not in done.stdout.replace(str(ROOT), "")


@pytest.mark.parametrize(
    ("variable", "table", "key"),
    [("BUILD_REQUIRES", "build-system", "requires"), ("DOCS_REQUIRES", "project.optional-dependencies", "docs"),
     ("LINT_REQUIRES", "project.optional-dependencies", "lint")],
)  # fmt: skip
def test_the_makefile_installs_what_pyproject_names(variable, table, key):
    (given,) = re.findall(rf"^{variable} := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    section = (ROOT / "pyproject.toml").read_text().split(f"[{table}]\n")[1]
    (wanted,) = re.findall(rf"^{key} = (\[.*\])$", section.split("\n[")[0], re.M)
    assert shlex.split(given) == json.loads(wanted)


def test_what_is_marked_as_slow():
    """The first and the last case of a test are quick; what `selection.SLOW` names exists, and is slow."""
    assert selection.spread(3, 3) == {0, 1, 2}
    assert selection.spread(4, 3) == {0, 2, 3}
    assert selection.spread(101, 3) == {0, 50, 100}
    assert selection.spread(5, 1) == {0}
    for name in selection.SLOW:
        path, _, test = name.partition("::")
        function = test.partition("[")[0]
        assert (selection.TESTS / path).exists(), name
        assert not function or f"def {function}(" in (selection.TESTS / path).read_text(), name
    for file in selection.ONE_QUICK_CASE:
        assert (selection.TESTS / file).exists(), file
    assert selection.slow_by_name("bench/kernels/test_bench.py", "test_any")
    assert selection.slow_by_name("test_examples.py", "test_many_users_learn_apart_from_each_other[any]")
    forked = "test_a_child_cannot_write_under_its_parents_lease_nor_end_it"
    assert selection.slow_by_name("store/test_store_forks.py", f"{forked}[postgres]")
    assert not selection.slow_by_name("store/test_store_forks.py", f"{forked}[folder]")
    assert selection.slow_by_name("ops/test_triton.py", "test_any")
    assert not selection.slow_by_name("ops/test_triton_other.py", "test_any")
    assert not selection.slow_by_name("learn/test_learner.py", "test_any")


def test_long_files_come_first_and_tests_of_a_file_stay_together():
    """Files with slow tests by the number of their tests, then the others."""
    files = ["nn/test_one.py"] + ["ops/test_cpu.py"] * 2 + ["nn/test_many.py"] * 3 + ["families/test_any.py"] * 3
    items = [types.SimpleNamespace(path=selection.TESTS / file, number=k) for k, file in enumerate(files)]
    selection.long_files_first(items)
    assert [item.number for item in items] == [6, 7, 8, 1, 2, 3, 4, 5, 0]


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.7.0", "2.4.6", True), ("3.10.0", "2.10.1", True),
     ("3.6.1", "3.0.0", False)],
)  # fmt: skip
def test_versions_with_which_tritons_interpreter_fails(triton, numpy, works):
    fault = selection.interpreter_fault(triton, numpy)
    assert (fault == "") == works
    assert works or f"found triton {triton} and numpy {numpy}" in fault
