"""Make many runs: finished ones are skipped, the others are recorded as they end."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from bench.learning.suite import Record, Suite, device_of, protocol_of
from bench.machine import machine

KEY = ("scenario", "method", "seed", "options", "protocol")


def key_of(record: Record) -> str:
    """The fields of `KEY` as text: two runs with the same key are the same run."""
    return json.dumps([record[name] for name in KEY], sort_keys=True)


class Journal:
    """A file of finished runs, one JSON object per line. Each line is flushed to the disk when its run ends.

    An incomplete line, left by a process that was killed, is ignored, so that its run is made again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        if path.exists():
            whole = path.read_text()
            for line in whole.splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self.records[key_of(record)] = record
            if whole and not whole.endswith("\n"):
                with path.open("a") as file:
                    file.write("\n")

    def add(self, record: Record) -> None:
        """Append ``record`` to the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[key_of(record)] = record

    def rewrite(self, wanted: Callable[[Record], bool]) -> None:
        """Remove the records for which ``wanted`` is false; sort the others by scenario, method, options and seed.

        Records that other processes have added to the file meanwhile are kept.
        """
        self.records = {**Journal(self.path).records, **self.records}
        kept = [r for r in self.records.values() if wanted(r)]
        kept.sort(key=lambda r: (r["scenario"], r["method"], json.dumps(r["options"]), r["seed"]))
        self.records = {key_of(r): r for r in kept}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        os.replace(temporary, self.path)


def wanted(
    suite: Suite, scenario: str, method: str, seed: int, options: Record, *, tuning: bool, sweep: bool = False
) -> Record:
    """The record of a run to be made. A run with ``sweep`` belongs to a trade-off curve only."""
    protocol = protocol_of(suite, tuning=tuning, sweep=sweep)
    return {"scenario": scenario, "method": method, "seed": seed, "options": options, "protocol": protocol}


def run_all(
    suite: Suite, todo: Sequence[Record], journal: Journal, *, jobs: int = 1, finished: Callable[[Record], None]
) -> None:
    """Make the runs of ``todo`` that are not in ``journal``, and add them to it.

    Args:
        jobs: number of processes; each run uses one thread.
        finished: called with each record of ``todo`` that is finished, first with those that are skipped.
    """
    left = []
    for record in todo:
        if key_of(record) in journal.records:
            finished(journal.records[key_of(record)])
        else:
            left.append(record)
    for record in _results(suite, left, jobs):
        journal.add(record)
        finished(record)


def _results(suite: Suite, todo: list[Record], jobs: int) -> Iterator[Record]:
    if jobs == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for record in todo:
                yield one(suite, record, jobs)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = {pool.submit(one, suite, record, jobs) for record in todo}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in waiting:
                future.cancel()


def one(suite: Suite, record: Record, jobs: int) -> Record:
    """Make the run ``record``.

    Returns:
        ``record``, what the suite measured, the ``machine``, the ``date``, and ``jobs``, the number of processes that
        ran on the machine at once.
    """
    p = record["protocol"]
    out = suite.run(record["scenario"], record["method"], record["seed"], record["options"], tuning=p["tuning"])
    made = {"machine": machine(device_of(suite)), "date": time.strftime("%Y-%m-%d"), "jobs": jobs}
    return {**record, **out, **made}


def shares_gpu(record: Record) -> bool:
    """Whether other runs were computed on the same GPU at the same time, so that times say nothing about the method."""
    return "device" in record.get("protocol", {}) and record.get("jobs", 1) > 1
