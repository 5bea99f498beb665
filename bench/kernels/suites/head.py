"""Suite ``head``: an output head, its scores, and the loss's gradient at its input from all or few of its rows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.kernels.case import Case, shared
from bench.kernels.contender import Contender
from bench.kernels.state import size_of
from ttt.learn.head import input_gradient, rows_read, score

MASS = 0.01
BITS = 3.0  # entropy of a token's distribution
COLD = 400_000_000  # bytes of weights that a contender rotates through, so that they come from memory


@dataclasses.dataclass(frozen=True)
class Head(Case):
    """Score ``tokens`` T hidden states h (T, d) with a head W of ``words`` V rows (V, d), and compute dL/dh.

    Logits are h W^T with normally distributed W and h, so that probabilities are log-normal, with a different order of
    the words for each token. h is scaled so that a token's distribution has an entropy of `BITS` bits, as for a
    language model that predicts its text well. With ``flat``, the worst case, the entropy is close to log2 V bits, as
    for an untrained model. Targets are drawn from the distribution.
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
        """W once for the forward pass and once for the exact gradient. ttt reads a part that depends on the data."""
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
            found = Contender(lambda: run(next(turn)), check, cycle=len(weights))
            found.fields |= fields
            return found

        def learning(mass: float) -> Contender:
            run = gradient(mass)
            got, exact = run(weights[0]).double(), exact_gradient(weights[0], h, targets)
            off = (got - exact).norm(dim=1)
            largest = float(weights[0].double().norm(dim=1).max())
            # The relative error that rounding the logits (of a size of about 20) and the exact product may cause.
            rounding = 2e-4 if self.dtype == "float32" else 0.1

            def check() -> None:
                worst = float((off / (mass * largest + rounding * exact.norm(dim=1))).max())
                if not worst <= 1:
                    raise AssertionError(f"dL/dh is off by {worst:.3g} times what is allowed")

            fields: dict[str, object] = {"relative_error": float(off.norm() / exact.norm())}
            if mass:
                fields["error_of_bound"] = float(off.max()) / (mass * largest)
                fields["share_of_rows"] = picked(forward(weights[0]), weights[0], mass)
            return over_weights(run, check, **fields)

        return {
            "ttt": lambda: learning(MASS),
            self.baseline: lambda: learning(0.0),
            self.forward: lambda: over_weights(forward, lambda: None),
        }


def picked(scores, weight: Tensor, mass: float) -> float | None:
    """Share of the rows of the head that a token reads, on average; None where the exact product is computed."""
    rows = rows_read(scores, weight, mass)
    return None if rows is None else rows / (len(scores.nll) * len(weight))


def exact_gradient(weight: Tensor, h: Tensor, targets: Tensor) -> Tensor:
    """(T, d) float64: sum over the words of (p - [word = target]) W, computed without `ttt.learn.head`."""
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
    """Vocabularies of 32,000 and 128,000 words and two widths; flat distributions for the smallest of them."""
    found: list[Case] = []
    for words, d in itertools.product((32_000, 128_000), (768, 2048)):
        found += [Head(device, "float32", words, d, t, quick=(words, d, t) == (32_000, 768, 16)) for t in (16, 64)]
        if (words, d) == (32_000, 768):
            found += [Head(device, "float32", words, d, t, flat=True) for t in (16, 64)]
    return found
