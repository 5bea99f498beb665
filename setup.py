"""Builds ttt._C: the C++ kernels of csrc/, compiled once for each instruction set and linked without libtorch.

Ninja compiles the objects in parallel, and only those whose sources changed. A compiler takes up to 1 GB of memory
(GCC 12). If nothing can be compiled, the package still installs: plain torch then runs every op, and `ttt.info()`
gives the reason, which is written to ttt/_build.json.

Environment variables:
    CXX: the C++ compiler; by default the first of c++, g++ and clang++ that is found.
    CXXFLAGS: flags that are added after those of this file.
    MAX_JOBS: how many objects are compiled at a time, as for torch's extensions; by default the number of cores.
    TTT_REQUIRE_KERNELS: "1" makes a build without kernels an error. For releases and continuous integration.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
REQUIRE = "TTT_REQUIRE_KERNELS"
JOBS = "MAX_JOBS"
X86 = platform.machine().lower() in ("x86_64", "amd64")
COMMON = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra"]
# The last two: GCC 12 warns about undefined operands in its own AVX-512 headers (GCC bug 105593).
COMMON += [
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    "-Wno-ignored-attributes",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
KERNELS = ("kernels", "head", "attention")  # the files that are compiled once for each of these:
VARIANTS = {"portable": []}
if X86:
    VARIANTS["avx2"] = ["-mavx2", "-mfma", "-DTTT_ISA_AVX2"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-DTTT_ISA_AVX512"]
    VARIANTS["avx512"] = [*avx512, "-mprefer-vector-width=512"]
    VARIANTS["avx512bf16"] = [*VARIANTS["avx512"], "-mavx512bf16", "-DTTT_ISA_AVX512BF16"]


class BuildKernels(build_ext):
    """Builds the kernels with ninja, and reports to ttt/_build.json whether that succeeded."""

    def finalize_options(self):
        if self.build_temp is None:  # the same folder in every build, where ninja finds the objects of the last one
            self.build_temp = str(ROOT / "build" / f"objects-{sys.implementation.cache_tag}")
        super().finalize_options()

    def run(self):
        required = _kernels_required()
        self.jobs = _jobs()
        inplace = self.inplace  # super().run() clears it while it builds, and leaves it so after an error
        reason = ""
        try:
            super().run()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:2000]
            self.inplace = inplace
            if inplace:  # the kernels of an earlier build may not fit the sources of this one
                Path(self.get_ext_fullpath("ttt._C")).unlink(missing_ok=True)
            self.extensions = []  # setuptools expects a file for each of these
        folder = (ROOT if inplace else Path(self.build_lib)) / "ttt"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps({"built": not reason, "reason": reason}) + "\n")
        if reason and required:
            raise CompileError(f"the CPU kernels were not built ({reason}), and {REQUIRE}=1 requires them")
        if reason:
            print(f"ttt: the CPU kernels were not built ({reason}); plain torch will be used", file=sys.stderr)

    def build_extension(self, ext):
        compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
        if compiler is None:
            raise RuntimeError("no C++ compiler found (looked for c++, g++ and clang++; set CXX to name one)")
        import pybind11

        includes = [pybind11.get_include(), sysconfig.get_paths()["include"], sysconfig.get_paths()["platinclude"]]
        cflags = COMMON + [f"-I{path}" for path in dict.fromkeys(includes)] + (["-DTTT_X86"] if X86 else [])
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        objects = {f"{of}_{name}.o": (f"{of}.cpp", flags) for of in KERNELS for name, flags in VARIANTS.items()}
        objects |= {f"{name}.o": (f"{name}.cpp", []) for name in ("bindings", "tiles")}
        lines = [
            f"cflags = {' '.join(cflags)}",
            f"added = {os.environ.get('CXXFLAGS', '')}",
            "rule cxx",
            f"  command = {compiler} -MMD -MF $out.d $cflags $flags $added -c $in -o $out",
            "  depfile = $out.d",
            f"rule link\n  command = {compiler} -shared -fopenmp $in -o $out",
        ]
        for name, (source, flags) in objects.items():
            lines.append(f"build {name}: cxx {_escaped(ROOT / 'csrc' / source)}\n  flags = {' '.join(flags)}")
        lines.append(f"build {_escaped(target)}: link {' '.join(objects)}\n")
        (work / "build.ninja").write_text("\n".join(lines))
        _run([_ninja(), "-C", str(work), "-j", str(self.jobs)])


def _kernels_required():
    value = os.environ.get(REQUIRE, "0")
    if value not in ("", "0", "1"):
        raise CompileError(f"{REQUIRE} must be 0 or 1, got {value!r}")
    return value == "1"


def _jobs():
    """The number of objects to compile at a time: ninja itself would take more than there are cores."""
    value = os.environ.get(JOBS, "")
    if value == "":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise CompileError(f"{JOBS} must be a whole number from 1 on, got {value!r}")
    return int(value)


def _run(command):
    """Run ``command``, pass its output on, and raise RuntimeError with the compiler's first error if it fails."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        output = []
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line.strip())
    if process.returncode != 0:
        errors = [line for line in output if re.search(r"error:|not found", line)] or output
        raise RuntimeError(errors[0] if errors else f"{command[0]} failed with status {process.returncode}")


def _escaped(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja():
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise RuntimeError("ninja not found; pip install ninja") from None
        return found


setup(ext_modules=[Extension("ttt._C", sources=[])], cmdclass={"build_ext": BuildKernels})
