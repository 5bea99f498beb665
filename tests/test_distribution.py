"""The archives as a user receives them: their contents, the kernels in them, and builds that fail."""

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ttt import _C

ROOT = Path(__file__).parent.parent
LIBRARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
PLANTED = "planted error: this compiler always fails"


def python(*args, folder, **environment):
    """Run this Python in ``folder``, away from the working tree."""
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, cwd=folder, env={**os.environ, **environment}
    )


def succeeds(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def copy_of_the_tree(folder):
    """The working tree without what was built in it, and with leftovers of builds that no archive may take up."""
    built = (".*", "build", "dist", "site", "report", "*.egg-info", "__pycache__", "*.so", "_build.json")
    tree = shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*built))
    (tree / "ttt" / LIBRARY).write_bytes(b"not a library")
    (tree / "ttt" / "_build.json").write_text(json.dumps({"built": False, "reason": "of an earlier build"}))
    return tree


def build(what, tree, out, **environment):
    """Run ``python -m build``, without a network: the requirements are in the extra ``test``."""
    return python("-m", "build", f"--{what}", "--no-isolation", "--outdir", out, tree, folder=out.parent, **environment)


def unpacked(archive, folder):
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


def failing_compiler(folder):
    compiler = folder / "failing-c++"
    compiler.write_text(f"#!/bin/sh\necho '{PLANTED}' >&2\nexit 1\n")
    compiler.chmod(0o755)
    return {"CXX": str(compiler)}


def no_compiler(folder):
    (folder / "empty").mkdir()
    return {"CXX": "", "PATH": str(folder / "empty")}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    succeeds(build("sdist", copy_of_the_tree(folder / "tree"), folder / "out"))
    (archive,) = (folder / "out").iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory):
    """Built from the archive alone, without optimisation, which takes a tenth of the time."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = unpacked(archive, folder / "source")
    succeeds(build("wheel", tree, folder / "out", CXXFLAGS="-O0", TTT_REQUIRE_KERNELS="1"))
    (wheel,) = (folder / "out").iterdir()
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    target = folder / "target"
    succeeds(python("-m", "pip", "install", "--no-index", "--no-deps", "--target", target, wheel, folder=folder))
    return target


PAGE = {f"ttt/serve/http/page/{name}" for name in ("index.html", "page.css", "page.js")}


def test_the_archive_holds_what_a_build_needs_and_nothing_else(archive):
    with tarfile.open(archive) as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    sources = {path.relative_to(ROOT).as_posix() for folder in ("csrc", "ttt") for path in (ROOT / folder).rglob("*")
               if path.suffix in (".cpp", ".h", ".py", ".typed")}  # fmt: skip
    given = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("ttt.egg-info/")}
    assert names - made == sources | PAGE | given


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        report = json.loads(file.read("ttt/_build.json"))
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ttt").rglob("*.py")}
    metadata = {name for name in names if name.startswith("ttt-0.1.0.dist-info/")}
    assert names - metadata == modules | PAGE | {f"ttt/{LIBRARY}", "ttt/_build.json", "ttt/py.typed"}
    assert report == {"built": True, "reason": ""}


def test_the_wheel_is_small(wheel):
    """Below 3.5 MB, where the library of this process, which is optimised, stands for the one in the wheel."""
    library = len(zlib.compress(Path(_C.__file__).read_bytes()))
    with zipfile.ZipFile(wheel) as file:
        others = sum(entry.compress_size for entry in file.infolist() if not entry.filename.endswith(".so"))
    assert others < 800_000
    assert library + others < 3_500_000


def test_licence_and_metadata(wheel):
    with zipfile.ZipFile(wheel) as file:
        metadata = email.message_from_bytes(file.read("ttt-0.1.0.dist-info/METADATA"))
        licence = file.read("ttt-0.1.0.dist-info/licenses/LICENSE").decode()
    assert licence == (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert (metadata["Name"], metadata["Version"]) == ("ttt", "0.1.0")
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert not [value for value in metadata.get_all("Classifier") if value.startswith("License ::")]  # PEP 639
    extras = {
        "bench",
        "demo",
        "docs",
        "hf",
        "lint",
        "postgres",
        "ray",
        "serve",
        "store",
        "telemetry",
        "test",
        "triton",
        "vllm",
    }
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_the_installed_wheel_has_the_kernels(installed, tmp_path):
    code = """
import json, torch, ttt
layer = ttt.nn.Linear(6, 4, config=ttt.TTTConfig(window=2))
for _ in range(3):
    with ttt.learning(layer):
        layer(torch.randn(3, 6)).square().sum().backward()
print(json.dumps([ttt.__file__, ttt.info(file=None)]))
"""
    done = succeeds(python("-c", code, folder=tmp_path, PYTHONPATH=str(installed)))
    file, found = json.loads(done.stdout)
    assert Path(file) == installed / "ttt" / "__init__.py"
    assert found["isa"] in found["isas"] == _C.available_isas()
    assert "cpu" not in found["missing"]
    assert found["calls"]["commit on cpu"] > 0
    assert not found["slow_calls"]


def test_the_declared_dependencies_are_enough(installed, tmp_path):
    """To learn, to save and to store, where every package that is not a dependency of ttt cannot be imported."""
    code = """
import sys
from importlib.metadata import packages_distributions, requires
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

needed, open_ = {"ttt", "packaging"}, ["ttt"]
while open_:
    for requirement in map(Requirement, requires(open_.pop()) or []):
        name = canonicalize_name(requirement.name)
        if name not in needed and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            needed.add(name)
            open_.append(name)
owners = packages_distributions()

def hidden(module):
    distributions = {canonicalize_name(name) for name in owners.get(module.partition(".")[0], [])}
    return bool(distributions) and not distributions & needed

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, module, path=None, target=None):
        return None if hidden(module) else self.finder.find_spec(module, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
import torch, ttt, ttt.cli
model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
ttt.adapt_(model, ttt.TTTConfig(target_modules="all-linear", window=4))
for _ in range(3):
    with ttt.learning(model):
        model(torch.randn(3, 6)).square().sum().backward()
expected = {name: value.clone() for name, value in model.state_dict().items()}
ttt.save(model, "learnt.safetensors")
ttt.load(ttt.restore_(model), "learnt.safetensors")
assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
store = ttt.Store("store")
with store.lease("alice") as lease:
    store.put(lease, {"x": torch.arange(3.0)})
assert torch.equal(store.get("alice").tensors["x"], torch.arange(3.0))
for name in ("transformers", "fsspec", "pytest"):
    assert name not in sys.modules
"""
    succeeds(python("-c", code, folder=tmp_path, PYTHONPATH=str(installed)))


def test_the_demo_of_an_installed_wheel_says_where_its_model_is(installed, tmp_path):
    done = python("-m", "ttt", "demo", "--byte", folder=tmp_path, PYTHONPATH=str(installed), TTT_BYTE_MODEL="")
    assert done.returncode == 1
    assert done.stderr.startswith("the byte-level model is missing: ")
    for word in ("bench/learning/byte_model", "clone", "TTT_BYTE_MODEL"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    code = "from ttt.demo import load_model; print(sum(p.numel() for p in load_model()[0].parameters()))"
    model = str(ROOT / "bench" / "learning" / "byte_model")
    done = succeeds(python("-c", code, folder=tmp_path, PYTHONPATH=str(installed), TTT_BYTE_MODEL=model))
    assert 4_000_000 < int(done.stdout) < 5_000_000


@pytest.mark.parametrize(
    ("compiler", "reason"), [(failing_compiler, PLANTED), (no_compiler, "no C++ compiler found"), (None, "csrc")]
)
def test_a_build_without_kernels_fails_if_they_are_required(archive, tmp_path, compiler, reason):
    """With a compiler that fails, with none, and without the sources."""
    tree = unpacked(archive, tmp_path / "source")
    if compiler is None:
        shutil.rmtree(tree / "csrc")
    environment = {} if compiler is None else compiler(tmp_path)
    done = build("wheel", tree, tmp_path / "required", TTT_REQUIRE_KERNELS="1", **environment)
    assert done.returncode != 0
    assert "TTT_REQUIRE_KERNELS=1 requires them" in done.stdout + done.stderr
    assert reason in done.stdout + done.stderr
    assert not list((tmp_path / "required").glob("*.whl"))

    succeeds(build("wheel", tree, tmp_path / "plain", TTT_REQUIRE_KERNELS="0", **environment))
    (wheel,) = (tmp_path / "plain").iterdir()
    with zipfile.ZipFile(wheel) as file:
        assert not [name for name in file.namelist() if name.endswith(".so")]
        report = json.loads(file.read("ttt/_build.json"))
    assert report["built"] is False
    assert reason in report["reason"]


def test_other_values_of_the_requirement_are_refused(archive, tmp_path):
    tree = unpacked(archive, tmp_path / "source")
    done = build("wheel", tree, tmp_path / "out", TTT_REQUIRE_KERNELS="yes", **failing_compiler(tmp_path))
    assert done.returncode != 0
    assert "TTT_REQUIRE_KERNELS must be 0 or 1, got 'yes'" in done.stdout + done.stderr


def test_after_an_editable_build_that_failed_info_gives_the_reason(tmp_path):
    """The library of an earlier build goes: it may not fit the sources."""
    tree = copy_of_the_tree(tmp_path / "tree")
    code = "import build, sys; build.ProjectBuilder(sys.argv[1]).build('editable', sys.argv[2])"
    succeeds(
        python(
            "-c", code, tree, tmp_path / "out", folder=tmp_path, TTT_REQUIRE_KERNELS="0", **failing_compiler(tmp_path)
        )
    )
    assert not (tree / "ttt" / LIBRARY).exists()
    done = succeeds(python("-m", "ttt", "info", folder=tree))
    assert f"the C++ kernels were not built when ttt was installed: RuntimeError: {PLANTED}" in done.stdout
    assert "circular" not in done.stdout
    code = "import torch, ttt; ttt.nn.Linear(3, 2)(torch.randn(1, 3)); print(ttt.info(file=None)['slow_calls'])"
    assert PLANTED in succeeds(python("-c", code, folder=tree)).stdout


def test_the_tests_need_a_triton_whose_interpreter_works(wheel):
    """Triton 3.6 runs on GPUs, but its interpreter does not work with numpy 2.4: the extra ``test`` leaves it out."""
    bounds: dict = {}
    with zipfile.ZipFile(wheel) as file:
        metadata = email.message_from_bytes(file.read("ttt-0.1.0.dist-info/METADATA"))
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        if requirement.name == "triton":
            bounds |= {
                e: requirement.specifier for e in ("test", "triton") if requirement.marker.evaluate({"extra": e})
            }
    assert "3.6.0" in bounds["triton"]
    assert "3.6.0" not in bounds["test"]
    assert "3.7.0" in bounds["test"]
