"""``python -m bench.tables``: fill the tables of README.md and docs/ with the committed figures.

A table follows a line ``<!-- table: NAME -->``; `TABLES` says how each is made. A test
checks that the committed pages hold what this command writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.kernels import gpu_tables as gpu
from bench.learning.facts import tables as facts
from bench.learning.language import tables as language
from bench.serving import tables as serving
from ttt.demo.conversation_report import rights

ROOT = Path(__file__).parents[1]
DOMAINS = ("english", "html", "rst", "licences")
SPLITS = ("split-class", "split-domain", "split-task", "permuted")
BRIEF = {"frozen": "frozen", "naive": "plain SGD", "ER": "replay (ER)",
         "soft projection": "**ttt, default**", "growing columns": "**ttt, growing columns**"}  # fmt: skip
"""Methods in the README, by the names that they have there."""
BRIEF_DOMAINS = ("english", "html")
BRIEF_COSTS = {
    ("decode", "4096x4096, window 64", "bfloat16"): "one token, learnt, 4096x4096",
    ("observe", "llama 12x768, chunks of 64", "float32"): "one token, read and learnt, Llama",
    ("low_rank", "learning: 2048x2048, 32 tokens of 32 users, rank 16, window 64", "bfloat16"):
        "32 users' tokens, learnt, 2048x2048",
}  # fmt: skip
"""Cases in the README, by the names that they have there."""
COMMITS = ("1024x1024, T = 1, R = 0", "1024x1024, T = 16, R = 0", "4096x4096, T = 1, R = 0", "4096x4096, T = 16, R = 0",
           "4096x4096, T = 16, R = 4", "4096x4096, T = 16, R = 0, 8bit state", "4096x4096, T = 64, R = 0",
           "4096x4096, T = 1024, R = 0")  # fmt: skip
GPU_SUITES = ("decode", "window_linear", "commit", "low_rank")
SERVING = ("server.json", "soak.json")
GPU = ("aot.json", "gpu.json", "gpu_predictions.json")
DECODES = tuple(f"{size}x{size}, window {window}" for size in (512, 4096) for window in (16, 64, 128))


def _load(name: str) -> dict[str, Any]:
    folder = "kernels" if name.startswith("cpu_") or name in GPU else "serving" if name in SERVING else "learning"
    return json.loads((ROOT / "bench" / folder / "results" / name).read_text())


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _table(head: tuple[str, ...], rows: list[str]) -> list[str]:
    return [_line(*head), "|" + "---|" * len(head), *rows]


def _streams() -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["scenario"], r["method"]): r for r in _load("benchmark_text.json")["rows"]}


def _alone(rows: dict[tuple[str, str], dict[str, Any]], method: str) -> tuple[list[str], str]:
    alone = [rows[f"adapt-{domain}", method] for domain in DOMAINS]
    cells = [f"{r['new'][0]:.3f} / {100 * r['forgetting_share'][0]:.0f} %" for r in alone]
    return cells, "" if alone[0]["time"] is None else f"{fmean(r['time'][0] for r in alone):.2f} x"


def quality() -> list[str]:
    """Some methods on two streams of text: bits per byte, and forgetting in % of naive's."""
    rows, lines = _streams(), []
    for method, shown in BRIEF.items():
        alone = [rows[f"adapt-{domain}", method] for domain in BRIEF_DOMAINS]
        cells = [cell for r in alone for cell in (f"{r['new'][0]:.3f}", f"{100 * r['forgetting_share'][0]:.0f}")]
        lines.append(_line(shown, *cells, _alone(rows, method)[1]))
    return _table(("method", "English", "lost", "HTML", "lost", "time"), lines)


def streams() -> list[str]:
    """All methods on streams of text; the long stream in which domains take turns; time and state."""
    rows = _streams()
    lines = []
    for method in dict.fromkeys(name for _, name in rows):
        cells, time = _alone(rows, method)
        long = rows.get(("recurring", method))
        cells += ["", ""] if long is None else [f"{long[name][0]:.3f}" for name in ("new", "forgetting")]
        lines.append(_line(method, *cells, time, f"{rows[f'adapt-{DOMAINS[0]}', method]['state'][0]:.1f}"))
    head = ("method", "English", "HTML", "reStructuredText", "licences", "in turns", "lost", "time", "bytes")
    return _table(head, lines)


def digits() -> list[str]:
    """Mean accuracy over all tasks at the end, with the 95 % interval, and cost: a row a method."""
    rows = {(r["scenario"], r["method"]): r for r in _load("benchmark_digits.json")["rows"]}
    lines = []
    for method in dict.fromkeys(name for _, name in rows):
        cells = []
        for split in SPLITS:
            row = rows.get((split, method))
            cells.append("" if row is None else f"{row['acc'][0]:.3f} ± {row['acc'][1]:.3f}")
        first = next(rows[split, method] for split in SPLITS if (split, method) in rows)
        lines.append(_line(method, *cells, f"{first['us_per_sample'][0]:.0f}", f"{first['state_kib'][0]:.0f}"))
    head = ("method", "class-incremental", "domain-incremental", "task-incremental", "permuted", "CPU us/sample",
            "state, KiB")  # fmt: skip
    return _table(head, lines)


def demo() -> list[str]:
    """The demo's rows, one for each text and method."""
    lines = []
    for domain, one in _load("demo.json")["domains"].items():
        for row in one["rows"]:
            gain, lost = ("" if row[k] is None else f"{100 * row[k]:.0f} %" for k in ("gain_share", "forgetting_share"))
            method = f"**{row['method']}**" if row["method"] == "default" else row["method"]
            bits = [f"{row['new_bpb']:.3f}", gain, f"{row['old_bpb']:.3f}", lost]
            lines.append(_line(domain, method, *bits, f"{row['tokens_per_second']:.0f}", f"{row['time_ratio']:.2f} x"))
    head = ("text", "method", "new text, bits/byte", "gain, of SGD's", "Python afterwards", "forgetting, of SGD's",
            "bytes/s", "time")  # fmt: skip
    return _table(head, lines)


def _measured() -> list[dict[str, Any]]:
    return [r for name in ("commit", "layers", "low_rank") for r in _load(f"cpu_{name}.json")["rows"] if r["ours"]]


def _beside(row: dict[str, Any]) -> str:
    ratio, name = row["ratio"], row["baseline"]
    if ratio is None:
        return ""
    if name == "plain torch":
        return f"{1 / ratio:.2f} x as fast as {name}"
    return f"{ratio:.2f} x the time of {f'`{name}`' if name == 'nn.Linear' else name}"


def costs() -> list[str]:
    """Some figures of what kernels and loops cost."""
    rows = {(r["suite"], r["case"], r["dtype"]): r for r in _measured()}
    lines = [_line(shown, f"{rows[key]['us']:.0f}", _beside(rows[key])) for key, shown in BRIEF_COSTS.items()]
    return _table(("what is timed", "us", "compared with"), lines)


def all_costs() -> list[str]:
    """What the kernels and the loops around them cost, beside what is timed in the same run."""
    lines = []
    for suite, cases in (("commit", COMMITS), ("decode", DECODES), ("observe", None), ("generate", None),
                         ("low_rank", None)):  # fmt: skip
        rows = [r for r in _measured() if r["suite"] == suite and (cases is None or r["case"] in cases)]
        for row in sorted(rows, key=lambda r: r["dtype"], reverse=True):
            of = "" if row["ceiling"] is None else f"{row['percent_of_ceiling']:.0f} % of {row['ceiling']}"
            bound = "" if row["ceiling"] != "copy" else f"{row['ratio_to_bound']:.2f}"
            lines.append(_line(suite, row["case"], row["dtype"], f"{row['us']:.0f}", _beside(row), of, bound))
    head = ("suite", "case", "weights", "us", "compared with, in the same run", "of the ceiling",
            "time / traffic at copy speed")  # fmt: skip
    return _table(head, lines)


def decode_bounds() -> list[str]:
    """A decoded token beside three bounds: its bytes alone, and bytes and products, together or one after the other."""
    lines = []
    for row in _load("cpu_decode_bound.json")["rows"]:
        if row["ours"] and not row["orthogonal"] and row["state"] == row["dtype"]:
            ratios = (row[f"ratio_to_{bound}"] for bound in ("bound", "part_bound", "part_sum"))
            lines.append(_line(str(row["window"]), row["dtype"], f"{row['us']:.0f}", *(f"{x:.2f}" for x in ratios)))
    return _table(("window", "weights", "us", "bytes alone", "the larger of both", "their sum"), lines)


def language_models() -> list[str]:
    """Reading and learning with whole language models, beside reading in the same chunks and reading all at once."""
    rows = _load("cpu_language.json")["rows"]
    us = {(r["case"], r["dtype"], r["contender"]): r["us"] for r in rows}
    lines = []
    for row in (r for r in rows if r["ours"]):
        case, dtype = row["case"], row["dtype"]
        whole = row["us"] / us[case, dtype, "forward, whole text"]
        lines.append(_line(case, dtype, f"{row['us'] / 1e3:.2f}", f"{row['ratio']:.2f}", f"{whole:.2f}"))
    return _table(("model, what learns, chunks", "weights", "ms a token", "/ reading", "/ reading at once"), lines)


def users() -> list[str]:
    """What users' weights cost beside nn.Linear, by the number of users in a batch: a row a way of computing."""
    measured = _load("cpu_low_rank.json")["rows"]
    found = {(r["case"], r["contender"], r["dtype"]): r["ratio"] for r in measured}
    counts = sorted({int(m[1]) for r in measured if (m := re.search(r"32 tokens of (\d+) users", r["case"]))})
    base, lines = "2048x2048, 32 tokens of {} users, rank 16", []
    learning = f"learning: {base}, window 64"
    ways = (("read", base, "ttt"), ("read and learnt", learning, "ttt"), ("read, PEFT", base, "PEFT"))
    for shown, case, contender in ways:
        for dtype in ("float32", "bfloat16"):
            lines.append(_line(shown, dtype, *(f"{found[case.format(n), contender, dtype]:.2f}" for n in counts)))
    return _table(("", "weights", *(f"{n} user{'s' * (n > 1)}" for n in counts)), lines)


def told() -> list[str]:
    """What SmolLM2 knew in a new process, and what that cost of its general knowledge."""
    found = _load("conversation.json")
    lines = []
    for name, way in found["ways"].items():
        general = found["general"].get(name, found["general"]["frozen"])
        lines.append(_line(_bold(name), f"{rights(way, found['questions'])}", f"{general:.2f}"))
    return _table(("way", f"right, of {len(found['questions'])}", "general knowledge, nats"), lines)


def conversation() -> list[str]:
    """As `told`, and what every way took."""
    found, lines = _load("conversation.json"), []
    for name, way in found["ways"].items():
        right = rights(way, found["questions"])
        general = found["general"].get(name, found["general"]["frozen"])
        times = f"{way['before']:.1f}", f"{way['seconds']:.1f}"
        lines.append(_line(_bold(name), f"{right} of {len(way['chosen'])}", f"{general:.3f}", *times))
    return _table(("way", "right", "general knowledge, nats", "before asking, s", "asking, s"), lines)


def _bold(name: str) -> str:
    return f"**{name}**" if name == "ttt" else name


def _results(name: str, make: Callable[[Mapping[str, Any]], list[tuple[str, ...]]]) -> Callable[[], list[str]]:
    """A table of the results in the file ``name``."""

    def table() -> list[str]:
        head, *lines = make(_load(name))
        return _table(head, [_line(*cells) for cells in lines])

    return table


def _suite(name: str, make: Callable[[Mapping[str, Any]], list[tuple[str, ...]]]) -> Callable[[], list[str]]:
    """A table of the suite ``name``, which says so where it has not been run."""
    file = f"benchmark_{name}.json"

    def table() -> list[str]:
        there = (ROOT / "bench/learning/results" / file).exists()
        return _results(file, make)() if there else _table(("not yet run",), [])

    return table


def units() -> list[str]:
    """Gain and drift of a real model in three forms that compute the same, under rates in several units."""
    if not (ROOT / "bench/learning/results/language_units.json").exists():
        return _table(("not yet run",), [])
    rows = _load("language_units.json")["rows"]
    forms = list(dict.fromkeys(row["form"] for row in rows))
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        more = "".join(f", {name}={row[name]:g}" for name in ("power", "feedback") if name in row)
        setting = f'`rate="{row["rate"]}", lr={row["lr"]:g}{more}`'
        found.setdefault(setting, {})[row["form"]] = f"{row['gain']:+.3f} / {row['kl']:.4f}"
    return _table(("setting", *forms), [_line(s, *(by_form[form] for form in forms)) for s, by_form in found.items()])


def turns() -> list[str]:
    """What a conversation of hundreds of turns does to a real model."""
    if not (ROOT / "bench/learning/results/telling.json").exists():
        return _table(("not yet run",), [])
    lines = []
    for run in _load("telling.json")["runs"]:
        for row in run["rows"]:
            texts = ", ".join(f"{name} {nats:+.3f}" for name, nats in row["texts"].items())
            cells = f"{row['right']:.2f}", f"{row['general']:+.3f}", f"{row['kl']:.4f}", texts
            lines.append(_line(run["method"], str(run["seed"]), str(row["other sentences"]), *cells))
    return _table(
        ("method", "person", "other sentences", "right", "general, nats", "KL, English", "texts, nats"), lines
    )


def pretrained() -> list[str]:
    """Byte-level models of several kinds of layer: bits per byte by position, decoding and state."""
    lines = []
    for row in _load("pretrain.json")["rows"]:
        bits = [f"{value:.3f}" for value in row["held_out_bpb"].values()]
        decode = row["decode"]
        cells = [f"{row['parameters'] / 1e6:.2f}", *bits, f"{row['train_bpb']:.3f}", f"{row['cpu_seconds']:.0f}"]
        lines.append(_line(row["layer"], *cells, f"{decode['bytes_per_second']:.0f}", f"{decode['state_bytes']:,}"))
    ranges = list(_load("pretrain.json")["rows"][0]["held_out_bpb"])
    head = ("layers", "parameters, millions", *(f"bytes {r}" for r in ranges), "training text", "training, CPU s",
            "decoding, bytes/s", "state, bytes")  # fmt: skip
    return _table(head, lines)


def sequence_ops() -> list[str]:
    """The ops of sequence layers: times, and shares of the ceilings, beside other ways of computing the same."""
    rows = _load("cpu_sequence.json")["rows"]
    lines = []
    for row in rows:
        if not row["ours"]:
            continue
        same = [r for r in rows if (r["case"], r["dtype"]) == (row["case"], row["dtype"]) and not r["ours"]]
        others = ", ".join(f"{r['contender']} {r['us'] / row['us']:.2f} x" for r in same)
        of = "" if row["ceiling"] is None else f"{row['percent_of_ceiling']:.0f} % of {row['ceiling']}"
        lines.append(_line(row["case"], row["dtype"], f"{row['us']:.0f}", others, of))
    return _table(("case", "tokens", "us", "time of others", "of the ceiling"), lines)


TABLES: dict[str, Callable[[], list[str]]] = {
    "quality": quality, "streams": streams, "digits": digits, "demo": demo, "costs": costs, "all costs": all_costs,
    "decode bounds": decode_bounds,
    "language models": language_models,
    "units": units, "turns": turns,
    "language run": _suite("streams", language.about), "language": _suite("streams", language.by_text),
    "language methods": _suite("streams", language.by_method), "language hard": _suite("streams", language.hard),
    "facts run": _suite("facts", facts.about), "facts": _suite("facts", facts.by_scenario),
    "facts costs": _suite("facts", facts.costs), "facts run gpu": _suite("facts_cuda", facts.about),
    "facts gpu": _suite("facts_cuda", facts.by_scenario), "facts costs gpu": _suite("facts_cuda", facts.costs),
    "language run gpu": _suite("streams_cuda", language.about),
    "language methods gpu": _suite("streams_cuda", language.by_method),
    "told": told, "conversation": conversation, "users": users,
    "server": _results("server.json", serving.server), "server prices": _results("server.json", serving.prices),
    "soak": _results("soak.json", serving.soak), "pretrained": pretrained, "sequence ops": sequence_ops,
    "compiled": _results("aot.json", gpu.compiled),
    "predicted": _results("gpu_predictions.json", lambda found: gpu.predicted(found, _load("gpu.json"))),
    **{f"gpu-{suite}": _results("gpu.json", partial(gpu.measured, suite=suite)) for suite in GPU_SUITES},
}  # fmt: skip
"""Name in the marker -> what makes the table."""

MARKER = re.compile(r"^<!-- table: (.+) -->\n(?:\|.*\n)*", re.M)


def filled(page: str) -> str:
    """``page`` with every marked table made anew.

    Raises:
        KeyError: for a marker that names no table.
    """
    return MARKER.sub(lambda m: "\n".join([f"<!-- table: {m[1]} -->", *TABLES[m[1]](), ""]), page)


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    """Write the pages."""
    for path in pages():
        text = path.read_text()
        if (new := filled(text)) != text:
            path.write_text(new)
            print(f"{path.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
