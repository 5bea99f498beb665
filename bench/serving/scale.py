"""``python -m bench.serving.scale``: what one user costs a server and its store, for the sizing in docs/scale.md.

A user of SmolLM2 with the options of ``ttt serve`` says short turns and is studied; the bytes of the state are counted,
and states of these sizes are put into and read from stores with each kind of index, flushed to the disk. Writes
``bench/serving/results/scale.json``.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import ttt
from bench import postgres
from bench.kernels.timing import quartiles
from bench.machine import provenance
from ttt.conversation import Telling
from ttt.serve.main import ServeOptions, build_learner
from ttt.serve.teaching import Teaching
from ttt.store.serialization import encode

TURNS = ("My dog is called Biscuit.", "I live in Ghent, and work as a baker.", "My sister Ada is a pilot.",
         "I am allergic to walnuts.")  # fmt: skip

app = typer.Typer(add_completion=False)


def users_bytes(learner: ttt.Learner, tokenizer: Any, rounds: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Bytes of a user's state in the store as they talk, and before and after a study; and the last state."""
    pool = learner.pool
    assert pool is not None
    pool.open("ada")
    talk = [{"turns": 0, "tokens": 0, "bytes": len(encode(pool.export("ada"), {}))}]
    tokens = 0
    for number in range(rounds * len(TURNS)):
        text = TURNS[number % len(TURNS)]
        lesson = Teaching().lesson(tokenizer, [{"role": "user", "content": text}], 2048)
        assert lesson is not None
        ids, mask = lesson.tensors()
        learner.observe(ids, learn_mask=mask, users=["ada"], **Telling().of(lesson.tokens).options)
        tokens += lesson.tokens
        talk.append({"turns": number + 1, "tokens": tokens, "bytes": len(encode(pool.export("ada"), {}))})
    learner.study("ada", passes=2)  # the bytes do not depend on how often
    state = pool.export("ada")
    layers = list(pool.layers.values())
    slot = sum((layer.a[0].nbytes + layer.b[0].nbytes) for layer in layers)
    buffers = sum(
        t[0].nbytes
        for layer in layers
        for t in layer.buffers()
        if t.ndim and t.shape[0] == pool.slots and t.data_ptr() not in (layer.a.data_ptr(), layer.b.data_ptr())
    )
    return {
        "layers": len(layers),
        "talk": talk,
        "before_study_bytes": talk[-1]["bytes"],
        "after_study_bytes": len(encode(state, {})),
        "tensors": len(state),
        "slot_bytes": slot,
        "slot_other_bytes": buffers,
        "parameters_bytes": sum(p.nbytes for p in learner.model.parameters()),
    }, state


def milliseconds(run: Callable[[int], Any], count: int) -> dict[str, float]:
    """Quartiles and the 99th percentile of ``count`` runs, in milliseconds, and runs per second."""
    seconds = []
    for number in range(count):
        began = time.perf_counter()
        run(number)
        seconds.append(time.perf_counter() - began)
    low, median, high = quartiles(seconds)
    worst = sorted(seconds)[int(0.99 * (count - 1))]
    found = {"q1": low, "median": median, "q3": high, "p99": worst}
    rounded = {name: round(1e3 * value, 3) for name, value in found.items()}
    return rounded | {"per_second": round(count / sum(seconds), 1)}


def store_figures(url: str, state: dict[str, torch.Tensor], count: int) -> dict[str, Any]:
    """Times of one client's operations on an empty store at ``url``, one after the other."""
    leases: list[Any] = []
    with ttt.Store(url) as store:
        found = {
            "lease": milliseconds(lambda n: leases.append(store.lease(f"user-{n}", 600)), count),
            "renew": milliseconds(lambda n: leases[n].renew(), count),
            "put": milliseconds(lambda n: store.put(leases[n], state, {"updates": n}), count),
            "get": milliseconds(lambda n: store.get(f"user-{n}"), count),
            "release": milliseconds(lambda n: leases[n].release(), count),
        }
        return found | {"count": count, "journal": store.journal, "state_bytes": len(encode(state, {}))}


@app.command()
def main(
    count: Annotated[int, typer.Option(min=10, help="Users of each store.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="How often the four turns are said.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="For temporary files, on the disk to measure.")] = None,
    json_file: Annotated[Path, typer.Option("--json")] = Path("bench/serving/results/scale.json"),
) -> None:
    """Measure, and write the figures to a file."""
    learner, tokenizer = build_learner(ServeOptions(slots=2))
    user, state = users_bytes(learner, tokenizer, rounds)
    found: dict[str, Any] = {"machine": provenance("cpu"), "user": user, "store": {}}
    for kind in ("sqlite", "postgresql"):
        with tempfile.TemporaryDirectory(dir=folder) as temporary, contextlib.ExitStack() as stack:
            url = f"{temporary}/store"
            if kind == "postgresql":
                url = f"{stack.enter_context(postgres.running(fsync=True))()}&blobs=file://{temporary}/blobs"
            found["store"][kind] = store_figures(url, state, count)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(found, indent=1) + "\n")
    typer.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    app()
