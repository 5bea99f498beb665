"""``python -m bench.kernels.predict``: how long the GPU kernels should take, written down before any is measured.

    time of a launch = start + max(bytes / (copy * fed), flops / rate * rounds, instructions / issued * rounds, steps)

where ``fed`` is min(1, bytes in flight / (copy * latency)), by Little's law, with the bytes that the resident threads
load in one pass over the kernel's instructions; and ``rounds`` is ceil(r) / r for a grid that takes r > 1 rounds of the
programs that fit the GPU at a time, which follows from registers, shared memory and warps. Bytes are those that must
come from memory or go there once; what is read again comes from the cache. Registers and loads are those of sm_90, as
Triton compiles the very launches. `CEILINGS` are what such GPUs are known to reach; what is in `ASSUMED` was not
measured.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

RESULTS = Path(__file__).parent / "results" / "gpu_predictions.json"
CEILINGS = {
    "H100": {"copy": 3.0e12, "bfloat16": 790e12},
    "H200": {"copy": 4.3e12, "bfloat16": 790e12},
}
"""Bytes per second of a copy (bytes read and bytes written both count), and flops per second of a product."""
ASSUMED = {
    "multiprocessors": 132,
    "latency": 0.8e-6,  # seconds from a load's issue to its data, of a busy memory
    "start": 2.0e-6,  # seconds from the end of a launch in a graph to the first loads of the next
    "issued": 4 * 132 * 1.7e9,  # instructions of a warp, per second
    "step": 0.5e-6,  # seconds of a step of a program that exchanges numbers between its threads
    "tf32": 395e12, "float32": 54e12, "float64": 27e12,  # flops per second, as the data sheet's ratios to bfloat16
}  # fmt: skip


class Work(NamedTuple):
    """What a launch must do: bytes of memory, flops of a type, a warp's instructions in each program, serial steps."""

    bytes: float
    flops: float = 0
    rate: str = "bfloat16"
    instructions: float = 0
    steps: float = 0


def resident(registers: int, shared: int, warps: int) -> int:
    """Programs that one multiprocessor of sm_90 holds at a time."""
    allocated = math.ceil(registers / 8) * 8 * 32 * warps
    by_shared = 32 if not shared else 227 * 1024 // (shared + 1024)
    return max(1, min(65536 // allocated, by_shared, 64 // warps, 32))


def seconds(work: Work, programs: int, code: dict[str, Any], gpu: str) -> tuple[float, str]:
    """The time of a launch of ``programs``, and what it is bound by; ``code`` is of `ttt.ops.triton.aot_inspect`."""
    rates = {**ASSUMED, **CEILINGS[gpu]}
    places = rates["multiprocessors"] * resident(code["registers"], code["shared"], code["warps"])
    loaded = sum(int(bits) * count for bits, count in code["loads"].items()) / 8
    flying = min(programs, places) * code["warps"] * 32 * loaded
    fed = min(1.0, flying / (rates["copy"] * rates["latency"]))
    rounds = programs / places
    rounds = math.ceil(rounds) / rounds if rounds > 1 else 1.0
    # Programs fewer than multiprocessors use only a part of the GPU's arithmetic.
    part = min(1.0, programs / rates["multiprocessors"])
    bounds = {
        "bytes": work.bytes / (rates["copy"] * fed),
        "flops": work.flops / rates[work.rate] * rounds / part,
        "instructions": programs * code["warps"] * work.instructions / rates["issued"] * rounds / part,
        "steps": work.steps * rates["step"],
    }
    by = max(bounds, key=lambda name: bounds[name])
    return rates["start"] + bounds[by], by


def _padded(rows: int) -> int:
    return math.ceil(rows / 16) * 16


def works(m: int, n: int, tokens: int, window: int, rows: int, state: float = 2) -> dict[str, Work]:
    """The work of each kernel for bfloat16 weights of m x n, by the kernel's name.

    Args:
        tokens: of the launch.
        window: C, rows of the window.
        rows: replay rows; of users, rows of a slot.
        state: bytes for a number of importance and of trace.
    """
    entries, both = m * n, m + n
    kept = entries * (6 + 3 * state)  # W is read and written, W* and Omega read, F read and written
    blocks = _padded(tokens) // 16 + _padded(rows) // 16
    return {
        # A warp issues some 850 instructions for its part of a tile and 145 for every 16 tokens (`commit._BLOCKS`).
        "commit._commit": Work(
            kept + 2 * tokens * both, 6 * entries * _padded(tokens) + 4 * entries * _padded(rows),
            instructions=850 + 145 * blocks,
        ),
        "replay._products": Work(2 * (tokens + rows) * n, 2 * (tokens + rows) * rows * n, "float64"),
        "replay._invert": Work(8 * rows * rows, steps=rows),
        "replay._drift": Work(
            4 * entries + 2 * rows * n + 2 * tokens * m, 2 * _padded(rows) * (entries + 3 * m * tokens), "tf32"
        ),
        "replay._project": Work(4 * rows * m * (1 + math.ceil(n / 1024)), 2 * rows * rows * m, "float64"),
        "panels._factors": Work(2 * tokens * both + 2 * tokens * (2 * m + n)),
        "panels._finish": Work(kept, instructions=850 + 145 * (_padded(rows) // 16)),
        "window_linear._few_coefficients": Work(2 * (window + tokens) * n, 2 * window * tokens * n, "float32"),
        "window_linear._decode_one": Work(2 * (entries + window * m + both), 2 * entries, "float32"),
        "window_linear._decode_few": Work(
            2 * (entries + window * m + tokens * both), 2 * 16 * (entries + 2 * _padded(window) * m)
        ),
        "append._append": Work(4 * tokens * both),
        "low_rank._take_out": Work(4 * tokens * n),
        "low_rank._put_nan": Work(4 * tokens),
        "low_rank._few_inner": Work(2 * tokens * rows * n, 2 * tokens * rows * n, "float32"),
        "low_rank._few_add": Work(2 * tokens * (rows + 2) * m, 2 * tokens * rows * m, "float32"),
    }  # fmt: skip


class Case(NamedTuple):
    """One prediction: launches, how often each is made for one unit of the case, and torch's products beside them."""

    name: str
    calls: Sequence[tuple[Callable[[], None], float, dict[str, Work]]]
    products: Sequence[tuple[float, float]]  # (bytes, flops) of each
    traffic: float  # bytes that the whole must move
    matmul: float = 0  # flops of the products, where these bound the whole


def _cases() -> Iterator[Case]:
    import torch

    from ttt.ops.triton import aot_calls as launchers

    bf16, m, n = torch.bfloat16, launchers.M, launchers.N
    yield Case("`nn.Linear` 4096x4096, 1 token", [], [(2 * m * n, 2 * m * n)], 2 * m * n)
    for tokens, rows, state in ((1, 0, bf16), (16, 0, bf16), (16, 4, bf16), (16, 0, torch.uint8), (64, 0, bf16),
                                (256, 0, bf16), (2048, 0, bf16), (8192, 0, bf16)):  # fmt: skip
        size = 2 if state == bf16 else 1 + 1 / 32
        work = works(m, n, tokens, 0, rows, size)
        many = tokens > 256
        products = [(2 * tokens * (m + n) + 8 * m * n, 2 * m * n * tokens)] * 2 if many else []
        yield Case(
            f"commit 4096x4096, T = {tokens}, R = {rows}{'' if state == bf16 else ', 8-bit state'}",
            [(functools.partial(launchers._commit, bf16, state, "fisher", rows, 1.0, tokens), 1, work)],
            products, m * n * (6 + 3 * size + (4 if rows else 0)), 4 * m * n * tokens if many else 0,
        )  # fmt: skip
    for tokens, window in ((t, c) for t in (1, 8) for c in (16, 64, 128)):
        share = tokens / window
        calls = [
            (functools.partial(launchers._linear, bf16, tokens, False, window), 1, works(m, n, tokens, window, 0)),
            (functools.partial(launchers._append, bf16, False), 1, works(m, n, tokens, window, 0)),
            (
                functools.partial(launchers._commit, bf16, bf16, "fisher", 0, 1.0, window),
                share,
                works(m, n, window, 0, 0),
            ),
        ]
        yield Case(f"decode 4096x4096, {tokens} tokens at once, window {window}", calls, [], m * n * (2 + 12 * share))
    users = works(m, n, 32, 0, 80)
    yield Case(
        "32 users' tokens, 4096x4096, slots of 80 rows", [(functools.partial(launchers._low_rank, bf16, 32), 1, users)],
        [(2 * m * n, 2 * 32 * m * n)], 2 * m * n + 2 * 32 * 80 * (m + n),
    )  # fmt: skip


def predict(case: Case) -> dict[str, Any]:
    """The row of a case: its launches with their code and work, and the times on each GPU."""
    from ttt.ops.triton import aot
    from ttt.ops.triton.aot_inspect import inspect

    launches = []
    for call, times, work in case.calls:
        made = [launch for launch in aot.launches(call) if aot.name_of(launch.kernel) in work]
        names = [aot.name_of(launch.kernel) for launch in made]
        for launch, name in zip(made, names, strict=True):
            own = work[name]
            if name == "panels._finish":  # one launch for each panel
                own = own._replace(bytes=own.bytes / names.count(name))
            code = inspect(aot.compiled(launch, aot.CUDA))
            code = {key: code[key] for key in ("registers", "shared", "warps", "loads")}
            launches.append(
                {"kernel": name, "times": times, "programs": math.prod(launch.grid), **code, "work": own._asdict()}
            )
    row = {"case": case.name, "launches": launches, "products": case.products, "traffic": case.traffic,
           "matmul": case.matmul}  # fmt: skip
    return {**row, "predicted": {gpu: of_row(row, gpu) for gpu in CEILINGS}}


def of_row(row: dict[str, Any], gpu: str) -> dict[str, Any]:
    """Times in us of a row on ``gpu``: all, what its bytes or products alone would take, and of each launch."""
    rates, parts = {**ASSUMED, **CEILINGS[gpu]}, []
    for launch in row["launches"]:
        took, by = seconds(Work(**launch["work"]), launch["programs"], launch, gpu)
        parts.append({"kernel": launch["kernel"], "us": 1e6 * took, "bound by": by, "times": launch["times"]})
    total = sum(part["us"] * part["times"] for part in parts)
    for size, flops in row["products"]:
        total += 1e6 * (rates["start"] + max(size / rates["copy"], flops / rates["bfloat16"]))
    bound = row["matmul"] / rates["bfloat16"] if row["matmul"] else row["traffic"] / rates["copy"]
    return {"us": total, "bound_us": 1e6 * bound, "launches": parts}


app = typer.Typer(add_completion=False)


@app.command()
def main(to: Annotated[Path, typer.Option(help="The file to write.")] = RESULTS) -> None:
    """Write the predicted time of every case on every GPU."""
    import triton

    head = {
        "what": "predictions of a model, not measurements", "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"), "command": " ".join(["python", *sys.orig_argv[1:]]),
        "ceilings": CEILINGS, "assumed": ASSUMED,
    }  # fmt: skip
    rows = [predict(case) for case in _cases()]
    for row in rows:
        print(row["case"], {gpu: round(found["us"], 1) for gpu, found in row["predicted"].items()})
    to.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    app()
