"""Generating text with a model that learns from the stream; see `ttt.Learner.generate`."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ttt.checks import check_bool, check_number, check_type, check_whole
from ttt.learn.draw import draw_tokens
from ttt.learn.huggingface import cache_of, cached, frozen, masked_inputs
from ttt.learn.kept_cache import KeptCache
from ttt.learn.loop import read
from ttt.learn.output_learning import OutputLearning
from ttt.learn.single import SingleWeights
from ttt.learn.text import Text

if TYPE_CHECKING:
    from ttt.learn.learner import Learner


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """The arguments of `ttt.Learner.generate` that are not tokens.

    Raises:
        TypeError, ValueError: for a value of a wrong type or out of range.
    """

    max_new_tokens: int
    learn_prompt: bool = True
    learn_output: bool = False
    learn_every: int = 16
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    eos_token_id: int | None = None
    generator: torch.Generator | None = None
    cache: KeptCache | None = None
    allow_stale_cache: bool = False
    keep_cache: bool = False

    def __post_init__(self) -> None:
        if self.top_k is not None:
            check_whole("top_k", self.top_k, 1)
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("learn_every", self.learn_every, 1)
        for name in ("learn_prompt", "learn_output", "do_sample", "allow_stale_cache", "keep_cache"):
            check_bool(name, getattr(self, name))
        check_number("temperature", self.temperature, 0.0, above=True, finite=True)
        if self.eos_token_id is not None:
            check_whole("eos_token_id", self.eos_token_id, 0)
        if self.generator is not None:
            check_type("generator", self.generator, torch.Generator, "a torch.Generator or None")
        if self.cache is not None:
            check_type("cache", self.cache, KeptCache, "the cache of a GenerateOutput (keep_cache=True) or None")


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What `ttt.Learner.generate` returns.

    Attributes:
        sequences: (B, P + N) int64: prompts and output; shorter if all sequences finished early.
        nll: (B, P + N - 1) float32, nats: -log p(token t+1 | tokens up to t), each measured before the model learnt
            from that token. 0 where ``mask`` is False.
        mask: (B, P + N - 1) bool: False for padding, after the end of a sequence, and for what was in a given cache.
        learned: number of chunks of the prompt, and spans of the output, that the model learnt from.
        rejected: number of those that were skipped for a loss or gradient that is not finite; they changed nothing.
        cache: what the model keeps of ``sequences``, to go on from, if ``keep_cache`` was True.
    """

    sequences: Tensor
    nll: Tensor
    mask: Tensor
    learned: int
    rejected: int
    cache: KeptCache | None = None


def generate(learner: Learner, prompt: Text, options: GenerateOptions) -> GenerateOutput:
    """`ttt.Learner.generate`, for a ``prompt`` that `check_prompt` has checked."""
    with frozen(learner.model):
        nll, learned, rejected, cache = _read_prompt(learner, prompt, options)
        written = _Writer(learner, prompt, options, cache)
        while not written.finished:
            written.write_token()
    nll = torch.cat([nll, torch.stack(written.nlls, 1)], 1)
    mask = torch.cat([prompt.scored, torch.stack(written.masks, 1)], 1)
    if options.cache is not None:
        mask[:, : options.cache.ids.shape[1]] = False
    kept = KeptCache(learner.model, written.text, written.cache) if options.keep_cache else None
    return GenerateOutput(written.ids, nll, mask, learned + written.learned, rejected + written.rejected, kept)


def check_prompt(learner: Learner, prompt: Text, options: GenerateOptions) -> None:
    """Check a ``prompt`` whose tokens were checked. Nothing is changed.

    Raises:
        ValueError: if prompt and output do not fit the context, padding is not on the left only, the output is to be
            learnt by a learner with rules, or the cache does not fit prompt or weights.
    """
    length, attend = prompt.ids.shape[1], prompt.attend
    if length + options.max_new_tokens > learner.context:
        raise ValueError(
            f"the prompt's {length} tokens and max_new_tokens = {options.max_new_tokens} must fit the context of "
            f"{learner.context} tokens together"
        )
    if attend is not None and not bool((attend[:, 1:] >= attend[:, :-1]).all() & attend[:, -1].all()):
        raise ValueError("attention_mask must mark padding on the left only, and every prompt must end with a token")
    if options.learn_output and learner.rules:
        raise ValueError("learn_output cannot be True for a learner with rules: they learn from what is read")
    if options.cache is not None:
        options.cache.check(learner.model, prompt, options.allow_stale_cache)


def _read_prompt(learner: Learner, prompt: Text, options: GenerateOptions) -> tuple[Tensor, int, int, Any]:
    """Score the prompt and learn from it: ((B, P - 1) nats, chunks learnt, chunks rejected, the cache afterwards)."""
    chunk, context = learner.config.chunk, learner.context
    strategy, start = SingleWeights(learner, prompt, options.learn_prompt), 0
    if options.cache is not None:
        start, strategy.cache = options.cache.ids.shape[1], options.cache.take()
    nll = read(prompt, strategy, chunk, context, start=start)
    cache = strategy.cache
    if strategy.rejected:  # the cache begins after the last rejected chunk
        again = SingleWeights(learner, prompt, False)
        read(prompt, again, chunk, context)
        cache = again.cache
    return nll, strategy.learned, strategy.rejected, cache


class _Writer:
    """Generates token after token, and lets the model learn from them every ``learn_every`` tokens.

    Attributes:
        ids: (B, P + tokens written so far) int64.
        nlls, masks: of each written token (B,), as in `GenerateOutput`.
        learned, rejected: numbers of spans of the output.
        cache: the model's, of all tokens but the last.
        finished: whether no token is to follow.
    """

    def __init__(self, learner: Learner, prompt: Text, options: GenerateOptions, cache: Any) -> None:
        self.learner, self.options = learner, options
        self.ids, self._attend, self.cache = prompt.ids, prompt.attend, cache
        self._done = torch.zeros((len(prompt.ids),), dtype=torch.bool, device=prompt.ids.device)
        self._span: OutputLearning | None = None
        if options.learn_output and learner.config.lr > 0:
            self._span = OutputLearning(learner, cache, options.learn_every)
        self.nlls: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.learned = self.rejected = 0
        self.finished = False

    @property
    def text(self) -> Text:
        """Prompt and output so far."""
        return Text.of(self.ids, self._attend)

    def write_token(self) -> None:
        """Choose the next token of every sequence, score it, and learn if a span is complete."""
        learner, options, span = self.learner, self.options, self._span
        inputs = {"input_ids": self.ids[:, -1:], **cached(learner.model, self.cache)}
        if self._attend is not None:
            inputs |= masked_inputs(self._attend, 1)
        with torch.no_grad(), span.recording() if span is not None else contextlib.nullcontext():
            out = learner.model(**inputs) if self.nlls else self._first_pass(inputs)
            logits = out.logits[:, -1]
            token = learner.access.same(_choose(logits, options))
            if options.eos_token_id is not None:
                token = torch.where(self._done, options.eos_token_id, token)
            nll = nn.functional.cross_entropy(logits.float(), token, reduction="none")
        self.cache = cache_of(out)
        teaches = ~self._done
        self.nlls.append(nll if options.eos_token_id is None else torch.where(self._done, 0.0, nll))
        self.masks.append(teaches)
        self.ids = torch.cat([self.ids, token.unsqueeze(1)], 1)
        if self._attend is not None:
            self._attend = torch.cat([self._attend, torch.ones_like(self._attend[:, :1])], 1)
        self.finished = len(self.nlls) == options.max_new_tokens
        if options.eos_token_id is not None:
            self._done = self._done | (token == options.eos_token_id)
            self.finished = self.finished or bool(self._done.all())
        if span is not None:
            span.add(logits, teaches)
            if self.finished or span.count == options.learn_every:
                self._learn(span)

    def _first_pass(self, inputs: dict[str, Any]) -> Any:
        """A forward pass that finds out whether the model returns the logits that its output head makes."""
        with self.learner.head as head:
            return head.forward(inputs)[0]

    def _learn(self, span: OutputLearning) -> None:
        finite = span.learn(self.text, self.cache)
        self.learned, self.rejected = self.learned + finite, self.rejected + (not finite)
        if self.learner.guard is not None:
            self.learner.guard.check_if_due()


def _choose(logits: Tensor, options: GenerateOptions) -> Tensor:
    """The next token of each sequence, (B,) int64, from ``logits`` (B, V)."""
    if not options.do_sample:
        return logits.argmax(-1)
    logits = logits.float() / options.temperature
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        values, words = logits.topk(options.top_k, dim=-1)
        drawn = draw_tokens(values.softmax(-1), options.generator)
        return words.gather(1, drawn.unsqueeze(1))[:, 0]
    return draw_tokens(logits.softmax(-1), options.generator)
