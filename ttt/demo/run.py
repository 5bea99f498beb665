"""The demo: one model reads text of an unknown kind with nine methods, which are compared.

The methods take turns reading the same pieces of text, so that all of their times are subject to the same disturbances
of the machine. Each byte is scored before anything is learnt from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
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
from ttt.demo import text as texts
from ttt.demo.model import (
    CONTEXT,
    DEFAULT,
    FROZEN,
    GROWING,
    IN_CONTEXT,
    LN2,
    SGD,
    as_ids,
    bits_per_byte,
    calibration_batches,
    load_model,
    methods,
    new_learner,
    score,
    score_in_context,
    windows,
)
from ttt.demo.process import in_new_process
from ttt.demo.report import machine, write

UNREAD_WINDOWS = 16  # of CONTEXT bytes at most: text at the end of a domain that no method reads


@dataclasses.dataclass
class Result:
    """What one method achieved on one domain.

    Attributes:
        new: bits per byte of the text that was read.
        old: bits per byte of held-out Python afterwards.
        seconds: time spent on reading.
        tokens: number of bytes read.
        curve: bits per byte of each piece of `CONTEXT` bytes.
    """

    method: str
    new: float = math.nan
    old: float = math.nan
    seconds: float = 0.0
    tokens: int = 0
    curve: list[float] = dataclasses.field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Reader:
    """A copy of the model that reads a stream piece by piece with one of the methods."""

    def __init__(self, method: str, base: nn.Module, config: ttt.TTTConfig | None, batches: list[Tensor]) -> None:
        self.result = Result(method)
        self.learner: Any = None  # for the methods that learn
        if config is None:
            self.model = base
        else:
            learner = new_learner(base, config, batches)
            self.model = learner.model
            self.learner = ttt.GrowingLearner(learner) if method == GROWING else learner

    def bits(self, rows: Tensor) -> float:
        """Mean bits per byte of ``rows`` (N, T), without learning from them."""
        if isinstance(self.learner, ttt.GrowingLearner):
            return float(self.learner.score(rows).mean(dtype=torch.float64)) / LN2
        return bits_per_byte(self.model, rows)

    def read(self, stream: Tensor, start: int, end: int) -> None:
        """Score bytes ``start + 1`` ... ``end`` of ``stream`` (1, T), then learn from them; add to ``result``."""
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
    """Read ``stream`` (1, T) with all methods.

    Args:
        domain: its name, for the progress bar.
        held_out: (N, T) windows of Python on which the models are tested afterwards.
        old_bits: the frozen model's bits per byte on ``held_out``.
        batches: see `ttt.demo.model.calibration_batches`.

    Returns:
        (results by method, readers by method).
    """
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
    """A row for each method: its figures, and gain and forgetting as shares of those of SGD without protection."""
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
    """The rows of `summary` as a table."""
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
    """Save what ``reader`` learnt, load it in a new process, and score ``unread`` (N, T) there.

    Returns:
        What `ttt.demo.recall` prints, and ``file_bytes``, the size of the saved file.

    Raises:
        RuntimeError: if the process fails; the message has its output.
    """
    weights, rows = folder / "user.safetensors", folder / "unread.json"
    ttt.save(reader.model, weights)
    rows.write_text(json.dumps(unread.tolist()))
    found = in_new_process("ttt.demo.recall", str(weights), str(rows))
    return {**found, "file_bytes": weights.stat().st_size}


def main(text: Path | None, report: Path, bytes_per_domain: int) -> None:
    """Run the demo, print its tables and write its report.

    Args:
        text: file to read instead of `ttt.demo.text.DOMAINS`.
        report: folder of the report.
        bytes_per_domain: number of bytes to read of each domain.

    Raises:
        SystemExit: if ``text`` is too short.
    """
    began = time.perf_counter()
    console = Console()
    base, config = load_model()
    most = bytes_per_domain + 1 + UNREAD_WINDOWS * CONTEXT
    if text is None:
        streams = {name: texts.stream_of(name)[:most] for name in texts.DOMAINS}
    else:
        streams = {text.name: text.read_bytes()[:most]}
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
            # At least a tenth stays unread, for the test in a new process.
            read = min(bytes_per_domain + 1, ids.shape[1] * 9 // 10)
            results, readers = compare(domain, ids[:, :read], base, config, held_out, old_bits, batches, progress)
            unread = ids[0, read:][: UNREAD_WINDOWS * CONTEXT]
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
            f"In a new process, on {r['bytes']} unread bytes of {domain}: {r['frozen']:.3f} bits per byte frozen (in-"
            f"context learning starts with an empty context), {r['loaded']:.3f} with the saved weights.\n"
        )
    found["seconds"] = round(time.perf_counter() - began, 1)
    write(found, report)
    written = f"{report / 'index.html'} written; {found['seconds']:.0f} s in all, on {found['machine']}."
    console.print(written, markup=False)  # a path may hold brackets
