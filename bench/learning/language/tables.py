"""The tables of the suite "streams", for `bench.tables`: lists of a head and lines of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.learning.language import texts
from bench.learning.language.best import Row, best, mean
from bench.learning.language.hard import HARD
from bench.learning.language.methods import DEFAULT, METHODS
from bench.learning.report import about_gpu, cell

Lines = list[tuple[str, ...]]

BESIDE = "Adam"  # the group that the default is compared with
HARD_SHOWN = tuple(name for name, method in METHODS.items() if method.hard and name != "frozen")


def about(found: Mapping[str, Any]) -> Lines:
    """The command, the machine and the date of the results; ``found`` is all of them."""
    machine, protocol = found["machine"], found["protocol"]
    if "gpu" in machine:
        return about_gpu(found, "python -m bench.learning --suite streams --device cuda --seeds 1")
    return [
        ("command", "tokens of each text", "of each hard text", "processor", "cores", "threads", "torch", "date"),
        (
            "`python -m bench.learning --suite streams --seeds 1`", str(protocol["tokens"]), str(protocol["hard"]),
            machine["processor"], str(machine["cores"]), str(machine["threads"]), machine["torch"], found["date"],
        ),
    ]  # fmt: skip


def _figure(row: Row, name: str, digits: int) -> str:
    """A figure with its interval."""
    return cell((row[name][0], row[f"{name}_width"][0]), digits)


def by_text(found: Mapping[str, Any]) -> Lines:
    """Gain and divergence of the default beside those of Adam at its best rate; their means and ratios.

    The last two lines leave out the text of the kind on which the divergence is measured.
    """
    shown = best(found["rows"])
    lines: Lines = [("text", "frozen", "gain, default", f"gain, {BESIDE}", "at", "KL, default", f"KL, {BESIDE}")]
    pairs: dict[str, tuple[Row, Row]] = {}
    for text in texts.REPORTED:
        one, other = shown.get((text, DEFAULT)), shown.get((text, BESIDE))
        if one is None or other is None:
            continue
        pairs[text] = one, other
        lines.append((
            text, f"{shown[text, 'frozen']['nll'][0]:.3f}", _figure(one, "gain", 3), _figure(other, "gain", 3),
            other["method"], _figure(one, "kl", 4), _figure(other, "kl", 4),
        ))  # fmt: skip
    lines += _means("mean", list(pairs.values()))
    others = [pair for text, pair in pairs.items() if text != texts.AS_GENERAL]
    if len(others) < len(pairs):
        lines += _means(f"mean without {texts.AS_GENERAL}", others)
    return lines


def _means(name: str, pairs: Sequence[tuple[Row, Row]]) -> Lines:
    """The means of the default's and the other's figures, and their ratios."""
    if not pairs:
        return []
    gains, kls = ([mean(each, figure) for each in zip(*pairs, strict=True)] for figure in ("gain", "kl"))
    return [
        (name, "", *(f"{g:.3f}" for g in gains), "", *(f"{k:.4f}" for k in kls)),
        (f"default / {BESIDE}", "", f"{gains[0] / gains[1]:.2f}", "", "", f"{kls[0] / kls[1]:.2f}", ""),
    ]


def by_method(found: Mapping[str, Any]) -> Lines:
    """Means over the texts of every group of methods, each at its best rate for each text; time if measured."""
    shown = best(found["rows"])
    timed = all(row["time"] is not None for row in shown.values())
    lines: Lines = [("method", "gain", "KL", "facts", *(("time",) if timed else ()))]
    read = [text for text in texts.REPORTED if (text, "frozen") in shown]
    for group in dict.fromkeys(method.group for method in METHODS.values()):
        mine = [shown[text, group] for text in read if (text, group) in shown]
        if mine and len(mine) == len(read):  # a mean over other texts could not be compared
            figures = [f"{mean(mine, name):.{digits}f}" for name, digits in (("gain", 3), ("kl", 4), ("facts", 3))]
            name = f"**{group}**" if group == DEFAULT else group
            lines.append((name, *figures, *((f"{mean(mine, 'time'):.2f} x",) if timed else ())))
    return lines


def hard(found: Mapping[str, Any]) -> Lines:
    """Gain and divergence on hard texts."""
    shown = {(row["scenario"], row["method"]): row for row in found["rows"] if row["gain"] is not None}
    read = [text for text in HARD if (text, "frozen") in shown]
    methods = [m for m in HARD_SHOWN if all((text, m) in shown for text in read)]
    lines: Lines = [("text", "frozen", *(f"{what}, {m}" for what in ("gain", "KL") for m in methods))]
    for text in read:
        cells = [_figure(shown[text, m], what, d) for what, d in (("gain", 3), ("kl", 4)) for m in methods]
        lines.append((text, f"{shown[text, 'frozen']['nll'][0]:.3f}", *cells))
    return lines
