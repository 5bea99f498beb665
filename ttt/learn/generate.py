"""Writing text with a model that learns from the stream; see `ttt.Learner.generate`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ttt.checks import check_whole
from ttt.learn.head import Fused
from ttt.learn.huggingface import cache_of, cached, detached, frozen, masked_inputs, swapped
from ttt.nn import Capturing
from ttt.ops.backends import record


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `Learner.generate` returns.

    Attributes:
        sequences: (B, P + N) int64: prompts and what was written; shorter if all sequences finished early.
        nll: (B, P + N - 1) float32, nats: -log p(token t+1 | tokens up to t), each measured before the model learnt
            from that token. 0 where ``mask`` is False.
        mask: (B, P + N - 1) bool: False for padding and after the end of a sequence.
        learned: chunks of the prompt, and spans of the output, that the model learnt from.
        rejected: those that were skipped for a non-finite loss or gradient; they changed nothing.
    """

    sequences: Tensor
    nll: Tensor
    mask: Tensor
    learned: int
    rejected: int


def generate(
    learner: Any,
    ids: Tensor,
    attend: Tensor | None,
    *,
    max_new_tokens: int,
    learn_prompt: bool,
    learn_output: bool,
    learn_every: int,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    eos_token_id: int | None,
    generator: torch.Generator | None,
) -> Generated:
    """`ttt.Learner.generate`, after the check of its tokens ``ids`` (B, P) and mask ``attend`` (B, P)."""
    for name, value in (("max_new_tokens", max_new_tokens), ("learn_every", learn_every), ("top_k", top_k)):
        if value is not None:
            check_whole(name, value, 1)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a number above 0, got {temperature!r}")
    batch, prompt = ids.shape
    if prompt + max_new_tokens > learner.context:
        raise ValueError(
            f"the prompt's {prompt} tokens and max_new_tokens = {max_new_tokens} must fit the context of "
            f"{learner.context} tokens together"
        )
    if attend is not None and not bool((attend[:, 1:] >= attend[:, :-1]).all() & attend[:, -1].all()):
        raise ValueError("attention_mask must mark padding on the left only, and every prompt must end with a token")
    if learn_output and learner.rules:
        raise ValueError("learn_output cannot be True for a learner with rules: they learn from what is read")
    pads = attend is not None
    real = torch.ones_like(ids, dtype=torch.bool) if attend is None else attend
    with frozen(learner.model):
        seen, cache = learner._read(ids, real, real, learn_prompt, pads=pads, plain=not pads)
        if seen.rejected:  # the cache begins after the last rejected chunk
            _, cache = learner._read(ids, real, real, False, pads=pads, plain=not pads)
        learned, rejected = seen.learned, seen.rejected
        span = _Span(learner, cache, learn_every) if learn_output and learner.config.lr > 0 else None
        nlls: list[Tensor] = []
        masks: list[Tensor] = []
        done = torch.zeros((batch,), dtype=torch.bool, device=ids.device)
        for written in range(1, max_new_tokens + 1):
            inputs = {"input_ids": ids[:, -1:], **cached(learner.model, cache)}
            if pads:
                inputs |= masked_inputs(real, 1)
            with torch.no_grad(), span.recording() if span is not None else contextlib.nullcontext():
                out = _first(learner, inputs) if written == 1 else learner.model(**inputs)
                logits = out.logits[:, -1]
                token = _choose(logits, do_sample, temperature, top_k, generator)
                if eos_token_id is not None:
                    token = torch.where(done, eos_token_id, token)
                nll = nn.functional.cross_entropy(logits.float(), token, reduction="none")
            cache = cache_of(out)
            teaches = ~done
            nlls.append(nll if eos_token_id is None else torch.where(done, 0.0, nll))
            masks.append(teaches)
            ids = torch.cat([ids, token.unsqueeze(1)], 1)
            if pads:
                real = torch.cat([real, torch.ones_like(real[:, :1])], 1)
            if span is not None:
                span.add(logits, teaches)
            over = written == max_new_tokens
            if eos_token_id is not None:
                done = done | (token == eos_token_id)
                over = over or bool(done.all())
            if span is not None and (over or span.count == learn_every):
                ok = span.learn(ids, cache, real if pads else None)
                learned, rejected = learned + ok, rejected + (not ok)
                if learner.guard is not None:
                    learner.guard.check_if_due()
            if over:
                break
    nll = torch.cat([seen.nll, torch.stack(nlls, 1)], 1)
    return Generated(ids, nll, torch.cat([seen.mask, torch.stack(masks, 1)], 1), learned, rejected)


def _first(learner: Any, inputs: dict[str, Any]) -> Any:
    """A forward pass that notices whether the logits are the output head's own."""
    with learner._split as split:
        return split.forward(inputs)[0]


def _choose(
    logits: Tensor, do_sample: bool, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """(B, V) -> (B,) int64."""
    if not do_sample:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        values, words = logits.topk(top_k, dim=-1)
        drawn = torch.multinomial(values.softmax(-1), 1, generator=generator)
        return words.gather(1, drawn)[:, 0]
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


class _Span:
    """The tokens written since the model learnt last, with what it takes to learn from them.

    Token by token, a backward pass would read all its weights each time, and so would the forward pass that it needs.
    So the inputs of the lowest block that learns are recorded while writing, and the blocks from there upwards run
    once more on all tokens of the span, with a graph, against the cache as it was before them. The logits are those
    of the writing: the output head does not run again. Where the model's build does not allow that, all of it runs
    again, with a cache of its own.
    """

    def __init__(self, learner: Any, cache: Any, size: int) -> None:
        self.learner, self.size = learner, size
        self.count = 0
        self._logits: Tensor | None = None  # (B, size, V)
        self._wanted: list[Tensor] = []
        self._inputs: list[Tensor] = []  # of the lowest block: (B, 1, d) each
        self._extra: tuple | None = None  # what a block returns beside the hidden state
        self._blocks, self._lowest, self.why = _blocks_of(learner)
        self._lag: Any = None
        if not self.why and cache is not None:
            self.why = _uncroppable(cache)
        if self.why:
            self._lag = copy.deepcopy(cache)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Entered while the model writes a token."""
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
        """Keep what the model said (B, V) about the token that was then chosen; ``wanted`` (B,) bool: it may teach."""
        if not self.learner._split.unfit():
            if self._logits is None:
                dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
                self._logits = logits.new_empty((len(logits), self.size, logits.shape[1]), dtype=dtype)
            self._logits[:, self.count] = logits
        self._wanted.append(wanted)
        self.count += 1

    def learn(self, ids: Tensor, cache: Any, real: Tensor | None) -> bool:
        """Learn from the span, which ends with the last of ``ids`` (B, L); False if it was rejected."""
        learner, count = self.learner, self.count
        inputs = {"input_ids": ids[:, -count - 1 : -1]}
        if real is not None:
            inputs |= masked_inputs(real[:, :-1], count)
        targets = ids[:, -count:]
        wanted: Tensor | None = torch.stack(self._wanted, 1)
        if bool(wanted.all()):  # type: ignore[union-attr]
            wanted = None
        self.why = self.why or _uncroppable(cache)  # not known before, if the prompt was one token
        record("generate", "whole model again" if self.why else "top blocks again", self.why)
        with Capturing(learner.layers) as capturing, torch.enable_grad(), contextlib.ExitStack() as stack:
            if self.why:
                inputs |= cached(learner.model, self._lag)
            else:
                inputs |= cached(learner.model, cache)
                stack.enter_context(_cropped(cache, count))
                stack.enter_context(self._skipping(torch.cat(self._inputs, 1)))
            scores: Any
            if self.why or self._logits is None or learner._split.unfit():
                with learner._split as split:
                    out, scores = split.run(inputs, targets)
                if self.why:
                    self._lag = detached(cache_of(out))
            else:
                head = learner._split.head
                stack.enter_context(swapped(head, lambda hidden: hidden))  # logits are known; the rest is wanted
                hidden = learner.model(**inputs).logits
                scores = Fused(self._logits[:, :count], targets, hidden, head.weight)
            ok = learner._learn(capturing, scores, wanted, None if wanted is None else wanted.flatten())
        self.count = 0
        self._wanted, self._inputs = [], []
        return ok

    @contextlib.contextmanager
    def _skipping(self, recorded: Tensor) -> Iterator[None]:
        """The blocks below the lowest that learns do nothing; that one gets ``recorded`` (B, T, d)."""
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


def _blocks_of(learner: Any) -> tuple[Any, int, str]:
    """(the model's list of blocks, the index of the lowest that learns, why they cannot be run alone)."""
    model, blocks, lowest = learner.model, None, 0
    for name, module in model.named_modules():
        if not any(module is layer for layer in learner.layers) or module is learner._split.head:
            continue
        parts = name.split(".")
        for i in range(len(parts) - 1):
            parent = model.get_submodule(".".join(parts[:i]))
            if isinstance(parent, nn.ModuleList):
                break
        else:
            return None, 0, f"{name} is in no list of blocks"
        if blocks is not None and parent is not blocks:
            return None, 0, f"{name} is in another list of blocks than other layers that learn"
        lowest = int(parts[i]) if blocks is None else min(lowest, int(parts[i]))
        blocks = parent
    if blocks is None:
        return None, 0, "only the output head learns"
    if any("forward" in vars(block) or block._forward_hooks or block._forward_pre_hooks for block in blocks):
        return None, 0, "the model's blocks have hooks"
    return blocks, lowest, ""


def _uncroppable(cache: Any) -> str:
    """Why the latest tokens cannot be taken out of a cache for a while; empty if they can."""
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
    return "" if kinds == {"DynamicLayer"} else f"the cache holds {sorted(kinds) or type(cache).__name__}"


@contextlib.contextmanager
def _cropped(cache: Any, count: int) -> Iterator[None]:
    """A cache without its latest ``count`` tokens, not copied; afterwards it is as before, whatever was appended."""
    full = [(layer, layer.keys, layer.values) for layer in cache.layers]
    for layer, keys, values in full:
        length = keys.shape[-2] - count
        layer.keys, layer.values = keys.narrow(-2, 0, length), values.narrow(-2, 0, length)
    try:
        yield
    finally:
        for layer, keys, values in full:
            layer.keys, layer.values = keys, values
