"""Settings of the defences against forgetting, and of the low-rank weights of users.

Each defence is a frozen dataclass. ``TTTConfig(protect=[EWC(0.003), LayerReplay(4)])`` combines several, and all of
them act in the same commit (`ttt.ops.commit`).

Layers read the settings under flat names, such as ``config.ewc_lambda`` for the strength of the penalty. Every flat
name always has a value; where a defence is off, it is the one in `OFF`. `flatten` turns defences into flat settings,
and `build` turns flat settings back into defences.
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
    """The flat name of each setting, by the setting's own name."""
    switch: ClassVar[str] = ""
    """The flat name of the setting that is 0 where the defence is off."""

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
        labels: for which labels `ttt.Learner.calibrate` takes the gradients: ``"true"``, labels drawn from the model's
            own output, or ``"empirical"``, the tokens of the text.
        consolidate_decay: in [0, 1], the factor by which `ttt.Learner.consolidate` multiplies the old importance.
        trace_every: N >= 1. Of every N consecutive tokens, one is drawn at random, and its squared gradient enters the
            trace N times. The trace is then unbiased, and its matrix product has 1 / N of the rows.
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
    """Synaptic intelligence: a weight's importance is how much its own changes have lowered the loss.

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
    """Memory aware synapses: a weight's importance is how much the squared norm of the output changes with it.

    Aljundi et al., ECCV 2018. The trace costs a second backward pass of every chunk.

    Args:
        strength: lambda >= 0 of the penalty strength/2 sum Omega (W - W*)^2 per token, with Omega of mean 1.
        trace_decay: in (0, 1], decay of the trace per token.
        consolidate_decay: in [0, 1], the factor by which `ttt.Learner.consolidate` multiplies the old importance.
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
    """Each commit pulls the layer's outputs on remembered inputs to those of the anchor.

    What is remembered are inputs of the layer, not texts or labels, and no further forward pass is needed.

    Args:
        rows: R, how many remembered inputs each commit replays. The ``rows`` of all defences together are at most 64.
        strength: beta, the share of the drift on the replayed inputs that one commit takes back; stable in (0, 2).
            Equal for all defences that have ``rows``.
        ridge: eps, what is added to the diagonal of X_r X_r^T before it is inverted, in units of the mean squared norm
            of the replayed inputs X_r. Equal for all defences that have ``rows``.
    """

    flat: ClassVar[Mapping[str, str]] = {
        "rows": "replay_rows",
        "strength": "replay_beta",
        "ridge": "replay_eps",
    }
    switch = "replay_rows"


@dataclasses.dataclass(frozen=True)
class LayerDistillation(_Rows):
    """Each commit pulls the layer's outputs on some of the inputs that it writes to those of the anchor.

    This is Learning without Forgetting (Li & Hoiem, ECCV 2016), applied to each layer. No input is kept.

    Args:
        rows: how many inputs of each commit are replayed. The ``rows`` of all defences together are at most 64.
        strength, ridge: as in `LayerReplay`; equal for all defences that have ``rows``.
    """

    flat: ClassVar[Mapping[str, str]] = {"rows": "distill_rows", "strength": "replay_beta", "ridge": "replay_eps"}
    switch = "distill_rows"


@dataclasses.dataclass(frozen=True)
class LayerGenerativeReplay(_Rows):
    """Each commit pulls the layer's outputs on generated inputs to those of the anchor.

    This is generative replay (Shin et al., NeurIPS 2017), applied to each layer. The inputs are drawn from a low-rank
    Gaussian that is fitted to the layer's past inputs (`ttt.nn.gaussian`). No input is kept.

    Args:
        rows: how many inputs are drawn at each commit. The ``rows`` of all defences together are at most 64.
        strength, ridge: as in `LayerReplay`; equal for all defences that have ``rows``.
        rank: number of principal directions of the Gaussian.
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
    """Updates do not change a layer's outputs along the principal directions of remembered inputs.

    The rows of U (k, n) are those directions. Inputs enter the window as x - U^T U x (`ttt.ops.project_out`). So the
    output on an input that is a combination of the rows of U stays as it is (Saha et al., "Gradient Projection
    Memory", ICLR 2021). `ttt.Learner.calibrate` and `ttt.Learner.consolidate` compute U anew. The trace and ``clip``
    use the projected inputs.

    Args:
        directions: k, at most half of the layer's inputs: a layer with n inputs takes min(k, n // 2) directions.
    """

    flat: ClassVar[Mapping[str, str]] = {"directions": "orthogonal"}
    switch = "orthogonal"

    directions: int = 32

    def __post_init__(self) -> None:
        self._whole("directions", 0)


@dataclasses.dataclass(frozen=True)
class KroneckerFisher(Defence):
    """Updates are damped along the principal directions of a Kronecker-factored Fisher information.

    A token's input x and gradient delta enter the update as (A + eps)^-p x and (B + eps)^-p delta, where A and B are
    the second moments of the layer's inputs and of the gradients at its outputs on text that the model knows; see
    `ttt.nn.kronecker` for the formula and its sources. An update stays one row. Directions with large eigenvalues are
    left alone, as by `OrthogonalUpdates`. `ttt.Learner.calibrate` measures A and B, and
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

    directions: int = 64
    power: float = 1.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        self._whole("directions", 0)
        self._number("power", 0.0, 1.0, above=True)
        self._number("damping", 0.0)


@dataclasses.dataclass(frozen=True)
class Decay(Defence):
    """All weights are pulled to the anchor with the same strength; no importance is needed.

    This is the forget gate of Titans (Behrouz et al. 2024), towards the anchor instead of zero.

    Args:
        strength: s >= 0. A token with the step size eta divides the distance W - W* by 1 + eta s. Together with a
            penalty of strength lambda, the divisor is 1 + eta (lambda Omega + s).
    """

    flat: ClassVar[Mapping[str, str]] = {"strength": "decay"}
    switch = "decay"

    strength: float = 0.0

    def __post_init__(self) -> None:
        self._number("strength", 0.0)


@dataclasses.dataclass(frozen=True)
class DriftBudget(Defence):
    """The change of the weights is kept within a budget, however much is learnt.

    The KL of the model from the one before learning is estimated from the norms of the changes of the layers' weights
    and the size of gradients at calibration (`ttt.nn.budget`), which takes no forward pass. Up to half of the budget
    nothing is done. Beyond that steps become smaller, and a change that would leave the budget is scaled back to it:
    what was learnt long ago fades slowly, and something new can still be learnt. Needs ``rate="decrease"``.

    Args:
        nats: >= 0, the budget, or 0 for none: estimated KL in nats per token, summed over the layers. The estimate is
            too low by a factor that depends on the text; on English it was about 10 to 15 for SmolLM2.
        slowest: in [0, 1], the smallest factor of the steps. With 0 nothing more is learnt once the budget is full;
            with 1 steps keep their size, and new text soon displaces what was learnt before.
    """

    flat: ClassVar[Mapping[str, str]] = {"nats": "budget", "slowest": "budget_slowest"}
    switch = "budget"

    nats: float = 0.0009
    slowest: float = 0.25

    def __post_init__(self) -> None:
        self._number("nats", 0.0)
        self._number("slowest", 0.0, 1.0)


KINDS: dict[str, type[Defence]] = {
    kind.__name__: kind
    for kind in (EWC, SI, MAS, LayerReplay, LayerDistillation, LayerGenerativeReplay, OrthogonalUpdates,
                 KroneckerFisher, Decay, DriftBudget)
}  # fmt: skip
"""Every defence by name."""

PENALTIES: dict[str, type[_Penalty]] = {kind.kind: kind for kind in (EWC, SI, MAS)}
"""Every penalty, by the name of what its trace accumulates."""

OFF: dict[str, Any] = {
    "importance": "fisher", "fisher": "true", "ewc_lambda": 0.0, "consolidate_decay": 1.0, "trace_decay": 1.0,
    "trace_every": 1, "si_xi": 1e-3, "replay_rows": 0, "distill_rows": 0, "generated_rows": 0, "generated_rank": 16,
    "replay_beta": 0.1, "replay_eps": 1e-3, "orthogonal": 0, "kronecker": 0, "kronecker_power": 1.0,
    "kronecker_damping": 0.0, "decay": 0.0, "budget": 0.0, "budget_slowest": 0.25,
}  # fmt: skip
"""The flat settings where no defence is on."""

SWITCHES: dict[str, Any] = {kind.switch: OFF[kind.switch] for kind in KINDS.values()}
"""The flat settings that switch a defence on or off, each with the value that means off."""


def flatten(protect: Iterable[Defence]) -> dict[str, Any]:
    """The values of all flat settings for these defences; settings of other defences are as in `OFF`.

    Raises:
        ValueError: if an element is not a defence, if two defences exclude each other, if two need different values of
            one flat setting, or if they replay more than 64 rows in all.
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
            "protect cannot combine KroneckerFisher and MAS: calibration differentiates the loss for one, and the "
            "squared logits for the other"
        )
    rows = [found.get(name, 0) for name in ("replay_rows", "distill_rows", "generated_rows")]
    if sum(rows) > MAX_REPLAY_ROWS:
        raise ValueError(
            f"replay_rows + distill_rows + generated_rows must be at most {MAX_REPLAY_ROWS}, got "
            f"{rows[0]} + {rows[1]} + {rows[2]}"
        )
    return OFF | found


def build(flat: Mapping[str, Any]) -> tuple[Defence, ...]:
    """The defences that these flat settings switch on; the inverse of `flatten`.

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
    """Number and size of the low-rank weights B_u^T A_u of users u, for ``TTTConfig(per_user=...)``.

    For each slot, a layer of m x n allocates A_u with (rank + window) x n and B_u with (rank + window) x m numbers.

    Args:
        slots: S, the largest number of users whose weights are in memory at the same time.
        rank: r, number of rows of A_u and B_u after a compression.
        window: C, number of rows that tokens may add, one each, before the r + C rows of a slot are compressed to r.

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
