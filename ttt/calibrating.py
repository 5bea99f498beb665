"""Calibrating a model on text that it writes itself: once for each model, and shown while it takes long."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ttt.learn import own_text
from ttt.learn.learner import Learner
from ttt.per_user.calibration_file import calibrate_once, default_file

Told = Callable[[int, int], None]
"""Is called with how much is done, and how much there is to be done."""
Progress = Callable[[str], contextlib.AbstractContextManager[Told]]
"""Shows what takes long; inside, how far it is."""


def silent(what: str) -> contextlib.AbstractContextManager[Told]:
    """A `Progress` that shows nothing."""
    return contextlib.nullcontext(lambda done, of: None)


def calibrated(learner: Learner, tokenizer: Any, file: Path | None = None, progress: Progress = silent) -> Path:
    """Calibrate ``learner``, none of whose users has a slot, from ``file``; where there is none, measure and write it.

    Args:
        learner: of a model with weights for each user.
        tokenizer: the model's; see `ttt.Learner.calibrate`.
        file: None for `ttt.per_user.calibration_file.default_file`, which chats and servers share.
        progress: shows how far it is, where it must be measured.

    Returns:
        The file.

    Warns, raises:
        As `ttt.per_user.calibration_file.calibrate_once` and `ttt.Learner.calibrate`.
    """
    assert learner.pool is not None
    calibrate_once(learner.pool, file, lambda: measured(learner, tokenizer, progress))
    return file or default_file(learner.pool)


def measured(learner: Learner, tokenizer: Any, progress: Progress = silent) -> None:
    """Calibrate ``learner`` on text that its model writes now; the arguments are those of `calibrated`."""

    def length(prompt: int) -> int:
        return min(max(own_text.LENGTH, prompt + own_text.LENGTH // 2), learner.context)  # as in `own_text.own_text`

    with (
        progress("The model writes some text, to measure what it must not forget") as told,
        telling_of_text(learner.model, told, length, batches=4),
    ):
        learner.calibrate(tokenizer=tokenizer)


@contextlib.contextmanager
def telling_of_text(model: nn.Module, told: Told, length: Callable[[int], int], *, batches: int = 0) -> Iterator[None]:
    """Inside, ``told`` hears how far ``model`` is with a text that it writes, and then reads.

    The calls of the model are counted. The first one has the prompts, (B, P) tokens, the next ones a token each, those
    after the last token a batch each, which is counted as a quarter of the text.

    Args:
        model: a transformers language model.
        told: called before each call of the model, and at the end.
        length: from P to the length of the text, with the prompt.
        batches: how many batches are read after the text was written.
    """
    written = read = total = quarter = 0

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal written, read, total, quarter
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        told(written + read * quarter, max(total, 1))
        if not written:
            whole = length(ids.shape[1])
            quarter, total = whole // 4, whole + batches * (whole // 4)
            written = ids.shape[1] + 1  # a token is drawn from what the prompts give
        elif ids.shape[1] == 1:
            written += 1
        else:
            read += 1

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    told(max(total, 1), max(total, 1))
