"""Builds ttt._C: one C++ body compiled once per instruction set, no libtorch. See csrc/.

Ninja makes the objects (in parallel, and only those whose sources changed). Where nothing can be
compiled the package still installs, and the reason goes to ttt/_build.json for ttt.info().
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
COMMON = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra"]
# The last two: GCC 12 warns of the undefined operands in its own headers of AVX-512 (bug 105593).
COMMON += [
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    "-Wno-ignored-attributes",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
VARIANTS = {"portable": []}
if X86:
    VARIANTS["avx2"] = ["-mavx2", "-mfma", "-DTTT_ISA_AVX2"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-DTTT_ISA_AVX512"]
    VARIANTS["avx512"] = [*avx512, "-mprefer-vector-width=512"]
    VARIANTS["avx512bf16"] = [*VARIANTS["avx512"], "-mavx512bf16", "-DTTT_ISA_AVX512BF16"]


class BuildKernels(build_ext):
    def run(self):
        report = {"built": True, "reason": ""}
        try:
            super().run()
        except Exception as error:  # a missing compiler must not keep the package from installing
            report = {"built": False, "reason": f"{type(error).__name__}: {error}"[:2000]}
            print(
                f"ttt: the CPU kernels were not built ({report['reason']}); plain torch will be used", file=sys.stderr
            )
        folder = ROOT if self.inplace else Path(self.build_lib)
        (folder / "ttt").mkdir(parents=True, exist_ok=True)
        (folder / "ttt" / "_build.json").write_text(json.dumps(report) + "\n")

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
        objects = {f"kernels_{name}.o": ("kernels.cpp", flags) for name, flags in VARIANTS.items()}
        objects |= {f"{name}.o": (f"{name}.cpp", []) for name in ("bindings", "tiles")}
        lines = [
            f"cflags = {' '.join(cflags)}",
            f"rule cxx\n  command = {compiler} -MMD -MF $out.d $cflags $flags -c $in -o $out\n  depfile = $out.d",
            f"rule link\n  command = {compiler} -shared -fopenmp $in -o $out",
        ]
        for name, (source, flags) in objects.items():
            lines.append(f"build {name}: cxx {_escaped(ROOT / 'csrc' / source)}\n  flags = {' '.join(flags)}")
        lines.append(f"build {_escaped(target)}: link {' '.join(objects)}\n")
        (work / "build.ninja").write_text("\n".join(lines))
        subprocess.run([_ninja(), "-C", str(work)], check=True)


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
