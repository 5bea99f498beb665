"""Suite ``sequence``: the ops of sequence layers on a text and on a token, and TTT-Linear beside attention."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.kernels.case import Case, TimedCase
from bench.kernels.ceilings import square_ceiling
from bench.kernels.contender import Contender, Unavailable
from ttt.ops import sequence as ops

MINI_BATCH = 16
CHUNK = 32
"""Tokens of a chunk of the delta rule's C++ kernel, by which its products are counted."""
EXPANSION = 4
"""Width of the middle of TTT-MLP's memory, relative to that of a head."""
TITANS = "Titans"
LACT = "LaCT"
IN_PLACE = "In-Place TTT"
OPS = ("gated delta rule", "TTT-Linear", "TTT-MLP", TITANS, LACT, IN_PLACE)
HIGHEST_RATE = {"TTT-Linear": 0.2, "TTT-MLP": 0.01, TITANS: 0.1, LACT: 0.02, IN_PLACE: 0.02}
"""Those of their layers by default; for Titans a typical one."""
LARGE_CHUNK = 512
LACT_EXPANSION = 2
"""Width of LaCT's SwiGLU, relative to that of a head, as in its layer."""
NEWTON_SCHULZ = 5
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Random tokens (B, T, H, D), and the first weights and the norm of a memory, if the op has one."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    gate: Tensor
    weights: list[Tensor]
    norm: ops.Norm


def inputs_of(op: str, device: str, dtype: str, batch: int, tokens: int, heads: int, width: int) -> Inputs:
    """Queries and keys of length 1, rates below 1 for the delta rule and below `HIGHEST_RATE` for a memory."""
    kind = getattr(torch, dtype)
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    q, k = (torch.nn.functional.normalize(draw(batch, tokens, heads, width), dim=-1).to(kind) for _ in range(2))
    v, rate, gate = draw(batch, tokens, heads, width).to(kind), *(draw(batch, tokens, heads) for _ in range(2))
    weights = []
    for given, found in layer_sizes(op, width):
        # TTT-MLP's as its layer draws them; with large ones of TTT-Linear rounding grows from token to token.
        scale = 0.02 if op in ("TTT-Linear", TITANS) else 1 if given == width else given**-0.5
        bias = [] if op in (LACT, IN_PLACE) else [torch.zeros(heads, found, device=device)]
        weights += [draw(heads, given, found) * scale, *bias]
    norm = ops.Norm(torch.ones(heads, width, device=device), torch.zeros(heads, width, device=device))
    rate = HIGHEST_RATE.get(op, 1) * rate.sigmoid()
    return Inputs(q, k, v, rate, -torch.nn.functional.softplus(gate - 3), weights, norm)


def layer_sizes(op: str, width: int) -> list[tuple[int, int]]:
    """Inputs and outputs of each weight of the op's memory; none for the delta rule."""
    middle, inner = EXPANSION * width, LACT_EXPANSION * width
    one = [(width, width)]
    swiglu = [(width, inner), (inner, width), (width, inner)]
    two = [(width, middle), (middle, width)]
    return {"TTT-Linear": one, TITANS: one, IN_PLACE: one, "TTT-MLP": two, LACT: swiglu}.get(op, [])


def options_of(op: str, x: Inputs) -> dict[str, Any]:
    """Of `memory`: the inner norm, or for Titans a gate and a momentum for each token, (B, T, H), and no norm."""
    return {"gate": x.gate.exp(), "momentum": 1 - x.gate.exp()} if op == TITANS else {"norm": x.norm}


def large_chunk_options(x: Inputs) -> dict[str, Any]:
    """Of `lact`: rates for each weight (B, T, H, 3), and a momentum (B, T, H)."""
    return {"rates": x.rate.unsqueeze(-1).expand(*x.rate.shape, 3), "momentum": x.gate.exp()}


def run_op(op: str, x: Inputs, form: str) -> tuple[Tensor, Any]:
    """The op on all tokens, with its final state."""
    if op in (LACT, IN_PLACE):
        options: Any = {"chunk_size": LARGE_CHUNK, "output_final_state": True, "form": form}
        if op == IN_PLACE:
            return ops.in_place_ttt(x.q, x.k, x.v, x.rate, x.weights[0], **options)
        return ops.lact(x.q, x.k, x.v, weights=x.weights, **large_chunk_options(x), **options)
    if op == "gated delta rule":
        return ops.gated_delta_rule(x.q, x.k, x.v, x.rate, x.gate, output_final_state=True, form=form)
    return ops.memory(
        x.q, x.k, x.v, x.rate, x.weights, mini_batch=MINI_BATCH, output_final_state=True, form=form, **options_of(op, x)
    )


def fla_naive(folder: str) -> Any:
    """The naive forms of flash-linear-attention, which need no Triton.

    Raises:
        Unavailable: if it is not installed.
    """
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        raise Unavailable("fla-core is not installed")
    path = Path(next(iter(found.submodule_search_locations))) / "ops" / folder / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{folder}", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_close(found: Tensor, exact: Tensor, dtype: str) -> None:
    """Raise AssertionError if ``found`` is off by more than rounding."""
    off = float((found.double() - exact.double()).norm() / exact.double().norm())
    if not off <= (TOLERANCE if dtype == "float32" else 20 * TOLERANCE):
        raise AssertionError(f"outputs are off by {off:.3g}")


@dataclasses.dataclass(frozen=True)
class Text(Case):
    """One op on a text of ``tokens``, without gradients, in each of its forms.

    flops are those of the kernel's products, for each token and head. The delta rule has 6 D^2 with the state and, in
    chunks of C tokens, 4 C D within the chunk. A layer of I x O of a memory has 6 I O (its outputs for keys and for
    queries, and the update) and b (I + O) within the mini-batch, and 2 I O more where a gradient passes through it.
    Momentum has 4 I O more: queries are multiplied with the velocity too, which is updated as the weights are.
    LaCT's three weights have 18 D F, and Newton-Schulz steps at the end of each chunk; In-Place TTT has 4 D^2.
    """

    suite = "sequence"
    baseline = "token by token"
    forward = None

    op: str
    tokens: int
    heads: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.op}: T = {self.tokens}, {self.heads} heads of {self.width}"

    @property
    def ceiling(self) -> str | None:
        return "matmul"

    def bytes(self, contender: str) -> int | None:
        return None

    def flops(self, contender: str) -> int | None:
        if self.op == "gated delta rule":
            each = 6 * self.width**2 + 4 * CHUNK * self.width
        elif self.op == IN_PLACE:
            each = 4 * self.width**2
        elif self.op == LACT:
            inner = LACT_EXPANSION * self.width
            ends = 3 * NEWTON_SCHULZ * (4 * self.width**2 * inner + 2 * self.width**3)
            each = 18 * self.width * inner + ends // LARGE_CHUNK
        else:
            sizes = layer_sizes(self.op, self.width)
            each = sum(6 * i * o + MINI_BATCH * (i + o) for i, o in sizes) + sum(2 * i * o for i, o in sizes[1:])
            each += sum(4 * i * o for i, o in sizes) if self.op == TITANS else 0
        return self.tokens * self.heads * each

    def ceilings(self) -> dict[str, Callable[[], Contender]]:
        return {"matmul": lambda: square_ceiling(self.device, self.dtype)}

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        x = inputs_of(self.op, self.device, self.dtype, 1, self.tokens, self.heads, self.width)

        @functools.cache
        def exact() -> Tensor:
            return run_op(self.op, x, "reference")[0]

        def contender(run: Callable[[], Tensor], graph: bool = True) -> Contender:
            def guarded() -> Tensor:
                with torch.no_grad():
                    return run()

            return Contender(guarded, lambda: check_close(guarded(), exact(), self.dtype), graph=graph)

        def of(form: str) -> Callable[[], Contender]:
            # A graph of every token's launches would take longer to make than to run.
            return lambda: contender(lambda: run_op(self.op, x, form)[0], graph=form != "reference")

        found = {"ttt": of("auto"), "torch, in chunks": of("chunk"), "token by token": of("reference")}
        if self.op == "gated delta rule":

            def fla() -> Contender:
                naive = fla_naive("gated_delta_rule").naive_chunk_gated_delta_rule
                given = (x.q, x.k, x.v, x.gate, x.rate)
                return contender(lambda: naive(*given, chunk_size=64, output_final_state=True)[0])

            found["fla, naive chunks"] = fla
        return found


@dataclasses.dataclass(frozen=True)
class Token(Case):
    """One decoding step of ``batch`` sequences. Bytes are those of the states that it reads or writes, each once."""

    suite = "sequence"
    baseline = "torch"
    forward = None

    op: str
    batch: int
    heads: int
    width: int

    @property
    def name(self) -> str:
        return (
            f"{self.op}: a token of {self.batch} sequence{'s' * (self.batch > 1)}, {self.heads} heads of {self.width}"
        )

    def bytes(self, contender: str) -> int | None:
        """A memory reads the weights at the beginning of the mini-batch too, and writes them at its end.

        That of Titans also reads and writes the momentum. With large chunks the weights are read, and sums of the same
        size read and written; the ends of chunks are left out.
        """
        if self.op == "gated delta rule":
            return 2 * 4 * self.batch * self.heads * self.width**2
        if self.op in (LACT, IN_PLACE):
            return 3 * 4 * self.batch * self.heads * sum(i * o for i, o in layer_sizes(self.op, self.width))
        state = 4 * self.batch * self.heads * sum(i * o for i, o in layer_sizes(self.op, self.width))
        moved = 2 * (self.op == TITANS)
        return round(state * (2 + moved + (MINI_BATCH - 1) / MINI_BATCH + 1 / MINI_BATCH))

    def flops(self, contender: str) -> int | None:
        return None

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        x = inputs_of(self.op, self.device, self.dtype, self.batch, 1, self.heads, self.width)
        q, k, v, rate, gate = (t[:, 0] for t in (x.q, x.k, x.v, x.rate, x.gate))

        def make(form: str) -> Contender:
            state: Any
            options: Any = {}
            if self.op == "gated delta rule":
                state = torch.zeros(self.batch, self.heads, self.width, self.width, device=self.device)
            elif self.op in (LACT, IN_PLACE):
                state = ops.new_large_chunk_state(x.weights, self.batch, self.op == LACT, self.op == LACT)
                if self.op == LACT:
                    options = {name: t[:, 0] for name, t in large_chunk_options(x).items()}
            else:
                state = ops.new_memory_state(x.weights, self.batch, self.op == TITANS)
                options = {name: t[:, 0] if isinstance(t, Tensor) else t for name, t in options_of(self.op, x).items()}

            def run() -> Tensor:
                with torch.no_grad():
                    if self.op in (LACT, IN_PLACE):
                        return self._large_chunk(form, state, (q, k, v, rate), options)
                    if self.op == "gated delta rule":
                        if form == "ttt":
                            return ops.gated_delta_rule_step(q, k, v, rate, gate, state=state)
                        given: Any = [t.float() for t in (q, k, v, rate, gate)] + [state, self.width**-0.5]
                        return ops.delta_rule.step_(*given).to(q.dtype)
                    if form == "ttt":
                        return ops.memory_step(q, k, v, rate, state=state, mini_batch=MINI_BATCH, **options)
                    wide = [t.float() for t in (q, k, v, rate)]
                    factors = [options.get(name) for name in ("gate", "momentum")]
                    given = [*wide, *factors, state, options.get("norm"), MINI_BATCH]
                    return ops.dual_form.step_(*given).to(q.dtype)

            first = run_op(self.op, x, "reference")[0][:, 0]
            found = run()
            return Contender(run, lambda: check_close(found, first, self.dtype))

        return {"ttt": lambda: make("ttt"), "torch": lambda: make("torch")}

    def _large_chunk(self, form: str, state: Any, token: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor:
        """The step; in the form "torch" as a text of one token, whose updates are made before they are added."""
        q, k, v, rate = token
        given: dict[str, Any] = {"chunk_size": LARGE_CHUNK, "state" if form == "ttt" else "initial_state": state}
        if form == "ttt":
            if self.op == LACT:
                return ops.lact_step(q, k, v, **options, **given)
            return ops.in_place_ttt_step(q, k, v, rate, **given)
        qs, ks, vs, rates = (t.unsqueeze(1) for t in (q, k, v, rate))
        weights = [w[0] for w in state.weights]
        if self.op == LACT:
            named = {name: t.unsqueeze(1) for name, t in options.items()}
            return ops.lact(qs, ks, vs, weights=weights, **named, **given, form="chunk")[0][:, 0]
        return ops.in_place_ttt(qs, ks, vs, rates, weights[0], **given, form="chunk")[0][:, 0]


@dataclasses.dataclass(frozen=True)
class Prefill(TimedCase):
    """TTT-Linear on a text of ``tokens`` beside torch's causal attention with the same heads."""

    suite = "sequence"
    baseline = "attention"
    forward = None

    tokens: int
    heads: int
    width: int

    @property
    def name(self) -> str:
        return f"prefill: T = {self.tokens}, {self.heads} heads of {self.width}"

    def ceilings(self) -> dict[str, Callable[[], Contender]]:
        return {}

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        memory, delta = (
            inputs_of(op, self.device, self.dtype, 1, self.tokens, self.heads, self.width)
            for op in ("TTT-Linear", "gated delta rule")
        )

        def contender(run: Callable[[], Tensor]) -> Contender:
            def guarded() -> Tensor:
                with torch.no_grad():
                    return run()

            return Contender(guarded, lambda: None)

        def attend() -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (delta.q, delta.k, delta.v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        return {
            "ttt": lambda: contender(lambda: run_op("TTT-Linear", memory, "auto")[0]),
            "gated delta rule": lambda: contender(lambda: run_op("gated delta rule", delta, "auto")[0]),
            "attention": lambda: contender(attend),
        }


def cases(device: str) -> list[Case]:
    """Texts of 2048 tokens, tokens of 1 and 64 sequences, and texts of 64 to 8192 tokens beside attention."""
    found: list[Case] = []
    for op in OPS:
        for heads, width in ((16, 64), (8, 128)):
            for dtype in ("float32", "bfloat16"):
                quick = (op, width, dtype) == (OPS[0], 64, "float32")
                found.append(Text(device, dtype, op, 2048, heads, width, quick=quick))
            found += [Token(device, "float32", op, batch, heads, width) for batch in (1, 64)]
    return found + [Prefill(device, "float32", tokens, 16, 64) for tokens in (64, 128, 512, 2048, 8192)]
