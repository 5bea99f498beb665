"""Learning from generated tokens, a span of them at a time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttt.learn.blocks import blocks_of
from ttt.learn.head import FusedScores, Scored
from ttt.learn.huggingface import cache_of, cached, detached, masked_inputs, swapped
from ttt.learn.step import ScoredChunk, learn_from
from ttt.learn.text import Text
from ttt.nn import Capturing
from ttt.ops.backends import record
from ttt.ops.dtypes import accumulation

if TYPE_CHECKING:
    from ttt.learn.learner import Learner


class OutputLearning:
    """The tokens generated since the last learning step, and what is needed to learn from them.

    Learning after every token would read all weights for each of them twice, forward and backward. So the inputs of the
    lowest block that learns are recorded while generating. For a learning step the blocks from there upwards run again
    on all tokens of the span at once, with a graph, against the cache as it was before the span. The output head does
    not run again: its logits are kept. If the structure of the model does not allow this, the whole model runs again,
    with a cache of its own.

    Args:
        learner: whose layers learn.
        cache: the model's cache of the prompt; None for a prompt of one token.
        size: largest number of tokens of a span.

    Attributes:
        count: tokens of the present span.
        why: why the whole model has to run again; empty if it need not.
    """

    def __init__(self, learner: Learner, cache: Any, size: int) -> None:
        self.learner, self.size = learner, size
        self.count = 0
        self._logits: Tensor | None = None  # (B, size, V)
        self._wanted: list[Tensor] = []
        self._inputs: list[Tensor] = []  # of the lowest block: (B, 1, d) each
        self._extra: tuple | None = None  # what a block returns beside the hidden state
        self._blocks, self._lowest, self.why = blocks_of(learner.model, learner.layers, learner.head.head)
        self._old_cache: Any = None  # without the present span
        if not self.why and cache is not None:
            self.why = _uncroppable(cache)
        if self.why:
            self._old_cache = copy.deepcopy(cache)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """To be entered while the model generates a token."""
        if self.why:
            yield
            return

        def before(module, args, kwargs):
            self._inputs.append(args[0] if args else kwargs["hidden_states"])

        def after(module, args, output):
            self._extra = output[1:] if isinstance(output, tuple) else None

        handles = [self._blocks[self._lowest].register_forward_pre_hook(before, with_kwargs=True)]
        if self._lowest:
            handles.append(self._blocks[self._lowest - 1].register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, logits: Tensor, wanted: Tensor) -> None:
        """Add a token to the span.

        Args:
            logits: (B, V), from which it was chosen.
            wanted: (B,) bool, the sequences in which it may teach.
        """
        if not self.learner.head.unfit():
            if self._logits is None:
                dtype = accumulation(logits.dtype)
                self._logits = logits.new_empty((len(logits), self.size, logits.shape[1]), dtype=dtype)
            self._logits[:, self.count] = logits
        self._wanted.append(wanted)
        self.count += 1

    def learn(self, text: Text, cache: Any) -> bool:
        """Learn from the span, which ends with the last token of ``text``; ``cache`` is that of the text before it.

        Returns:
            False if the loss or a gradient is not finite; nothing has changed then.
        """
        learner, count = self.learner, self.count
        inputs = {"input_ids": text.ids[:, -count - 1 : -1]}
        if text.attend is not None:
            inputs |= masked_inputs(text.attend[:, :-1], count)
        targets = text.ids[:, -count:]
        wanted: Tensor | None = torch.stack(self._wanted, 1)
        if bool(wanted.all()):  # type: ignore[union-attr]
            wanted = None
        self.why = self.why or _uncroppable(cache)  # not known before, if the prompt was one token
        record("generate", "whole model again" if self.why else "top blocks again", self.why)
        with Capturing(learner.layers) as capturing, torch.enable_grad(), contextlib.ExitStack() as stack:
            if self.why:
                inputs |= cached(learner.model, self._old_cache)
            else:
                inputs |= cached(learner.model, cache)
                stack.enter_context(_cropped(cache, count))
                stack.enter_context(self._skipping(torch.cat(self._inputs, 1)))
            scores: Scored
            if self.why or self._logits is None or learner.head.unfit():
                with learner.head as head:
                    out, scores = head.run(inputs, targets)
                if self.why:
                    self._old_cache = detached(cache_of(out))
            else:
                output_head = learner.head.head
                stack.enter_context(swapped(output_head, lambda hidden: hidden))  # its logits are known
                hidden = learner.model(**inputs).logits
                scores = FusedScores(self._logits[:, :count], targets, hidden, output_head.weight)
            finite = learn_from(learner, capturing, ScoredChunk(scores, wanted))
        self.count = 0
        self._wanted, self._inputs = [], []
        return finite

    @contextlib.contextmanager
    def _skipping(self, recorded: Tensor) -> Iterator[None]:
        """Inside, the blocks below the lowest that learns do nothing, and that one gets ``recorded`` (B, T, d)."""
        extra = self._extra

        def skip(hidden_states, *args, **kwargs):
            return hidden_states if extra is None else (hidden_states, *extra)

        def before(module, args, kwargs):
            return ((recorded, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": recorded})

        with contextlib.ExitStack() as stack:
            for block in self._blocks[: self._lowest]:
                stack.enter_context(swapped(block, skip))
            handle = self._blocks[self._lowest].register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
            yield


def _uncroppable(cache: Any) -> str:
    """Why `_cropped` cannot take the latest tokens out of a cache; empty if it can."""
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
    return "" if kinds == {"DynamicLayer"} else f"the cache holds {sorted(kinds) or type(cache).__name__}"


@contextlib.contextmanager
def _cropped(cache: Any, count: int) -> Iterator[None]:
    """Inside, ``cache`` lacks its latest ``count`` tokens; afterwards it is as before. Nothing is copied."""
    full = [(layer, layer.keys, layer.values) for layer in cache.layers]
    for layer, keys, values in full:
        length = keys.shape[-2] - count
        layer.keys, layer.values = keys.narrow(-2, 0, length), values.narrow(-2, 0, length)
    try:
        yield
    finally:
        for layer, keys, values in full:
            layer.keys, layer.values = keys, values
