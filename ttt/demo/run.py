"""The demo: one model, one text it has never seen, eight ways to read it.

Every method reads the same pieces of the same stream, in turn, so that all of them meet the same noise of the
machine. Each byte is scored before anything is learnt from it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import ttt
from ttt.defences import SWITCHES
from ttt.demo import text as texts
from ttt.demo.model import COLUMNS, CONTEXT, LN2, as_ids, bits_per_byte, load_model, score, score_in_context, windows

# Alone, each defence has to be stronger than beside the others, and the best rate is lower: see
# bench.learning.experiments.tune.
RATE_ALONE, EWC_ALONE, BETA_ALONE, DIRECTIONS_ALONE = 0.02, 0.003, 0.2, 16
FROZEN, IN_CONTEXT, SGD, EWC, REPLAY = "frozen", "in-context only", "SGD", "EWC", "replay"
ORTHOGONAL, DEFAULT, GROWING = "orthogonal", "default", "columns"


@dataclasses.dataclass
class Result:
    """One method on one domain. Bits per byte; ``curve`` holds the mean of each piece of 512 bytes."""

    method: str
    new: float = math.nan
    old: float = math.nan
    seconds: float = 0.0
    tokens: int = 0
    curve: list[float] = dataclasses.field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def methods(config: ttt.TTTConfig) -> dict[str, ttt.TTTConfig | None]:
    """Name -> configuration; None learns nothing.

    SGD has no protection, at its own best rate; the default has all; the columns have a configuration of their own.
    """
    plain: dict[str, Any] = {**SWITCHES, "lr": RATE_ALONE}
    return {
        FROZEN: None,
        IN_CONTEXT: None,
        SGD: config.with_flat(**plain),
        EWC: config.with_flat(**{**plain, "ewc_lambda": EWC_ALONE}),
        REPLAY: config.with_flat(**{**plain, "replay_rows": config.replay_rows, "replay_beta": BETA_ALONE}),
        ORTHOGONAL: config.with_flat(**{**plain, "orthogonal": DIRECTIONS_ALONE}),
        DEFAULT: config,
        GROWING: COLUMNS,
    }


def calibration_batches() -> list[Tensor]:
    """64 windows of the text the model was trained on, for `ttt.Learner.calibrate`."""
    return list(windows(texts.training_python(), 64).split(16))


class Reader:
    """A model that reads a stream piece by piece in one of the eight ways."""

    def __init__(self, method: str, base: nn.Module, config: ttt.TTTConfig | None, batches: list[Tensor]) -> None:
        self.result = Result(method)
        self.model = copy.deepcopy(base)
        self.learner: Any = None  # for the methods that learn
        if config is not None:
            ttt.adapt_(self.model, config)
            self.learner = ttt.Learner(self.model, context=CONTEXT)
            if config.calibrates:
                self.learner.calibrate(batches)
            if method == GROWING:
                self.learner = ttt.GrowingLearner(self.learner)

    def bits(self, rows: Tensor) -> float:
        """Mean bits per byte of ``rows`` (N, T), text that is not learnt from."""
        if isinstance(self.learner, ttt.GrowingLearner):
            return float(self.learner.score(rows).mean(dtype=torch.float64)) / LN2
        return bits_per_byte(self.model, rows)

    def read(self, stream: Tensor, start: int, end: int) -> None:
        """Score bytes start + 1 ... end; byte ``start`` is their first context."""
        began = time.perf_counter()
        if self.learner is not None:
            nll = self.learner.observe(stream[:, start : end + 1]).nll
        elif self.result.method == FROZEN:
            nll = score(self.model, stream[:, start : end + 1])
        else:
            nll = score_in_context(self.model, stream, start, end)
        self.result.seconds += time.perf_counter() - began
        self.result.tokens += nll.numel()
        self.result.curve.append(float(nll.double().mean()) / LN2)


def compare(
    domain: str,
    stream: Tensor,
    base: nn.Module,
    config: ttt.TTTConfig,
    held_out: Tensor,
    old_bits: float,
    batches: list[Tensor],
    progress: Progress,
) -> tuple[dict[str, Result], dict[str, Reader]]:
    """All methods on one stream (1, T). Returns results and readers by method."""
    readers = {}
    task = progress.add_task(f"{domain}: calibrating", total=len(methods(config)))
    for name, method_config in methods(config).items():
        readers[name] = Reader(name, base, method_config, batches)
        progress.advance(task)
    pieces = range(0, stream.shape[1] - 1, CONTEXT)
    progress.update(task, description=f"{domain}: reading", total=len(pieces), completed=0)
    for start in pieces:
        end = min(start + CONTEXT, stream.shape[1] - 1)
        for reader in readers.values():
            reader.read(stream, start, end)
        progress.advance(task)
    progress.update(task, description=f"{domain}: testing", total=len(readers), completed=0)
    for reader in readers.values():
        result = reader.result
        lengths = [min(CONTEXT, stream.shape[1] - 1 - s) for s in pieces]
        result.new = sum(c * n for c, n in zip(result.curve, lengths, strict=True)) / sum(lengths)
        result.old = old_bits if reader.learner is None else reader.bits(held_out)
        progress.advance(task)
    progress.update(task, description=f"{domain}: done")
    return {name: reader.result for name, reader in readers.items()}, readers


def summary(results: dict[str, Result]) -> list[dict]:
    """One row a method: the measured figures, and gain and forgetting as shares of unprotected SGD's."""
    frozen, sgd = results[FROZEN], results[SGD]
    gain, forgetting = frozen.new - sgd.new, sgd.old - frozen.old
    rows = []
    for r in results.values():
        learns = r.method not in (FROZEN, IN_CONTEXT)
        row = {"method": r.method, "new_bpb": r.new, "old_bpb": r.old, "tokens_per_second": r.tokens_per_second}
        row["time_ratio"] = frozen.tokens_per_second / r.tokens_per_second
        row["gain_share"] = (frozen.new - r.new) / gain if r.method != FROZEN and gain > 0 else None
        row["forgetting_share"] = (r.old - frozen.old) / forgetting if learns and forgetting > 0 else None
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def table_of(domain: str, rows: list[dict]) -> Table:
    """A rich table of `summary`."""
    table = Table(
        title=f"{domain}: bits per byte, each byte scored before it is learnt",
        caption="gain and forgetting: % of those of SGD without protection; time: frozen = 1",
    )
    for column in ("method", "new text", "gain", "Python", "forgetting", "tokens/s", "time"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        share = [f"{100 * row[k]:.0f} %" if row[k] is not None else "" for k in ("gain_share", "forgetting_share")]
        cells = [row["method"], f"{row['new_bpb']:.3f}", share[0], f"{row['old_bpb']:.3f}", share[1]]
        cells += [f"{row['tokens_per_second']:.0f}", f"{row['time_ratio']:.2f} x"]
        table.add_row(*cells, style="bold" if row["method"] == DEFAULT else None)
    return table


def recall(reader: Reader, unread: Tensor, folder: Path) -> dict[str, float]:
    """Save what ``reader`` learnt, load it in a new process, and score text of the domain that nobody has read."""
    weights, rows = folder / "user.safetensors", folder / "unread.json"
    ttt.save(reader.model, weights)
    rows.write_text(json.dumps(unread.tolist()))
    command = [sys.executable, "-m", "ttt.demo.recall", str(weights), str(rows)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return {**json.loads(done.stdout.splitlines()[-1]), "file_bytes": weights.stat().st_size}


def machine() -> str:
    """Processor, cores, threads, Python and torch, in one line."""
    active = ttt.info(file=None)
    versions = f"Python {active['python']}, torch {active['torch']}"
    return f"{active['processor']}, {os.cpu_count()} cores, {active['threads']} threads, {versions}"


def main(text: Path | None, report: Path, bytes_per_domain: int) -> None:
    """Run the demo; see ``python -m ttt demo --help``."""
    began = time.perf_counter()
    console = Console()
    base, config = load_model()
    if text is None:
        streams = {name: texts.stream_of(name)[: bytes_per_domain + 1 + 16 * CONTEXT] for name in texts.DOMAINS}
    else:
        streams = {text.name: text.read_bytes()[: bytes_per_domain + 1 + 16 * CONTEXT]}
        if len(streams[text.name]) < 4 * CONTEXT:
            raise SystemExit(f"{text} must hold at least {4 * CONTEXT} bytes, got {len(streams[text.name])}")
    held_out = windows(texts.held_out_python(), 32)
    batches = calibration_batches()
    columns = [TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    found: dict = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "config": config.to_dict(), "domains": {}}
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        old_bits = bits_per_byte(base, held_out)
        for domain, data in streams.items():
            ids = as_ids(data)
            # A tenth at least stays unread, for the test in a new process.
            read = min(bytes_per_domain + 1, ids.shape[1] * 9 // 10)
            results, readers = compare(domain, ids[:, :read], base, config, held_out, old_bits, batches, progress)
            unread = ids[0, read:][: 16 * CONTEXT]
            size = min(CONTEXT, len(unread))
            unread = unread[: len(unread) // size * size].view(-1, size)
            with tempfile.TemporaryDirectory() as folder:
                later = recall(readers[DEFAULT], unread, Path(folder))
            found["domains"][domain] = {
                "bytes": read - 1,
                "rows": summary(results),
                "curves": {name: r.curve for name, r in results.items()},
                "recall": later,
            }
    for domain, one in found["domains"].items():
        console.print(table_of(domain, one["rows"]))
        r = one["recall"]
        console.print(
            f"In a new process, on {r['bytes']} bytes of {domain} that nobody has read: {r['frozen']:.3f} bits per "
            f"byte frozen, {r['loaded']:.3f} with the user's weights. In-context learning starts from nothing there.\n"
        )
    found["seconds"] = round(time.perf_counter() - began, 1)
    from ttt.demo.report import write

    write(found, report)
    console.print(f"{report / 'index.html'} written; {found['seconds']:.0f} s in all, on {found['machine']}.")
