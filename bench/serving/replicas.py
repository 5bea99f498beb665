"""``python -m bench.serving.replicas``: two servers over one store, killed by turns; is anything lost that was learnt?

Users talk to two processes that do what ``ttt serve`` does, with a tiny model. Each turn asks to be acknowledged once
it is stored (``x-ttt-learn: wait``). One server after the other is killed by SIGKILL and started again; at the end both
are stopped, and every user's final state is compared with what the user said (`bench.serving.account`). Writes
``bench/serving/results/replicas.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import ttt
from bench import postgres
from bench.machine import provenance
from bench.serving.account import account_for
from bench.serving.servers import ServerProcess, tiny_folder
from bench.serving.talk import REFUSED, STORED, Attempt, Talker
from ttt.serve.main import ServeOptions, build_learner

HELD = "another server"  # in the answer of a server without the lease
CONTEXT = 512

app = typer.Typer(add_completion=False)


def moves(
    attempts: dict[str, Sequence[Attempt]], kills: Sequence[tuple[float, int]]
) -> tuple[list[float], list[float]]:
    """Of the users whose server was killed, seconds from the kill to the last refusal because of the dead server's
    lease (of users who asked so early), and to the first turn that another server acknowledged."""
    refusals, moved = [], []
    for at, (killed, server) in enumerate(kills):
        until = kills[at + 1][0] if at + 1 < len(kills) else float("inf")
        for made in attempts.values():
            before = [each for each in made if each.ended <= killed and each.outcome == STORED]
            if not before or before[-1].server != server:
                continue
            after = [each for each in made if killed < each.ended < until]
            first = next((each for each in after if each.outcome == STORED), None)
            if first is None or first.server == server:
                continue
            moved.append(first.ended - killed)
            held = [e.ended - killed for e in after if e.ended < first.ended and e.outcome == REFUSED and HELD in e.why]
            refusals += held[-1:]
    return refusals, moved


def run(
    store: str, folder: Path, model: Path, *, users: int, kills: int, lease_seconds: float, pause: float = 10.0,
    settle: float = 3.0, slots: int = 32,
) -> dict[str, Any]:  # fmt: skip
    """Run the experiment over the store at ``store``; the counts.

    Args:
        folder: for the calibration and the servers' logs.
        model: folder of the model.
        users: number of users who talk.
        kills: number of times that a server is killed.
        lease_seconds: of the servers' leases.
        pause: seconds between a user's turns, on average.
        settle: seconds that both servers run between two kills.
        slots: of each server.
    """
    calibration = folder / "calibration"
    options = ServeOptions(
        model=model, store=store, slots=slots, context=CONTEXT, calibration=calibration, lease_seconds=lease_seconds,
        study_after=0.0,
    )  # fmt: skip
    learner, tokenizer = build_learner(options)  # writes the calibration that all share
    servers = [ServerProcess(options, folder / f"server{at}.log") for at in range(2)]
    stop, killed = threading.Event(), list[tuple[float, int]]()
    talkers = [
        Talker(f"user-{at}", [s.url for s in servers], model.name, pause=pause, stray=0.1, stop=stop, seed=at)
        for at in range(users)
    ]  # fmt: skip
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_ready()
        began = time.monotonic()
        for talker in talkers:
            talker.start()
        time.sleep(settle)
        for number in range(kills):
            server = servers[number % 2]
            server.kill()
            killed.append((time.monotonic(), number % 2))
            time.sleep(1.5 * lease_seconds)  # long enough for its users to move
            server.start()
            server.wait_until_ready()
            time.sleep(settle)
        stop.set()
        for talker in talkers:
            talker.join(90)
        stuck = [talker.user for talker in talkers if talker.is_alive()]
        seconds = time.monotonic() - began
        statuses = [server.stop() for server in servers]
    finally:
        stop.set()
        for server in servers:
            server.end()
    attempts: dict[str, Sequence[Attempt]] = {talker.user: talker.attempts for talker in talkers}
    refusals, moved = moves(attempts, killed)
    with ttt.Store(store) as opened:
        account = account_for(opened, attempts, learner, tokenizer, CONTEXT)
        versions = sum(each.versions for each in opened.users())
        damaged = bool(opened.verify().damaged)
    return {
        "kills": len(killed), "lease_seconds": lease_seconds, "slots_per_server": slots, "seconds": round(seconds, 1),
        **dataclasses.asdict(account), "faults": account.faults, "stuck_users": stuck, "exit_statuses": statuses,
        "versions": versions, "store_damaged": damaged,
        "refused_for_the_lease": sum(HELD in each.why for made in attempts.values() for each in made),
        "moves": len(moved),
        "last_refusal_after_kill_seconds": {"users": len(refusals), "max": round(max(refusals, default=0.0), 2)},
        "kill_to_next_stored_turn_seconds": {
            "median": round(statistics.median(moved), 2) if moved else None, "max": round(max(moved, default=0.0), 2),
        },
    }  # fmt: skip


@app.command()
def main(
    users: Annotated[int, typer.Option(min=1)] = 100,
    kills: Annotated[int, typer.Option(min=0)] = 10,
    lease_seconds: Annotated[float, typer.Option(min=1)] = 4.0,
    pause: Annotated[float, typer.Option(min=0, help="Seconds between a user's turns, on average.")] = 10.0,
    slots: Annotated[int, typer.Option(min=1, help="Of each server.")] = 64,
    index: Annotated[str, typer.Option(help="sqlite, postgresql, or both with a comma.")] = "sqlite,postgresql",
    json_file: Annotated[Path, typer.Option("--json")] = Path("bench/serving/results/replicas.json"),
) -> None:
    """Kill servers while users talk to them, and account for every acknowledged turn."""
    # Of a file that is there, the results with other indexes are kept.
    found: dict[str, Any] = json.loads(json_file.read_text()) if json_file.exists() else {}
    if not set(index.split(",")) <= {"sqlite", "postgresql"}:
        raise typer.BadParameter(f"index must be sqlite, postgresql or both, got {index!r}", param_hint="--index")
    for kind in index.split(","):
        with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
            folder = Path(temporary)
            store = str(folder / "store")
            if kind == "postgresql":
                store = f"{stack.enter_context(postgres.running())()}&blobs=file://{folder}/blobs"
            model = tiny_folder(folder / "tiny-chat")
            counts = run(
                store, folder, model, users=users, kills=kills, lease_seconds=lease_seconds, pause=pause, slots=slots
            )  # fmt: skip
        found[kind] = {"machine": provenance("cpu"), **counts}
        typer.echo(json.dumps(counts, indent=1))
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    if any(result["faults"] or result["store_damaged"] for result in found.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
