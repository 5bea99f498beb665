"""Continuous batching: sequences of several users that are generated side by side, and join and leave at any step."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ttt.serve.errors import ServerFailure, as_request_error
from ttt.serve.prefixes import Prefixes
from ttt.serve.request import Piece, Request
from ttt.serve.row_cache import RowCache
from ttt.serve.sampling import TokenScore, draw, scored
from ttt.serve.state_rows import StateRows
from ttt.serve.text_stream import TextStream

log = logging.getLogger("ttt.serve")


@dataclasses.dataclass(eq=False)
class _Sequence:
    """One continuation of a request. ``held`` of its ``ids`` are in the cache, in row ``row``."""

    request: Request
    index: int
    ids: list[int]
    text: TextStream
    row: int
    held: int = 0
    generator: torch.Generator | None = None
    counts: Counter[int] = dataclasses.field(default_factory=Counter)


class Batch:
    """The sequences that are being generated.

    The first rows of the cache hold those that are decoded, in the order of ``decoding``; those of ``reading`` stand in
    the rows after them. One of them reads its prompt, a part at each step, or several read short prompts together, in
    one step.

    Args:
        cache: keeps what the sequences have read, a row for each, and computes with their users' weights or states.
        tokenizer: of the cache's model.
        prefill: tokens that are read in one step, at most, padding included.
        ended: called with a request whose last sequence has ended, or which failed or was cancelled.
        prefixes: what earlier requests have read; None to read each prompt anew.
    """

    def __init__(
        self,
        cache: RowCache | StateRows,
        tokenizer: Any,
        *,
        prefill: int,
        ended: Callable[[Request], None],
        prefixes: Prefixes | None = None,
    ) -> None:
        self.cache, self.tokenizer, self.prefill, self.ended = cache, tokenizer, prefill, ended
        self.prefixes = prefixes
        self.decoding: list[_Sequence] = []
        self.reading: list[_Sequence] = []
        self._scores: list[TokenScore] = []  # of the prompt that is read
        self._ends = _end_tokens(cache.model, tokenizer)
        self._last_only = "logits_to_keep" in inspect.signature(type(cache.model).forward).parameters

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.decoding and not self.reading

    @property
    def requests(self) -> list[Request]:
        """The requests that have sequences here."""
        return list(dict.fromkeys(sequence.request for sequence in [*self.decoding, *self.reading]))

    def fits(self, request: Request) -> bool:
        """Whether ``request`` can begin now."""
        if not self.reading:
            return len(self.decoding) + request.n <= self.cache.rows
        together = [*(sequence.request for sequence in self.reading), request]
        longest = max(len(each.prompt) for each in together)
        return (
            self.cache.pads
            and len(self.decoding) + len(together) <= self.cache.rows
            and len(together) * longest <= self.prefill
            and all(each.n == 1 and not each.score_prompt for each in together)
            and not any(sequence.held for sequence in self.reading)
        )

    def begin(self, request: Request) -> None:
        """Let the next steps read the prompt of ``request``; the batch must have room for it (`fits`)."""
        assert self.fits(request)
        request.running = request.n
        row = len(self.decoding) + len(self.reading)
        self.cache.begin(row, request.user)
        sequence = self._sequence(request, 0, list(request.prompt), row)
        if self.prefixes is not None and not self.reading and not request.score_prompt:
            sequence.held = self.prefixes.begin(request.user, request.prompt, row)
        self.reading.append(sequence)
        self._scores = []

    def _sequence(self, request: Request, index: int, ids: list[int], row: int) -> _Sequence:
        seed, generator = request.sampling.seed, None
        if seed is not None:
            generator = torch.Generator().manual_seed((seed + index) % 2**63)
        text = TextStream(self.tokenizer, request.sampling.stop)
        return _Sequence(request, index, ids, text, row, generator=generator)

    # -- steps --------------------------------------------------------------------------------------------------------

    def read_step(self) -> int:
        """Read a part of the prompt that has just begun, or all of several prompts: how many tokens were read."""
        if self.prefixes is not None:
            self.prefixes.drop_stale()
        for sequence in [each for each in self.reading if each.request.cancelled]:
            self._leave_reading(sequence)
        if not self.reading:
            return 0
        return self._read_part(self.reading[0]) if len(self.reading) == 1 else self._read_together()

    def _read_part(self, sequence: _Sequence) -> int:
        request, start = sequence.request, sequence.held
        part = request.prompt[start : start + self.prefill]
        last = start + len(part) == len(request.prompt)
        try:
            logits = self._logits([request.user], [part], sequence.row, [start], last_only=not request.score_prompt)
            sequence.held += len(part)
            if request.score_prompt:
                self._score(request, start, logits[0])
            if last:
                if not bool(torch.isfinite(logits[0, -1]).all()):
                    raise ServerFailure("the model computed something that is not finite for this request")
                self._begin_decoding(sequence, logits[0, -1])
        except Exception as error:
            self._fail_reading(sequence, error)
        return len(part)

    def _read_together(self) -> int:
        """Read the whole prompts of ``reading``, padded to the same length."""
        sequences = list(self.reading)
        prompts = [sequence.request.prompt for sequence in sequences]
        longest, last = max(map(len, prompts)), torch.tensor([len(prompt) - 1 for prompt in prompts])
        padded = [[*prompt, *prompt[-1:] * (longest - len(prompt))] for prompt in prompts]
        ids = torch.tensor(padded, device=self.cache.device)
        try:
            ends, at = last.unique(return_inverse=True)  # the head computes these columns of each row
            options = {"logits_to_keep": ends.to(ids.device)} if self._last_only else {}
            with torch.no_grad():
                users = [sequence.request.user for sequence in sequences]
                logits = self.cache.run(users, ids, sequences[0].row, torch.zeros_like(last), **options)
            logits = logits[torch.arange(len(last)), at if self._last_only else last].float().cpu()
        except Exception as error:
            for sequence in sequences:
                self._fail_reading(sequence, error)
            return 0
        for sequence in sequences:  # all of them before one leaves, which moves the rows of others
            sequence.held = len(sequence.request.prompt)
        for sequence, row in zip(sequences, logits, strict=True):
            try:
                if not bool(torch.isfinite(row).all()):
                    raise ServerFailure("the model computed something that is not finite for this request")
                self._begin_decoding(sequence, row)
            except Exception as error:
                self._fail_reading(sequence, error)
        return sum(map(len, prompts))

    def _fail_reading(self, sequence: _Sequence, error: Exception) -> None:
        if sequence in self.reading:
            _fail(sequence.request, error)
            self._leave_reading(sequence)
        else:  # it had begun to be decoded
            _fail(sequence.request, error)
            for each in [each for each in self.decoding if each.request is sequence.request]:
                self._leave(each)

    def _begin_decoding(self, sequence: _Sequence, logits: Tensor) -> None:
        """The prompt has been read: take the first token of each of the request's sequences from ``logits`` (V,)."""
        request = sequence.request
        if request.score_prompt and request.on_prompt is not None:
            request.on_prompt(self._scores)
        self.reading.remove(sequence)
        self.decoding.append(sequence)
        for index in range(1, request.n):
            other = self._sequence(request, index, list(request.prompt), len(self.decoding))
            self.cache.copy(sequence.row, other.row, len(request.prompt))
            other.held = sequence.held
            self.decoding.append(other)
        for each in [each for each in self.decoding if each.request is request]:
            self._take(each, logits)

    def _score(self, request: Request, start: int, logits: Tensor) -> None:
        """Score the prompt's tokens after ``start`` under ``logits`` (T, V)."""
        for at, row in enumerate(logits.log_softmax(-1)):
            if start + at + 1 < len(request.prompt):
                self._scores.append(scored(row, request.prompt[start + at + 1], request.sampling.logprobs or 0))

    def decode_step(self) -> int:
        """Generate one token for each sequence; how many there are."""
        for sequence in [each for each in self.decoding if each.request.cancelled or each.request.failed]:
            self._leave(sequence)
        sequences = list(self.decoding)
        if not sequences:
            return 0
        users = [sequence.request.user for sequence in sequences]
        last = [[sequence.ids[-1]] for sequence in sequences]
        logits = self._logits(users, last, 0, [sequence.held for sequence in sequences], last_only=True)[:, -1]
        finite = torch.isfinite(logits).all(1).tolist()
        for sequence in sequences:  # all of them before one leaves, which moves another one's row
            sequence.held += 1
        for sequence, row, sound in zip(sequences, logits, finite, strict=True):
            if sequence.request.failed:
                continue
            if not sound:
                _fail(sequence.request, ServerFailure("the model computed something that is not finite"))
                continue
            try:
                self._take(sequence, row)
            except Exception as error:
                log.exception("a token could not be drawn or delivered")
                _fail(sequence.request, error)
        for sequence in [each for each in self.decoding if each.request.failed]:
            self._leave(sequence)
        return len(sequences)

    @torch.no_grad()
    def _logits(
        self, users: list[str | None], ids: list[list[int]], first: int, held: list[int], *, last_only: bool
    ) -> Tensor:
        """(B, T, V) float32 on the CPU, T = 1 with ``last_only``: of the next ``ids`` of the rows from ``first``."""
        tokens = torch.tensor(ids, device=self.cache.device)
        options = {"logits_to_keep": 1} if last_only and self._last_only else {}
        logits = self.cache.run(users, tokens, first, torch.tensor(held), **options)
        return (logits[:, -1:] if last_only else logits).float().cpu()

    def _take(self, sequence: _Sequence, logits: Tensor) -> None:
        """Draw the next token of ``sequence`` from ``logits`` (V,), deliver it, and end the sequence where it ends."""
        request, sampling = sequence.request, sequence.request.sampling
        made = len(sequence.ids) - len(request.prompt)
        if made >= sampling.max_tokens:  # only where nothing is to be generated
            return self._finish(sequence, "length", "", ())
        token = draw(logits, sampling, sequence.counts, sequence.generator)
        scores: tuple[TokenScore, ...] = ()
        if sampling.logprobs is not None:
            scores = (scored(logits.log_softmax(-1), token, sampling.logprobs),)
        sequence.ids.append(token)
        sequence.counts[token] += 1
        request.generated += 1
        if token in self._ends and not sampling.ignore_eos:
            return self._finish(sequence, "stop", sequence.text.end(), scores)
        text = sequence.text.add(token)
        if sequence.text.stopped:
            return self._finish(sequence, "stop", text, scores)
        if made + 1 == sampling.max_tokens:
            text += sequence.text.end()
            return self._finish(sequence, "stop" if sequence.text.stopped else "length", text, scores)
        request.deliver(Piece(sequence.index, text, scores, None, made + 1))

    def _finish(self, sequence: _Sequence, reason: str, text: str, scores: tuple[TokenScore, ...]) -> None:
        count = len(sequence.ids) - len(sequence.request.prompt)
        if self.prefixes is not None and sequence.index == 0:
            self.prefixes.end(sequence.request.user, sequence.ids[: sequence.held], sequence.row)
        sequence.request.deliver(Piece(sequence.index, text, scores, reason, count))
        self._leave(sequence)

    # -- leaving ------------------------------------------------------------------------------------------------------

    def _leave(self, sequence: _Sequence) -> None:
        """Take ``sequence`` out of the batch; the last one takes its row."""
        last = self.decoding.pop()
        if last is not sequence:
            self.cache.copy(last.row, sequence.row, last.held)
            self.decoding[self.decoding.index(sequence)] = last
            self.cache.clear(last.row)
            last.row = sequence.row
        else:
            self.cache.clear(last.row)
        self._close_up(self.reading)
        self._count_down(sequence.request)

    def _leave_reading(self, sequence: _Sequence) -> None:
        at = self.reading.index(sequence)
        self.reading.remove(sequence)
        self.cache.clear(sequence.row)
        self._close_up(self.reading[at:])
        sequence.request.running = 1
        self._count_down(sequence.request)

    def _close_up(self, sequences: list[_Sequence]) -> None:
        """Move each of ``sequences``, whose rows follow a free one, to the row before its own."""
        for sequence in sequences:
            self.cache.copy(sequence.row, sequence.row - 1, sequence.held)
            self.cache.clear(sequence.row)
            sequence.row -= 1

    def _count_down(self, request: Request) -> None:
        request.running -= 1
        if request.running == 0:
            self.ended(request)

    def fail_all(self, error: Exception) -> None:
        """End all requests with ``error``."""
        while self.reading:
            self._fail_reading(self.reading[-1], error)
        while self.decoding:
            _fail(self.decoding[-1].request, error)
            self._leave(self.decoding[-1])


def _fail(request: Request, error: Exception) -> None:
    if not request.failed and not request.cancelled:
        request.failed = True
        request.deliver(as_request_error(error))
    request.failed = True


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, by the model's generation configuration and the tokenizer."""
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for value in (getattr(generation, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if value is not None:
            found |= set(value) if isinstance(value, (list, tuple)) else {value}
    return frozenset(found)
