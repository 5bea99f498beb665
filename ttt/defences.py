"""Parts of a `ttt.TTTConfig`: the defences against forgetting, and low-rank weights of every user's own.

Each defence is a small frozen dataclass; ``TTTConfig(protect=[EWC(0.003), LayerReplay(4)])`` combines them in one
commit (`ttt.ops.commit`). The layers read the same settings under flat names (``config.ewc_lambda``), one number
each, whichever defences are on: `flatten` makes them, `build` is its inverse.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from ttt.checks import MOST_ROWS, check_choice, check_number, check_whole
from ttt.ops.schema import MAX_REPLAY_ROWS


@dataclasses.dataclass(frozen=True)
class Defence:
    """One protection against forgetting, as ``TTTConfig(protect=[...])`` takes it.

    Raises:
        ValueError: for a value out of range; it names the setting, the value and what is allowed.
    """

    flat: ClassVar[Mapping[str, str]] = {}
    """Name of each setting -> its flat name."""
    switch: ClassVar[str] = ""
    """The flat name that is 0 where the defence is off."""

    def _number(self, name: str, low: float, high: float = math.inf, *, above: bool = False) -> None:
        check_number(f"{type(self).__name__}.{name}", getattr(self, name), low, high, above=above, finite=True)

    def _whole(self, name: str, low: int, high: int | None = None) -> None:
        check_whole(f"{type(self).__name__}.{name}", getattr(self, name), low, high)

    def _choice(self, name: str, allowed: tuple[str, ...]) -> None:
        check_choice(f"{type(self).__name__}.{name}", getattr(self, name), allowed)


@dataclasses.dataclass(frozen=True)
class _Penalty(Defence):
    """The penalty strength/2 sum Omega (W - W*)^2 per token, with Omega of mean 1; see `ttt.ops.commit`."""

    kind: ClassVar[str]
    switch = "ewc_lambda"

    strength: float = 0.003
    trace_decay: float = 1.0

    def __post_init__(self) -> None:
        self._number("strength", 0.0)
        self._number("trace_decay", 0.0, 1.0, above=True)


@dataclasses.dataclass(frozen=True)
class EWC(_Penalty):
    """Elastic weight consolidation: weights are pulled to the anchor in proportion to their Fisher information.

    Kirkpatrick et al., PNAS 2017, in the online form of Schwarz et al., ICML 2018. The penalty is
    strength/2 sum Omega (W - W*)^2 per token, with Omega of mean 1; the trace holds squared gradients, token by token.

    Args:
        strength: lambda >= 0.
        trace_decay: gamma in (0, 1], decay of the trace per token.
        labels: what `ttt.Learner.calibrate` differentiates: ``"true"`` (labels drawn from the model's own output) or
            ``"empirical"`` (the given ones).
        consolidate_decay: in [0, 1], what `ttt.Learner.consolidate` keeps of the old importance.
        trace_every: of each so many consecutive tokens one, drawn at random, stands for all in the trace. The estimate
            is unbiased, and its matrix product costs that much less.
    """

    kind = "fisher"
    flat: ClassVar[Mapping[str, str]] = {
        "strength": "ewc_lambda", "trace_decay": "trace_decay", "labels": "fisher",
        "consolidate_decay": "consolidate_decay", "trace_every": "trace_every",
    }  # fmt: skip

    labels: str = "true"
    consolidate_decay: float = 1.0
    trace_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("labels", ("true", "empirical"))
        self._number("consolidate_decay", 0.0, 1.0)
        self._whole("trace_every", 1)


@dataclasses.dataclass(frozen=True)
class SI(_Penalty):
    """Synaptic intelligence: importance is the loss that each weight's movement has saved.

    Zenke, Poole & Ganguli, ICML 2017: the trace adds up -dL/dW (W_new - W_old), and a consolidation adds
    relu(F / ((W - W*)^2 + damping)) to Omega.

    Args:
        strength: lambda >= 0 of the penalty strength/2 sum Omega (W - W*)^2 per token, with Omega of mean 1.
        trace_decay: in (0, 1], decay of the trace per token.
        damping: xi > 0, in units of a squared weight.
    """

    kind = "si"
    flat: ClassVar[Mapping[str, str]] = {"strength": "ewc_lambda", "trace_decay": "trace_decay", "damping": "si_xi"}

    damping: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._number("damping", 0.0, above=True)


@dataclasses.dataclass(frozen=True)
class MAS(_Penalty):
    """Memory aware synapses: importance is how much each weight moves the squared norm of the model's output.

    Aljundi et al., ECCV 2018. The trace costs a second backward pass of every chunk.

    Args:
        strength: lambda >= 0 of the penalty strength/2 sum Omega (W - W*)^2 per token, with Omega of mean 1.
        trace_decay: in (0, 1], decay of the trace per token.
        consolidate_decay: in [0, 1], what `ttt.Learner.consolidate` keeps of the old importance.
    """

    kind = "mas"
    flat: ClassVar[Mapping[str, str]] = {
        "strength": "ewc_lambda",
        "trace_decay": "trace_decay",
        "consolidate_decay": "consolidate_decay",
    }

    consolidate_decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._number("consolidate_decay", 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class _Rows(Defence):
    """Inputs on which each commit pulls the layer's outputs to those of the anchor; see `ttt.ops.commit`."""

    rows: int = 4
    strength: float = 0.1
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        self._whole("rows", 0, MAX_REPLAY_ROWS)
        self._number("strength", 0.0)
        self._number("ridge", 0.0)


@dataclasses.dataclass(frozen=True)
class LayerReplay(_Rows):
    """Each commit is checked against remembered inputs of the layer: its outputs on them are pulled to the anchor's.

    No label and no sample of the model's input is kept, and there is no further forward pass.

    Args:
        rows: R, remembered inputs replayed at each commit. All defences together may have 64 rows.
        strength: beta of the projection step, stable in (0, 2). Defences that add rows share one strength and ridge.
        ridge: relative to the mean squared norm of the replayed inputs.
    """

    flat: ClassVar[Mapping[str, str]] = {
        "rows": "replay_rows",
        "strength": "replay_beta",
        "ridge": "replay_eps",
    }
    switch = "replay_rows"


@dataclasses.dataclass(frozen=True)
class LayerDistillation(_Rows):
    """Each commit pulls the layer's outputs on some of the inputs that it learns from to those of the anchor.

    Learning without Forgetting (Li & Hoiem, ECCV 2016) layer by layer: nothing is kept but the anchor.

    Args:
        rows: inputs of each commit that are used. All defences together may have 64 rows.
        strength: beta of the projection step, stable in (0, 2). Defences that add rows share one strength and ridge.
        ridge: relative to the mean squared norm of the rows.
    """

    flat: ClassVar[Mapping[str, str]] = {"rows": "distill_rows", "strength": "replay_beta", "ridge": "replay_eps"}
    switch = "distill_rows"


@dataclasses.dataclass(frozen=True)
class LayerGenerativeReplay(_Rows):
    """Each commit is checked against inputs drawn from a low-rank Gaussian of the layer's past inputs.

    Generative replay (Shin et al., NeurIPS 2017) layer by layer: no input is kept. See `ttt.nn.gaussian`.

    Args:
        rows: inputs drawn at each commit. All defences together may have 64 rows.
        strength: beta of the projection step, stable in (0, 2). Defences that add rows share one strength and ridge.
        ridge: relative to the mean squared norm of the rows.
        rank: principal directions of the Gaussian.
    """

    flat: ClassVar[Mapping[str, str]] = {
        "rows": "generated_rows",
        "strength": "replay_beta",
        "ridge": "replay_eps",
        "rank": "generated_rank",
    }
    switch = "generated_rows"

    rank: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("rank", 1, MOST_ROWS)


@dataclasses.dataclass(frozen=True)
class OrthogonalUpdates(Defence):
    """Updates leave the principal directions of remembered inputs alone.

    With the rows of U spanning those directions, inputs enter the window as x - U^T U x (`ttt.ops.project_out`), so no
    output on inputs in their span changes (Saha et al., "Gradient Projection Memory", ICLR 2021).
    `ttt.Learner.calibrate` and `ttt.Learner.consolidate` renew U. Trace and ``clip`` are of the projected inputs.

    Args:
        directions: k. A layer of n inputs leaves at most n // 2 alone: half of 256 cost 13 and 25 % of the gain on two
            texts.
    """

    flat: ClassVar[Mapping[str, str]] = {"directions": "orthogonal"}
    switch = "orthogonal"

    directions: int = 32

    def __post_init__(self) -> None:
        self._whole("directions", 0)


@dataclasses.dataclass(frozen=True)
class KroneckerFisher(Defence):
    """Updates are damped along the principal directions of a Kronecker-factored Fisher information.

    A token's input x and gradient delta enter the update as (A + eps)^-p x and (B + eps)^-p delta, where A and B are the
    second moments of the layer's inputs and of the gradients at its outputs on text that the model knows; see
    `ttt.nn.kronecker` for the formula and its sources. An update stays one row, and costs as much as
    `OrthogonalUpdates`, whose limit for large eigenvalues it is. `ttt.Learner.calibrate` measures A and B, and
    `ttt.Learner.consolidate` adds what was learnt. Trace, ``clip`` and ``burst`` are of the damped rows.

    Args:
        directions: k >= 0, principal directions that are kept of A and of B; at most half of a layer's inputs or
            outputs. All other directions count as their mean.
        power: p in (0, 1]. 1 is the natural gradient.
        damping: eps >= 0, in units of the mean eigenvalue.
    """

    flat: ClassVar[Mapping[str, str]] = {
        "directions": "kronecker",
        "power": "kronecker_power",
        "damping": "kronecker_damping",
    }
    switch = "kronecker"

    directions: int = 32
    power: float = 1.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        self._whole("directions", 0)
        self._number("power", 0.0, 1.0, above=True)
        self._number("damping", 0.0)


@dataclasses.dataclass(frozen=True)
class Decay(Defence):
    """All weights are pulled to the anchor alike: a forget gate, which needs no importance.

    Args:
        strength: per token and unit of ``lr``, as an addition of strength / lambda to Omega would be.
    """

    flat: ClassVar[Mapping[str, str]] = {"strength": "decay"}
    switch = "decay"

    strength: float = 0.0

    def __post_init__(self) -> None:
        self._number("strength", 0.0)


KINDS: dict[str, type[Defence]] = {
    kind.__name__: kind
    for kind in (EWC, SI, MAS, LayerReplay, LayerDistillation, LayerGenerativeReplay, OrthogonalUpdates,
                 KroneckerFisher, Decay)
}  # fmt: skip
"""Every defence by name."""

PENALTIES: dict[str, type[_Penalty]] = {kind.kind: kind for kind in (EWC, SI, MAS)}
"""What the trace accumulates -> the penalty that uses it."""

OFF: dict[str, Any] = {
    "importance": "fisher", "fisher": "true", "ewc_lambda": 0.0, "consolidate_decay": 1.0, "trace_decay": 1.0,
    "trace_every": 1, "si_xi": 1e-3, "replay_rows": 0, "distill_rows": 0, "generated_rows": 0, "generated_rank": 16,
    "replay_beta": 0.1, "replay_eps": 1e-3, "orthogonal": 0, "kronecker": 0, "kronecker_power": 1.0,
    "kronecker_damping": 0.0, "decay": 0.0,
}  # fmt: skip
"""The flat settings where no defence is on."""

SWITCHES: dict[str, Any] = {kind.switch: OFF[kind.switch] for kind in KINDS.values()}
"""The flat settings that switch defences, each with the value that switches it off."""


def flatten(protect: Iterable[Defence]) -> dict[str, Any]:
    """The flat settings of these defences.

    Raises:
        ValueError: if something is no defence, there are two of one kind, or two need different values of one setting.
    """
    found: dict[str, Any] = {}
    source: dict[str, str] = {}
    for defence in protect:
        name = type(defence).__name__
        if type(defence) not in KINDS.values():
            raise ValueError(f"protect must hold defences ({', '.join(KINDS)}), got {defence!r}")
        values = {flat: getattr(defence, own) for own, flat in defence.flat.items()}
        if isinstance(defence, _Penalty):
            values["importance"] = defence.kind
        for flat, value in values.items():
            if flat == defence.switch and flat in found:
                raise ValueError(f"protect must hold one of {source[flat]} and {name}, got both")
            if flat in found and found[flat] != value:
                pair = f"{source[flat]} and {name}"
                raise ValueError(f"protect cannot combine {pair}: they need {flat} = {found[flat]!r} and {value!r}")
            found[flat], source[flat] = value, name
    if found.get("kronecker") and found.get("orthogonal"):
        raise ValueError("protect must hold one of OrthogonalUpdates and KroneckerFisher, got both")
    if found.get("kronecker") and found.get("importance") == "mas":
        raise ValueError(
            "protect cannot combine KroneckerFisher and MAS: calibration differentiates the loss for one, and the squared "
            "logits for the other"
        )
    rows = [found.get(name, 0) for name in ("replay_rows", "distill_rows", "generated_rows")]
    if sum(rows) > MAX_REPLAY_ROWS:
        raise ValueError(
            f"replay_rows + distill_rows + generated_rows must be at most {MAX_REPLAY_ROWS}, got "
            f"{rows[0]} + {rows[1]} + {rows[2]}"
        )
    return OFF | found


def build(flat: Mapping[str, Any]) -> tuple[Defence, ...]:
    """The defences that are on under these flat settings; the inverse of `flatten`.

    Raises:
        ValueError: for a value out of range; it names the flat setting.
    """
    importance = flat["importance"]
    check_choice("importance", importance, tuple(PENALTIES))
    made = []
    for kind in KINDS.values():
        if issubclass(kind, _Penalty) and kind.kind != importance:
            continue
        try:
            defence = kind(**{own: flat[name] for own, name in kind.flat.items()})
        except ValueError as error:
            text = str(error)
            for own, name in kind.flat.items():
                text = text.replace(f"{kind.__name__}.{own} ", f"{name} ")
            raise ValueError(text) from None
        if flat[kind.switch]:
            made.append(defence)
    return tuple(made)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Low-rank weights B_u^T A_u of every user's own, for ``TTTConfig(per_user=...)``.

    A layer of m x n holds ``slots`` (rank + window) (m + n) numbers for them, whatever they learn.

    Args:
        slots: S, users whose weights are in memory at a time.
        rank: r, rows that a user's weights are compressed to.
        window: C, the latest tokens of a user, in effect with full rank until r + C rows are in use.

    Raises:
        ValueError: for a value out of range.
    """

    slots: int = 32
    rank: int = 16
    window: int = 64

    def __post_init__(self) -> None:
        for name in ("slots", "rank", "window"):
            check_whole(name, getattr(self, name), 1, MOST_ROWS)

    @property
    def capacity(self) -> int:
        """R = r + C, rows of a slot."""
        return self.rank + self.window
