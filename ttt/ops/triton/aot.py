"""Compile every Triton kernel for several GPUs without having one: ``python -m ttt.ops.triton.aot [--all]``.

The launchers run on meta tensors, and their launches are compiled instead of run, so the kernels that are checked are
those a GPU would run. The exit status is 1 if a kernel for an NVIDIA GPU needs stack memory or spills registers, or if
one is worse than in the file of ``--against``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars, ir
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource, CompilationError, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ttt.ops.triton import commit, common
from ttt.ops.triton.aot_calls import calls
from ttt.ops.triton.aot_compare import compare
from ttt.ops.triton.aot_inspect import inspect

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
CUDA = TARGETS["sm_90"]


class Launch(NamedTuple):
    """The launch ``kernel[grid](*args, **kwargs)``."""

    kernel: JITFunction
    args: tuple
    kwargs: dict
    grid: tuple


def launches(call: Callable[[], None], target: GPUTarget = CUDA) -> list[Launch]:
    """Record the launches that ``call`` makes on ``target``, without running them."""
    made = []

    def record(kernel, *args, grid, warmup, **kwargs):
        made.append(Launch(kernel, args, kwargs, grid))

    capability = divmod(target.arch, 10) if target.backend == "cuda" else (0, 0)
    with patch.object(JITFunction, "run", record), patch.object(common, "capability", lambda: capability):
        call()
    return made


def _bound(launch: Launch, target: GPUTarget) -> tuple[dict, list, dict, BaseBackend]:
    """Arguments, their specialisation, and options of a launch, bound by Triton as it does at run time; the backend."""
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    return *bind(*launch.args, **launch.kwargs), backend


def variant(launch: Launch, target: GPUTarget = CUDA) -> tuple:
    """What tells apart the variants of a kernel: a launch that differs here is compiled and loaded before it runs."""
    _, specialization, options, _ = _bound(launch, target)
    return name_of(launch.kernel), tuple(specialization), tuple(sorted(options.items()))


def _source(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict, BaseBackend]:
    """What the launch would compile on ``target``, with which options."""
    values, specialization, options, backend = _bound(launch, target)
    signature, constants, attrs = {}, {}, {}
    for at, (name, (kind, special)) in enumerate(zip(values, specialization, strict=True)):
        signature[name] = kind
        if kind == "constexpr":
            constants[at,] = values[name]
        elif isinstance(special, str):
            attrs[at,] = backend.parse_attr(special)
    return ASTSource(launch.kernel, signature, constants, attrs), options, backend


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The kernel that the launch would run on ``target``, compiled."""
    source, options, _ = _source(launch, target)
    return triton.compile(source, target=target, options=options)


def fingerprint(launch: Launch, target: GPUTarget) -> str:
    """A hash of all that the machine code of a launch on ``target`` follows from.

    That is the kernel in Triton's first representation, without the lines of the files that it was written in, the
    options, the versions of Triton and of its assembler, and the environment variables that Triton asks for.
    """
    source, options, backend = _source(launch, target)
    chosen = backend.parse_options(dict(options, **source.parse_options()))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation = backend.get_codegen_implementation(chosen)
    module = source.make_ir(target, chosen, implementation, backend.get_module_map(), context)
    environment = sorted(get_cache_invalidating_env_vars().items())
    parts = (module.str_nodebug(), triton.__version__, backend.hash(), chosen.hash(), str(environment))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def name_of(kernel: JITFunction) -> str:
    """The kernel's module and name: two modules may have kernels of one name."""
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


def compile_all(
    everything: bool = False,
    targets: Sequence[str] = ("sm_80", "sm_90"),
    kernels: Sequence[str] = (),
    known: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """A row for each distinct launch and target: its kernel, variant and `fingerprint`, and the result of `inspect`.

    A kernel that Triton cannot compile for an AMD GPU has a row that says why, in ``failed``.

    Args:
        everything: every variant of every kernel.
        targets: names in `TARGETS`.
        kernels: names as `name_of` gives them; all if there is none.
        known: rows of an earlier run. Where the fingerprint is that of one of them, nothing is compiled: the row is
            that one, under the name of this variant.
    """
    done = set()
    found = {(row["kernel"], row["target"], row["fingerprint"]): row for row in known if "fingerprint" in row}
    for label, call in calls(everything):
        for target, launch in ((t, launch) for t in targets for launch in launches(call, TARGETS[t])):
            key, kernel = (target, *variant(launch)), name_of(launch.kernel)
            if key in done or (kernels and kernel not in kernels):
                continue
            done.add(key)
            row = {"kernel": kernel, "target": target, "variant": label}
            try:
                row["fingerprint"] = fingerprint(launch, TARGETS[target])
                before = found.get((kernel, target, row["fingerprint"]))
                yield {**before, **row} if before else {**row, **inspect(compiled(launch, TARGETS[target]))}
            except CompilationError as error:
                if TARGETS[target].backend == "cuda":
                    raise
                yield {**row, "failed": str(error.__cause__ or error).strip().splitlines()[-1]}


def _line(row: dict[str, Any]) -> str:
    head = f"{row['kernel']:28} {row['target']:6}"
    if "failed" in row:
        return f"{head} not compiled: {row['failed']}  {row['variant']}"
    numbers = " ".join(f"{row[name]:9}" for name in _NUMBERS)
    loads = "/".join(f"{count}x{bits}" for bits, count in row["loads"].items())
    return f"{head} {numbers}  {loads:28} {row['variant']}"


_NUMBERS = ("registers", "stack", "spills", "shared", "tensor")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every variant of every kernel")
    parser.add_argument("--target", nargs="+", default=["sm_80", "sm_90"], choices=TARGETS)
    parser.add_argument("--kernel", nargs="+", default=[], help="of these kernels only, such as commit._commit")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--known", type=Path, help="compile nothing that this file of --json has, unchanged")
    parser.add_argument("--against", type=Path, help="fail where a kernel is worse than in this file")
    options = parser.parse_args()
    if not isinstance(commit._commit, JITFunction):
        parser.error("TRITON_INTERPRET is set: the kernels cannot be compiled")
    print(f"{'kernel':28} {'target':6} " + " ".join(f"{name:>9}" for name in _NUMBERS) + "  loads, by bits")
    known = json.loads(options.known.read_text())["rows"] if options.known else []
    rows, faults = [], []
    for row in compile_all(options.all, options.target, options.kernel, known):
        rows.append(row)
        bad = row["target"].startswith("sm_") and (row["stack"] > 0 or row["spills"] > 0)
        if bad:
            faults.append(f"{row['kernel']} {row['variant']} needs stack memory on {row['target']}")
        print(_line(row) + ("  FAILED" if bad else ""), flush=True)
    if options.json:
        command = " ".join(["python", *sys.orig_argv[1:]])
        head = {"triton": triton.__version__, "date": time.strftime("%Y-%m-%d"), "command": command}
        options.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    if options.against:
        before = json.loads(options.against.read_text())
        if before["triton"] == triton.__version__:
            faults += compare(rows, before["rows"])
        else:
            print(f"not compared: {options.against} is of Triton {before['triton']}, this is {triton.__version__}")
    for fault in faults:
        print("FAILED:", fault)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
