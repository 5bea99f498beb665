"""``python -m bench.kernels.store``: bytes and seconds of a user of the demo model in a `ttt.Store` of 10,000.

A state is a pair of factors of rank 16 for each MLP layer of the demo model's last two blocks, in float32, random. The
last ``--flushed`` users are put as usual, flushed to the disk before the call returns; those before only fill the
store, without a flush, which saves minutes. A user is read "cold" after the system was told to drop its pages
(``posix_fadvise``), from a store opened anew, and "warm" after that. Writes ``bench/kernels/results/store.json``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console

import ttt
from bench.kernels.timing import quartiles
from bench.machine import provenance
from ttt.demo import load_model
from ttt.store import Store

RANK = 16
SPARE = 2  # so many times the bytes that the users take must be free

app = typer.Typer(add_completion=False)


def demo_state() -> dict[str, torch.Tensor]:
    """A user's random state for the layers that the demo adapts."""
    model, config = load_model()
    ttt.adapt_(model, config)
    state = {}
    for name, layer in ttt.learning_layers(model):
        state[f"{name}.a"] = torch.randn(RANK, layer.in_features)
        state[f"{name}.b"] = torch.randn(RANK, layer.out_features)
    return state


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Quartiles, the 99th percentile and the maximum of ``seconds``, in milliseconds."""
    low, median, high = quartiles(seconds)
    worst = sorted(seconds)
    found = {"q1": low, "median": median, "q3": high, "p99": worst[int(0.99 * (len(worst) - 1))], "max": worst[-1]}
    return {name: round(1e3 * value, 3) for name, value in found.items()}


def timed(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def fill(store: Store, state: dict[str, torch.Tensor], numbers: range) -> tuple[list[float], list[float]]:
    """Seconds of each user's put, and of taking and releasing the lease."""
    puts, leases = [], []
    for number in numbers:
        state[next(iter(state))][0, 0] = number  # no two states are the same
        began = time.perf_counter()
        with store.lease(f"user-{number}") as lease:
            before = time.perf_counter()
            store.put(lease, state, {"tokens": number})
            puts.append(time.perf_counter() - before)
        leases.append(time.perf_counter() - began - puts[-1])
    return puts, leases


def drop_pages(path: Path) -> None:
    """Ask the system to drop the pages of a file from memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def measure(folder: Path, users: int, flushed: int, samples: int) -> dict[str, Any]:
    """Fill a store in ``folder`` with ``users`` users and read ``samples`` of them; the figures."""
    state = demo_state()
    payload = sum(t.nbytes for t in state.values())
    free = shutil.disk_usage(folder).free
    if free < SPARE * users * payload:
        raise typer.BadParameter(f"{users} users take {users * payload} bytes; {folder} has {free} free")
    with Store(str(folder / "store")) as store, mock.patch("os.fsync"):
        store.index.connection().execute("PRAGMA synchronous = OFF")
        fill(store, state, range(users - flushed))
    os.sync()
    with Store(str(folder / "store")) as store:
        puts, leases = fill(store, state, range(users - flushed, users))
    blobs = sum(path.stat().st_size for path in (folder / "store" / "blobs").rglob("*") if path.is_file())
    index = sum(path.stat().st_size for path in (folder / "store").glob("index.db*"))
    chosen = [f"user-{number}" for number in random.Random(0).sample(range(users), samples)]
    cold, warm = [], []
    for user in chosen:
        with Store(str(folder / "store")) as store:
            drop_pages(store.blobs.root / store.history(user)[0].key)  # type: ignore[attr-defined]
            drop_pages(folder / "store" / "index.db")
        began = time.perf_counter()
        with Store(str(folder / "store")) as store:
            found = store.get(user)
            cold.append(time.perf_counter() - began)
            warm.append(timed(lambda: store.get(user)))  # noqa: B023 (called at once)
        if found.meta["tokens"] != int(user.removeprefix("user-")):
            raise AssertionError(f"{user} got the state of another")
    with Store(str(folder / "store")) as store:
        listed = timed(store.users)
        verified = timed(store.verify)
        collected = timed(lambda: store.gc(grace=0))
        forgotten = [timed(lambda: store.forget(user)) for user in chosen[:20]]  # noqa: B023
    return {
        "users": users,
        "rank": RANK,
        "tensors": len(state),
        "state_bytes": payload,
        "bytes_per_user": round((blobs + index) / users),
        "index_bytes_per_user": round(index / users),
        "total_bytes": blobs + index,
        "flushed": flushed,
        "put_ms": milliseconds(puts),
        "lease_and_release_ms": milliseconds(leases),
        "open_store_and_get_cold_ms": milliseconds(cold),
        "get_warm_ms": milliseconds(warm),
        "forget_ms": milliseconds(forgotten),
        "users_seconds": round(listed, 3),
        "verify_seconds": round(verified, 1),
        "gc_seconds": round(collected, 1),
    }


@app.command()
def main(
    users: Annotated[int, typer.Option(min=20, help="Users to store.")] = 10_000,
    flushed: Annotated[int, typer.Option(min=20, help="Users whose put is timed.")] = 1000,
    samples: Annotated[int, typer.Option(min=20, help="Users to read.")] = 300,
    folder: Annotated[Path | None, typer.Option(help="For a temporary folder, on the disk to measure.")] = None,
    json_file: Annotated[Path, typer.Option("--json", help="The file to write.")] = Path(
        "bench/kernels/results/store.json"
    ),
) -> None:
    """Fill a store, read from it, and write the figures to a file."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        figures = measure(Path(temporary), users, min(flushed, users), min(samples, users))
    found = {"machine": provenance("cpu"), "figures": figures}
    json_file.write_text(json.dumps(found, indent=1) + "\n")
    Console().print_json(data=found)


if __name__ == "__main__":
    app()
