"""The package as a user meets it: import, info, command line, build without a compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ttt

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


def test_all_public_names_exist_and_are_documented():
    for name in ttt.__all__:
        assert getattr(ttt, name).__doc__, name


def test_info_says_what_is_active():
    found = ttt.info(file=None)
    assert found["isa"] in found["isas"]
    assert set(found["ops"]) == set(ttt.ops.__all__)
    done = python("-m", "ttt", "info")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "threads", "isa", found["isa"], "window_linear", "cpu"):
        assert word in done.stdout


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
        PATH=str(tmp_path), CXX="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "lib" / "ttt" / "_build.json").read_text())
    assert report["built"] is False
    assert "no C++ compiler found" in report["reason"]


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
