"""Suite ``sequence``, in training: the gated delta rule and memories on a text, forward and backward, on CPUs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.kernels.case import Case
from bench.kernels.ceilings import square_ceiling
from bench.kernels.contender import Contender
from bench.kernels.suites.sequence import CHUNK, TITANS, check_close, inputs_of, layer_sizes, options_of
from ttt.ops import sequence as ops

DELTA = "gated delta rule"


@dataclasses.dataclass(frozen=True)
class Training(Case):
    """One op on a text of ``tokens``, and the gradients of all it is given, in the kernels and in the torch form.

    flops are those of the kernels' own products, for each token and head, of which the backward pass reads the text
    again. The delta rule has 22 D^2 with the state and, in chunks of C tokens, 15 C D within the chunk. A layer of a
    memory, of I x O weights, has 24 I O, in mini-batches of b 4 b (I + O), 16 I O more with a momentum, and 8 I O more
    if it is not the first.
    """

    suite = "sequence"
    baseline = "torch"
    forward = None

    op: str
    tokens: int
    heads: int
    width: int
    mini_batch: int | None

    @property
    def name(self) -> str:
        batch = f" in mini-batches of {self.mini_batch}" if self.mini_batch else ""
        return f"{self.op}{batch}, forward and backward: T = {self.tokens}, {self.heads} heads of {self.width}"

    @property
    def ceiling(self) -> str | None:
        return "matmul"

    def bytes(self, contender: str) -> int | None:
        return None

    def flops(self, contender: str) -> int | None:
        if self.mini_batch is None:
            each = 22 * self.width**2 + 15 * CHUNK * self.width
        else:
            sizes, own = layer_sizes(self.op, self.width), 40 if self.op == TITANS else 24
            each = sum(own * i * o + 4 * self.mini_batch * (i + o) for i, o in sizes)
            each += sum(8 * i * o for i, o in sizes[1:])
        return self.tokens * self.heads * each

    def ceilings(self) -> dict[str, Callable[[], Contender]]:
        return {"matmul": lambda: square_ceiling(self.device, self.dtype)}

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        x = inputs_of(self.op, self.device, self.dtype, 1, self.tokens, self.heads, self.width)
        layers = len(x.weights)
        options = {} if self.mini_batch is None else options_of(self.op, x)
        others = options.values() if self.op == TITANS else x.norm[:2]
        given = [x.q, x.k, x.v, x.rate, *([x.gate] if self.mini_batch is None else (*x.weights, *others))]
        upwards = torch.randn_like(x.v)

        def gradients(tensors: Any, form: str, size: int) -> tuple[Tensor, ...]:
            if self.mini_batch is None:
                out, _ = ops.gated_delta_rule(*tensors, form=form, chunk_size=size)
            else:
                (q, k, v, rate), weights, rest = tensors[:4], tensors[4 : 4 + layers], tensors[4 + layers :]
                named: Any = dict(zip(options, rest, strict=True)) if self.op == TITANS else {"norm": ops.Norm(*rest)}
                out, _ = ops.memory(q, k, v, rate, weights, mini_batch=self.mini_batch, form=form, **named)
            return torch.autograd.grad(out, tensors, upwards.to(out.dtype))

        @functools.cache
        def exact() -> tuple[Tensor, ...]:
            return gradients([t.double().requires_grad_() for t in given], "chunk", 64)

        def of(form: str, size: int) -> Callable[[], Contender]:
            def make() -> Contender:
                tensors = [t.clone().requires_grad_() for t in given]

                def check() -> None:
                    for found, wanted in zip(gradients(tensors, form, size), exact(), strict=True):
                        check_close(found, wanted, self.dtype)

                return Contender(lambda: gradients(tensors, form, size), check)

            return make

        found = {"ttt": of("auto", 64), "torch": of("chunk", 64)}
        if self.mini_batch is None:
            found["torch, in chunks of 16"] = of("chunk", 16)
        return found


def cases(device: str) -> list[Case]:
    """Texts of 2048 tokens, on CPUs: elsewhere no kernel has a backward pass."""
    if device != "cpu":
        return []
    found: list[Case] = []
    memories = [(op, mini_batch) for op in ("TTT-Linear", "TTT-MLP", TITANS) for mini_batch in (16, 64)]
    for op, mini_batch in ((DELTA, None), *memories):
        for dtype in ("float32", "bfloat16"):
            quick = (op, dtype) == (DELTA, "float32")
            found.append(Training(device, dtype, op, 2048, 16, 64, mini_batch, quick=quick))
    return found
