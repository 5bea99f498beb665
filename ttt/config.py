"""`TTTConfig`: how the adapted layers learn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ttt.ops.schema import KINDS, MAX_REPLAY_ROWS, REPLAY
from ttt.options import LowRank

DEFENCES = {
    "ewc_lambda": 0.0, "replay_rows": 0, "distill_rows": 0, "generated_rows": 0, "orthogonal": 0, "decay": 0.0,
}  # fmt: skip
"""The fields that protect what the anchor knows, each with the value that switches it off."""

# What weights of every user's own do without, and the value that says so.
_ALONE = {
    "distill_rows": 0, "generated_rows": 0, "momentum": 0.0, "decay": 0.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TTTConfig:
    """Which layers learn, and how. Frozen; a change needs `dataclasses.replace`.

    The defaults are what was found to learn well and forget little: steps in units of each layer's own gradients, which
    suit models of several sizes (``python -m bench.learning.experiments.transfer``), a weak penalty, a few replayed
    inputs and updates outside the principal directions of remembered ones, in one commit
    (``python -m bench.learning.experiments.tune``). They want
    `Learner.calibrate` with data that the model knows. Without it the model learns all the same, unprotected until
    `Learner.consolidate`, and `Learner` warns: importance, replay memory and directions are zeros, which pull nothing
    and take nothing out, and the scale of ``rate`` is that of the stream, the first token's step having the norm
    ``lr``. Without protection, about a third of the rate is best.

    Args:
        target_modules: as in PEFT: a list of names or name suffixes, or one regular expression that the
            whole name must match, or ``"all-linear"``.
        layers: which blocks of a stack: ``"all"``, ``"last:0.25"`` (the last quarter, rounded up),
            ``"last:2"`` (the last two), or a list of indices, negative ones counting from the end.
            The index of a module is the first number in its name.
        lr: step per token (eta), in the units of ``rate``. The loss is summed over tokens, so the rate does not depend
            on ``chunk`` or ``window`` to first order.
        window: C, tokens that are in effect before they are written into the weights.
        chunk: tokens that `Learner.observe` scores before it learns from them.
        rate: what ``lr`` is a multiple of, at each layer (`ttt.nn.rates`): ``"constant"`` 1; ``"energy"`` 1 / the mean
            |x|^2 of its inputs (normalised least mean squares); ``"rms"`` 1 / the root mean square of its tokens'
            gradient norms |delta| |x|. Means are over all rows learnt, and those of the calibration.
        clip: bound on the norm of one token's gradient at one layer, |delta| |x|: a token above it learns at a
            rate smaller in proportion. For ``rate="rms"`` in units of the root mean square, so that the default is none
            that suits the other rates. None for no bound.
        burst: bound on the norm of the gradients of T tokens that are learnt at once, in units of sqrt(T) root mean
            squares, of which ordinary text has about 1 (`ttt.nn.rates`). None for no bound. Of no account unless
            ``rate`` is "rms": nothing else has that unit.
        importance: what the trace accumulates: ``"fisher"`` (per-token squared gradients), ``"si"`` (Synaptic
            Intelligence) or ``"mas"`` (Memory Aware Synapses; costs a second backward pass).
        fisher: labels that `Learner.calibrate` uses: ``"true"`` (drawn from the model's output) or ``"empirical"``.
        ewc_lambda: strength of the penalty lambda/2 sum Omega (W - W*)^2 per token, Omega having mean 1.
            0 keeps neither importance nor trace.
        momentum: mu, what the update of one token keeps of that before: a velocity that the commit carries (Titans,
            Behrouz et al. 2024; see `ttt.ops.momentum`). In the end a token moves the weights by 1 / (1 - mu) times
            its gradient: choose ``lr`` smaller accordingly. 0 keeps no velocity.
        decay: pull of all weights to the anchor, per token and unit of ``lr``, as Omega + decay / ewc_lambda would:
            a forget gate. Needs no importance.
        consolidate_decay: gamma_c of online EWC: what `Learner.consolidate` keeps of the old importance.
        trace_decay: gamma, decay of the trace per token.
        trace_every: of each so many consecutive tokens one, drawn at random, stands for all in the trace: unbiased, and
            its product costs that much less.
        si_xi: xi, the damping of Synaptic Intelligence.
        replay_rows: R, remembered inputs replayed at each commit, at most 64; 0 for no replay.
        distill_rows: inputs of the window itself replayed at each commit: the layer's outputs on them are pulled to
            the anchor's (Learning without Forgetting, Li & Hoiem 2016, at the layer).
        generated_rows: inputs replayed at each commit that are drawn from a Gaussian of past ones; none is kept for it
            (`ttt.nn.gaussian`). replay_rows + distill_rows + generated_rows may be 64 at most.
        generated_rank: principal directions of that Gaussian.
        replay_capacity: K, inputs in the replay memory of each layer (of ``orthogonal``, too).
        replay: ``"projection"`` or ``"gradient"``; see `ttt.ops.commit`.
        replay_beta: beta, its strength; stable in (0, 2) for the projection. That of ``"gradient"`` is in units of eta.
        replay_eps: ridge of the projection, relative to the mean squared norm of the replayed inputs.
        orthogonal: k, principal directions of the remembered inputs that updates leave alone, 0 for none: with the rows
            of U spanning them, inputs enter the window as x - U^T U x (`ttt.ops.project_out`). A layer of n inputs
            leaves at most n // 2 alone: half of 256 cost 13 and 25 % of the gain on two texts. `Learner.calibrate` and
            `Learner.consolidate` renew U. Trace and ``clip`` are of the gradients that are applied. Without penalty and
            replay no output on inputs in the span changes (Saha et al., "Gradient Projection Memory", ICLR 2021).
        head_mass: probability that words left out of the gradient at the output head may have in sum, per token
            (`ttt.learn.head.input_gradient`); 0 for the exact gradient.
        state_dtype: ``"float32"``, ``"bfloat16"`` or ``"8bit"`` (`ttt.ops.log8`; not for ``importance="si"``) for
            importance and trace. None: bfloat16 for 16-bit weights, float32 for others.
        seed: of everything random: replay rows, reservoir, rounding, sampled labels.
        users: `ttt.LowRank`: every user has low-rank weights of their own beside the model's, which never change
            (`ttt.nn.LowRankLinear`); ``window`` and what is said of the trace do not apply then. None: one set of
            weights.

    Raises:
        ValueError: for a value out of range; it names the argument, the value and what is allowed.
    """

    target_modules: Sequence[str] | str | None = None
    layers: Sequence[int] | str = "all"
    lr: float = 0.07
    window: int = 64
    chunk: int = 64
    rate: str = "rms"
    clip: float | None = 3.0
    burst: float | None = 1.2
    importance: str = "fisher"
    fisher: str = "true"
    ewc_lambda: float = 0.003
    momentum: float = 0.0
    decay: float = 0.0
    consolidate_decay: float = 1.0
    trace_decay: float = 1.0
    trace_every: int = 1
    si_xi: float = 1e-3
    replay_rows: int = 4
    distill_rows: int = 0
    generated_rows: int = 0
    generated_rank: int = 16
    replay_capacity: int = 4096
    replay: str = "projection"
    replay_beta: float = 0.1
    replay_eps: float = 1e-3
    orthogonal: int = 32
    head_mass: float = 0.01
    state_dtype: str | None = None
    seed: int = 0
    users: LowRank | None = None

    def __post_init__(self) -> None:
        def need(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        def number(name: str, low: float, high: float = math.inf, *, above: bool = False) -> None:
            value = getattr(self, name)
            ok = isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
            need(name, ok and (value > low or not above), f"a number in {'(' if above else '['}{low}, {high}]")

        def whole(name: str, low: int, high: float = math.inf) -> None:
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
            need(name, ok, f"a whole number in [{low}, {high}]")

        def choice(name: str, allowed: tuple[str | None, ...]) -> None:
            need(name, getattr(self, name) in allowed, f"one of {allowed}")

        number("lr", 0.0)
        whole("window", 1)
        whole("chunk", 1)
        choice("rate", ("constant", "energy", "rms"))
        if self.clip is not None:
            number("clip", 0.0, above=True)
        if self.burst is not None:
            number("burst", 0.0, above=True)
        choice("importance", KINDS)
        choice("fisher", ("true", "empirical"))
        number("ewc_lambda", 0.0)
        number("momentum", 0.0)
        need("momentum", self.momentum < 1, "a number in [0.0, 1.0)")
        number("decay", 0.0)
        number("consolidate_decay", 0.0, 1.0)
        number("trace_decay", 0.0, 1.0, above=True)
        whole("trace_every", 1)
        number("si_xi", 0.0, above=True)
        for name in ("replay_rows", "distill_rows", "generated_rows"):
            whole(name, 0, MAX_REPLAY_ROWS)
        if self.commit_rows > MAX_REPLAY_ROWS:
            raise ValueError(
                f"replay_rows + distill_rows + generated_rows must be at most {MAX_REPLAY_ROWS}, got "
                f"{self.replay_rows} + {self.distill_rows} + {self.generated_rows}"
            )
        whole("generated_rank", 1)
        whole("replay_capacity", 1)
        choice("replay", REPLAY)
        number("replay_beta", 0.0)
        number("replay_eps", 0.0)
        whole("orthogonal", 0)
        number("head_mass", 0.0, 0.5)
        choice("state_dtype", (None, "float32", "bfloat16", "8bit"))
        need(
            "state_dtype",
            not (self.state_dtype == "8bit" and self.importance == "si"),
            "a float type for importance='si'",
        )
        whole("seed", 0, 2**63 - 1)
        need("users", self.users is None or isinstance(self.users, LowRank), "a ttt.LowRank or None")
        for name, none in _ALONE.items() if self.users is not None else ():
            need(name, getattr(self, name) == none, f"{none!r} with users")
        if self.users is not None and self.ewc_lambda > 0:
            need("importance", self.importance != "si", "'fisher' or 'mas' with users (SI needs a trace of each user)")
        # Lists become tuples, so that a configuration is hashable and truly frozen.
        for name in ("target_modules", "layers"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))

    @property
    def calibrates(self) -> bool:
        """Whether a defence is on that `Learner.calibrate` measures something for."""
        return any(getattr(self, name) for name in DEFENCES if name not in ("distill_rows", "decay"))

    @property
    def commit_rows(self) -> int:
        """R of every commit, wherever its rows come from."""
        return self.replay_rows + self.distill_rows + self.generated_rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TTTConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for a name that is not a field.
        """
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown configuration fields {sorted(unknown)}")
        if isinstance(values.get("users"), dict):
            values = {**values, "users": LowRank(**values["users"])}
        return cls(**values)
