"""The demo: a user tells a language model a page of facts once, and asks about them in a new process.

Nothing of the conversation is in the context of the questions: what is known then is in the user's weights.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ttt
from ttt.calibrating import measured
from ttt.conversation import CONVERSATION, Telling
from ttt.demo import text as texts
from ttt.demo.ask import general_loss
from ttt.demo.conversation_report import rights, write
from ttt.demo.facts import QUESTIONS, SENTENCES
from ttt.demo.language_model import load
from ttt.demo.lora import fine_tune, with_lora
from ttt.demo.process import in_new_process
from ttt.demo.questions import Message, Question, Template, choose, session
from ttt.demo.report import machine
from ttt.demo.retrieval import nearest
from ttt.store import Store
from ttt.terminal import doing, progress

USER = "ada"
DOCUMENT, UNREAD = 1024, 512  # tokens of the document that are read, and of what follows them
LORA = {"rank": 8, "lr": 3e-3, "steps": 10}
"""Chosen by `python -m bench.learning --suite facts --tune`."""


def main(text: Path | None, report: Path, folder: Path | None) -> None:
    """Run the demo, print its tables and write its report.

    Args:
        text: the document to read; by default C++ headers.
        report: folder of the report.
        folder: that of a transformers model; None for SmolLM2.

    Raises:
        FileNotFoundError: if SmolLM2 is not installed.
        ValueError: if the document is too short, or the model's tokenizer has no chat template.
    """
    began, console = time.perf_counter(), Console()
    with doing(console, "Loading the model ..."):
        model, tokenizer = load(folder)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"--model must hold a tokenizer with a chat template, got {folder} without one")
    template = Template(tokenizer)
    name, document = _document(text, template)
    found: dict[str, Any] = {
        "model": str(folder or "SmolLM2-135M-Instruct"), "machine": machine(), "date": time.strftime("%Y-%m-%d"),
        "told": list(SENTENCES), "questions": [dataclasses.asdict(question) for question in QUESTIONS], "ways": {},
    }  # fmt: skip
    plain = copy.deepcopy(model)
    ttt.adapt_(model, CONVERSATION)
    with doing(console, "Asking the frozen model, without and with what it will be told in the context ..."):
        found["general"] = {"frozen": general_loss(plain, template)}
        found["ways"]["frozen"] = _asked(lambda q: [], plain, template)
        found["ways"]["in context"] = _asked(lambda q: session(SENTENCES), plain, template)
        found["ways"]["retrieval"] = _asked(_retrieved, plain, template)
    with doing(console, "Fine-tuning with LoRA ..."):
        tuned, seconds = _fine_tuned(copy.deepcopy(plain), list(ttt.pool_of(model).layers), template)
        found["ways"]["LoRA"] = _asked(lambda q: [], tuned, template) | {"before": seconds}
        found["general"]["LoRA"] = general_loss(tuned, template)
        del tuned
    with tempfile.TemporaryDirectory() as place:
        way, learnt = _conversation(model, tokenizer, plain, (name, document), folder, Path(place), console)
    found["ways"]["ttt"] = way
    found["general"]["ttt"] = learnt.pop("general")
    found |= learnt
    found["seconds"] = round(time.perf_counter() - began, 1)
    _show(found, console)
    write(found, report)
    written = f"{report / 'index.html'} written; {found['seconds']:.0f} s in all, on {found['machine']}."
    console.print(written, markup=False)  # a path may hold brackets


def _conversation(
    model: Any,
    tokenizer: Any,
    plain: Any,
    document: tuple[str, Tensor],
    folder: Path | None,
    place: Path,
    console: Console,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell, store, ask in a new process, read a document, go back, and forget.

    Returns:
        The answers, as `_asked` returns them, and everything else that was measured.
    """
    template, seconds, store = Template(tokenizer), dict[str, float](), Store(place / "store")
    learner = ttt.Learner(model, episodes=ttt.EpisodeLog())
    pool = learner.pool
    assert pool is not None
    seconds["calibrate"] = _timed(lambda: measured(learner, tokenizer, functools.partial(progress, console)))
    with doing(console, f"{USER} tells the model {len(SENTENCES)} sentences ..."):
        seconds["tell"] = _timed(lambda: _tell(learner, template))
    with store.lease(USER) as lease:
        told = store.put(lease, pool.export(USER))
    with doing(console, "Asking in a new process ..."):
        after = _ask(folder or _saved(plain, tokenizer, place / "model"), place / "store", USER)
    way = {name: after[name] for name in ("chosen", "nll", "seconds")}
    way["before"] = seconds["tell"]
    name, ids = document
    with doing(console, f"The model reads {DOCUMENT} tokens of {name} ..."):
        read = _read(learner, plain, ids)
    with store.lease(USER) as lease:
        store.put(lease, pool.export(USER))
    store.rollback(USER, told)
    same = _equal(store.get(USER).tensors, store.get(USER, told).tensors)
    store.forget(USER)
    pool.forget(USER)
    with ttt.users(model, [USER]), torch.no_grad():
        forgotten = torch.equal(model(input_ids=ids[:, :64]).logits, plain(input_ids=ids[:, :64]).logits)
    return way, {
        "general": after["general"], "calibrate": seconds["calibrate"], "telling": Telling().options,
        "document": {"name": name, **read}, "other_user_same": after["same"], "rolled_back": same,
        "forgotten": forgotten,
    }  # fmt: skip


def _tell(learner: ttt.Learner, template: Template) -> None:
    for sentence in SENTENCES:
        ids, said = template.turn(sentence)
        learner.observe(torch.tensor([ids]), learn_mask=torch.tensor([said]), users=[USER], **Telling().options)


def _saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    """The ``folder`` with the model as transformers saves it: it is read in a fraction of the time of a GGUF file."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _ask(folder: Path, store: Path, user: str) -> dict[str, Any]:
    """What `ttt.demo.ask` finds in a new process."""
    return in_new_process("ttt.demo.ask", str(folder), str(store), user)


def _read(learner: ttt.Learner, plain: Any, ids: Tensor) -> dict[str, float]:
    """Read the document; nats per token of it and of what follows, frozen and with the user's weights."""
    began = time.perf_counter()
    seen = learner.observe(ids[:, : DOCUMENT + 1], users=[USER])
    seconds = time.perf_counter() - began
    later = learner.observe(ids[:, DOCUMENT:], learn=False, users=[USER])
    with torch.no_grad():
        frozen, unread = (
            torch.nn.functional.cross_entropy(plain(input_ids=part[:, :-1]).logits[0].float(), part[0, 1:])
            for part in (ids[:, : DOCUMENT + 1], ids[:, DOCUMENT:])
        )
    found = {"frozen": frozen, "learning": seen.nll.mean(), "unread_frozen": unread, "unread": later.nll.mean()}
    return {name: float(value) for name, value in found.items()} | {"seconds": seconds}


def _asked(before: Callable[[Question], list[Message]], model: Any, template: Template) -> dict[str, Any]:
    """The answers of ``model`` with the messages ``before`` each question in the context."""
    began = time.perf_counter()
    choices = [choose(model, template, question, before(question)) for question in QUESTIONS]
    return {
        "chosen": [choice.chosen for choice in choices], "nll": [choice.nll for choice in choices],
        "seconds": time.perf_counter() - began, "before": 0.0,
    }  # fmt: skip


def _retrieved(question: Question) -> list[Message]:
    return session([SENTENCES[i] for i in nearest(question.text, SENTENCES, 1)])


def _fine_tuned(model: Any, modules: list[str], template: Template) -> tuple[Any, float]:
    """``model`` with low-rank weights at ``modules``, fine-tuned, and the seconds that the steps took."""
    tuned = with_lora(model, modules, int(LORA["rank"]), seed=0)
    turns = [template.turn(sentence) for sentence in SENTENCES]
    return tuned, _timed(lambda: fine_tune(tuned, turns, LORA["lr"], int(LORA["steps"])))


def _document(text: Path | None, template: Template) -> tuple[str, Tensor]:
    """The name and tokens (1, T) of the document."""
    if text is None:
        name, content = "C++ headers", texts.stream_of("headers").decode()
    else:
        name, content = text.name, _read_text(text)
    ids = template.ids(content[: 16 * (DOCUMENT + UNREAD)])[: DOCUMENT + UNREAD + 1]
    if len(ids) <= DOCUMENT + UNREAD:
        raise ValueError(f"--text must hold more than {DOCUMENT + UNREAD} tokens, got {len(ids)} in {name}")
    return name, torch.tensor([ids])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text must be UTF-8 text, got {path}: {error}") from None


def _equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _show(found: dict[str, Any], console: Console) -> None:
    questions = found["questions"]
    table = Table(title=f"{len(questions)} questions about {len(found['told'])} sentences, choice among ten")
    for column in ("way", "right", "nats of the right answer", "before asking, s", "asking, s"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, way in found["ways"].items():
        nll = sum(way["nll"]) / len(way["nll"])
        cells = [f"{rights(way, questions)}", f"{nll:.2f}", f"{way['before']:.1f}", f"{way['seconds']:.1f}"]
        table.add_row(name, *cells, style="bold" if name == "ttt" else None)
    console.print(table)
    general, document = found["general"], found["document"]
    console.print(
        f"General knowledge, nats of the ends of 30 sentences: frozen {general['frozen']:.3f}, with what was learnt "
        f"{general['ttt']:.3f}, after LoRA {general['LoRA']:.3f}.\n"
        f"{document['name']}, nats per token: frozen {document['frozen']:.3f}, learning while reading "
        f"{document['learning']:.3f}; the {UNREAD} tokens after it {document['unread_frozen']:.3f} and "
        f"{document['unread']:.3f}.\n"
        f"Someone else gets the base model's logits to the bit: {found['other_user_same']}. Rolled back to the bit: "
        f"{found['rolled_back']}. After forgetting, the base model's to the bit: {found['forgotten']}."
    )
