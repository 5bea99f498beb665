"""Hidden states at the lowest block that learns, kept of prompts that may teach until their request has ended."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

KEY = "ttt_key"
"""The name, among a request's extra arguments, of the key under which its prompt is captured."""


class Capture:
    """Keeps hidden states of requests that carry a `KEY`, as vLLM's model runner computes them.

    A prompt may be computed in several parts (chunked prefill), and anew after a preemption. Where several sequences of
    one request have the same prompt, one of them is kept.

    Args:
        runner: vLLM's model runner.
        most: largest number of tokens that are kept; beyond it the oldest prompts are dropped, and teach nothing.
    """

    def __init__(self, runner: Any, most: int) -> None:
        self.runner, self.most = runner, most
        self._parts: OrderedDict[str, tuple[str, list[tuple[int, Tensor]]]] = OrderedDict()
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """How many tokens are kept."""
        return self._tokens

    def before_block(self, module: nn.Module, args: Any) -> None:
        """A forward pre-hook of the block: keep the rows of prompts that are to be captured."""
        _, hidden, residual = args
        runner = self.runner
        batch = runner.input_batch
        count = batch.num_reqs
        if (batch.num_computed_tokens_cpu[:count] >= batch.num_prompt_tokens[:count]).all():
            return  # answers are generated, and no prompt is computed
        for place, request in enumerate(batch.req_ids):
            state = runner.requests.get(request)
            extra = state.sampling_params.extra_args if state is not None and state.sampling_params else None
            key = extra.get(KEY) if extra else None
            if key is None:
                continue
            done, length = int(batch.num_computed_tokens_cpu[place]), state.num_prompt_tokens
            if done >= length:
                continue
            start, end = runner.query_start_loc.np[place : place + 2].tolist()
            rows = slice(start, min(end, start + length - done))
            states = hidden[rows] if residual is None else hidden[rows] + residual[rows]
            self._keep(key, request, done, states.clone())

    def _keep(self, key: str, request: str, done: int, states: Tensor) -> None:
        owner, parts = self._parts.setdefault(key, (request, []))
        if owner != request:
            return
        while parts and parts[-1][0] >= done:  # computed again after a preemption
            self._tokens -= len(parts.pop()[1])
        parts.append((done, states))
        self._tokens += len(states)
        while self._tokens > self.most and len(self._parts) > 1:
            self.drop(next(iter(self._parts)))

    def take(self, key: str, count: int) -> Tensor | None:
        """(1, count, d): the hidden states of the first ``count`` tokens under ``key``, which is dropped.

        None if some are missing.
        """
        _, parts = self._parts.get(key, ("", []))
        self.drop(key)
        at = 0
        for done, states in parts:
            if done != at:
                return None
            at += len(states)
        if at < count:
            return None
        # The parts were made in inference mode, where autograd cannot follow; what is joined here was not.
        with torch.inference_mode(False):
            return torch.cat([states for _, states in parts])[:count].unsqueeze(0).clone()

    def drop(self, key: str) -> None:
        """Drop what is kept under ``key``, if anything is."""
        _, parts = self._parts.pop(key, ("", []))
        self._tokens -= sum(len(states) for _, states in parts)
