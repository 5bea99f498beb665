"""The report of the demo with a language model: ``index.html``, its picture, and ``results.json`` with every figure."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from ttt.demo.report import STYLE

COLOURS = {"frozen": "#7f7f7f", "in context": "#17becf", "retrieval": "#9467bd", "LoRA": "#d62728", "ttt": "#1f77b4"}


def write(found: dict[str, Any], folder: Path) -> None:
    """Write the report on ``found``, the results of `ttt.demo.conversation.main`, into ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    _plot(found, folder / "conversation.png")
    questions, ways, general = found["questions"], found["ways"], found["general"]
    count, document, telling = len(questions), found["document"], found["telling"]
    told = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found["told"])
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>ttt: what was said once stays</title><style>{STYLE}
.good {{ color: #1a7f37; font-weight: 600; }} .bad {{ color: #b35900; }}</style>
<h1>What was said once stays</h1>
<p><b>{html.escape(found["model"])}</b> was told {len(found["told"])} sentences in one chat. In a new process, with
nothing of that chat in its context, it answers <b>{rights(ways["ttt"], questions)} of {count}</b> questions about them;
before it was told anything, {rights(ways["frozen"], questions)}. Each answer is chosen among ten.</p>
<img src="conversation.png" alt="right answers, time, and general knowledge">
<h2>What it was told</h2><ul>{told}</ul>
<h2>What it knows now</h2>
<table><tr><th>question<th>before<th>in a new process</tr>{_answers(questions, ways)}</table>
<h2>What it cost, and what it forgot</h2>
<table><tr><th>way<th>right of {count}<th>before asking, s<th>{count} questions, s<th>general knowledge, nats
</tr>{_costs(questions, ways, general)}</table>
<p>"In context" reads all sentences before each question, "retrieval" the nearest ones; "LoRA" was fine-tuned on them,
and "ttt" read them as a chat. Only the first two see them again.</p>
<p>General knowledge: nats of the ends of 30 sentences such as "The capital of Japan is Tokyo"; less is better.
Measuring what must not be forgotten took {found["calibrate"]:.1f} s more, once for a model. Each sentence was read
{telling["passes"]} times, with steps {telling["emphasis"]:g} times as large as in a stream of text.</p>
<p>Then it read {html.escape(document["name"])}: {document["frozen"]:.3f} nats per token frozen,
{document["learning"]:.3f} when learning while reading ({document["seconds"]:.1f} s), each token scored before it was
learnt; on the unread text after it {document["unread_frozen"]:.3f} and {document["unread"]:.3f}.</p>
<ul>
<li>Another user got the base model's output, bit for bit: {_yes(found["other_user_same"])}</li>
<li>Going back to the version before the document gave the same weights, bit for bit: {_yes(found["rolled_back"])}</li>
<li>After the user was forgotten, their output was the base model's, bit for bit: {_yes(found["forgotten"])}</li>
</ul>
<p class="small">{html.escape(found["machine"])}; {found["date"]}; {found["seconds"]} s in total. All figures are in
<a href="results.json">results.json</a>.</p>
</html>
"""
    (folder / "index.html").write_text(page)


def rights(way: dict[str, Any], questions: list[dict[str, Any]]) -> int:
    """The number of questions that a way of knowing answered rightly."""
    return sum(chosen == question["right"] for chosen, question in zip(way["chosen"], questions, strict=True))


def _yes(value: bool) -> str:
    return f'<span class="{"good" if value else "bad"}">{"yes" if value else "no"}</span>'


def _answers(questions: list[dict[str, Any]], ways: dict[str, Any]) -> str:
    rows = []
    for question, *chosen in zip(questions, ways["frozen"]["chosen"], ways["ttt"]["chosen"], strict=True):
        cells = [
            f'<td class="{"good" if at == question["right"] else "bad"}">{html.escape(question["values"][at])}</td>'
            for at in chosen
        ]
        rows.append(f"<tr><td>{html.escape(question['text'])}</td>{''.join(cells)}</tr>")
    return "".join(rows)


def _costs(questions: list[dict[str, Any]], ways: dict[str, Any], general: dict[str, float]) -> str:
    rows = []
    for name, way in ways.items():
        known = f"{general.get(name, general['frozen']):.3f}"
        cells = [f"{rights(way, questions)}", f"{way['before']:.1f}", f"{way['seconds']:.1f}", known]
        line = "".join(f"<td>{cell}</td>" for cell in (html.escape(name), *cells))
        ours = ' class="ours"' if name == "ttt" else ""
        rows.append(f"<tr{ours}>{line}</tr>")
    return "".join(rows)


def _plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ways, questions, general = found["ways"], found["questions"], found["general"]
    names = list(ways)
    colours = [COLOURS[name] for name in names]
    known = [general.get(name, general["frozen"]) for name in names]
    panels = [
        (f"right answers of {len(questions)}", [rights(ways[name], questions) for name in names], "{:.0f}"),
        ("seconds for the questions", [ways[name]["seconds"] for name in names], "{:.1f}"),
        ("general knowledge, nats (less is better)", known, "{:.2f}"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3), constrained_layout=True, sharey=True)
    for axis, (title, values, form) in zip(axes, panels, strict=True):
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [form.format(value) for value in values], padding=3)
        axis.set(title=title)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.25)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=130)
    plt.close(figure)
