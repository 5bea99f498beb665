"""Suite ``head``: an output head, its scores, and the loss's gradient at its input with and without all of its rows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.kernels.registry import Case, Contender, shared
from bench.kernels.state import size_of
from ttt.learn.head import _matter, input_gradient, score

MASS = 0.01
BITS = 3.0  # entropy of a token's distribution
COLD = 400_000_000  # bytes of weights that a contender rotates through


@dataclasses.dataclass(frozen=True)
class Head(Case):
    """``tokens`` T hidden states h of width ``d`` through a head of ``words`` V rows W, scored, and dL/dh.

    Logits are h W^T, W and h normal: probabilities are log-normal, in an order that differs from token to token. The
    scale of h is such that a token's entropy is `BITS` bits, as that of a language model that knows its text; or, in
    the worst case, ``flat``, as nearly log2 V bits as an untrained model has. Targets are drawn from the distribution.
    """

    suite = "head"
    baseline = "exact product"
    forward = "forward and score"

    words: int
    d: int
    tokens: int
    flat: bool = False

    @property
    def name(self) -> str:
        return f"{self.words}x{self.d}, T = {self.tokens}{', flat' if self.flat else ''}"

    @property
    def ceiling(self) -> str | None:
        return None

    def bytes(self, contender: str) -> int | None:
        """W, read once by the forward pass and once by the exact gradient; of rows picked it depends on the data."""
        if contender == "ttt":
            return None
        size, passes = size_of(self.dtype), 1 if contender == self.forward else 2
        return passes * size * (self.words + self.tokens) * self.d

    def flops(self, contender: str) -> int | None:
        if contender == "ttt":
            return None
        return (2 if contender == self.forward else 4) * self.words * self.tokens * self.d

    def ceilings(self) -> dict[str, Callable[[], Contender]]:
        return {}

    def inputs(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """(weights to rotate among, h (T, d), targets (T,))."""
        kind = getattr(torch, self.dtype)

        def make() -> list[Tensor]:
            generator = torch.Generator(device=self.device).manual_seed(self.words)
            w = torch.randn(self.words, self.d, device=self.device, generator=generator).mul_(self.d**-0.5).to(kind)
            return [w, *(w.clone() for _ in range(COLD // w.nbytes))]

        weights = shared(("head", self.device, self.dtype, self.words, self.d), make)
        generator = torch.Generator(device=self.device).manual_seed(self.tokens)
        h = torch.randn(self.tokens, self.d, device=self.device, generator=generator)
        logits = h @ weights[0].float().T
        h = (h * (0.02 if self.flat else scale_for(logits, BITS))).to(kind)
        p = (h.float() @ weights[0].float().T).softmax(1)
        return weights, h, torch.multinomial(p, 1, generator=generator).flatten()

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        weights, h, targets = self.inputs()

        def forward(weight: Tensor):
            return score(h @ weight.T, targets)

        def gradient(mass: float) -> Callable[[Tensor], Tensor]:
            return lambda weight: input_gradient(forward(weight), weight, None, mass)

        def over_weights(run: Callable[[Tensor], object], check: Callable[[], None], **fields: object) -> Contender:
            turn = itertools.cycle(weights)
            found = Contender(lambda: run(next(turn)), check, cycle=len(weights), graph=False)
            found.fields |= fields
            return found

        def learning(mass: float) -> Contender:
            run = gradient(mass)
            got, exact = run(weights[0]).double(), exact_gradient(weights[0], h, targets)
            off = (got - exact).norm(dim=1)
            largest = float(weights[0].double().norm(dim=1).max())
            # What the exact product makes of its own rounding, and the logits' (of a size of about 20) before it.
            rounding = 2e-4 if self.dtype == "float32" else 0.1

            def check() -> None:
                worst = float((off / (mass * largest + rounding * exact.norm(dim=1))).max())
                if not worst <= 1:
                    raise AssertionError(f"dL/dh is off by {worst:.3g} times what is allowed")

            fields: dict[str, object] = {"relative_error": float(off.norm() / exact.norm())}
            if mass:
                fields["error_of_bound"] = float(off.max()) / (mass * largest)
                fields["share_of_rows"] = picked(forward(weights[0]), mass)
            return over_weights(run, check, **fields)

        return {
            "ttt": lambda: learning(MASS),
            self.baseline: lambda: learning(0.0),
            self.forward: lambda: over_weights(forward, lambda: None),
        }


def picked(scores, mass: float) -> float | None:
    """Rows read, of those that one token can read, on average; None where the exact product is taken."""
    found = _matter(scores, mass)
    return None if found is None else len(found[0]) / scores.exp.numel()


def exact_gradient(weight: Tensor, h: Tensor, targets: Tensor) -> Tensor:
    """(T, d) float64: sum over the words of (p - [word = target]) W, without `ttt.learn.head`."""
    w = weight.double()
    p = (h.double() @ w.T).softmax(1)
    p[torch.arange(len(p)), targets] -= 1
    return p @ w


def scale_for(logits: Tensor, bits: float) -> float:
    """The factor that gives the rows of ``logits`` (T, V) a mean entropy of ``bits``, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(30):
        middle = (low + high) / 2
        logp = (logits * middle).log_softmax(1)
        entropy = float(-(logp.exp() * logp).sum(1).mean()) / math.log(2)
        low, high = (middle, high) if entropy > bits else (low, middle)
    return (low + high) / 2


def cases(device: str) -> list[Case]:
    """Vocabularies of 32 and 128 thousand words, narrow and wide; flat distributions at the first."""
    found: list[Case] = []
    for words, d in itertools.product((32_000, 128_000), (768, 2048)):
        found += [Head(device, "float32", words, d, t, quick=(words, d, t) == (32_000, 768, 16)) for t in (16, 64)]
        if (words, d) == (32_000, 768):
            found += [Head(device, "float32", words, d, t, flat=True) for t in (16, 64)]
    return found
