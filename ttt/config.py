"""`TTTConfig`: which layers learn, and how."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ttt.checks import MOST_ROWS, Layers, check_choice, check_layers, check_names, check_number, check_whole
from ttt.defences import (
    KINDS,
    OFF,
    SWITCHES,
    Defence,
    KroneckerFisher,
    LowRank,
    build,
    flatten,
)
from ttt.frozen_map import FrozenMap

DEFAULT_PROTECTION: tuple[Defence, ...] = (KroneckerFisher(),)


class FlatSettings:
    """The settings of all defences under one flat name each, as the layers read them.

    A defence that is off has the value of `ttt.defences.OFF`.
    """

    _flat: Mapping[str, Any]

    @property
    def importance(self) -> str:
        """What the trace accumulates: "fisher", "si" or "mas"."""
        return self._flat["importance"]

    @property
    def fisher(self) -> str:
        """Labels that the calibration differentiates: "true" or "empirical"."""
        return self._flat["fisher"]

    @property
    def ewc_lambda(self) -> float:
        """lambda of the penalty; 0 keeps neither importance nor trace."""
        return self._flat["ewc_lambda"]

    @property
    def consolidate_decay(self) -> float:
        """gamma_c, what a consolidation keeps of the old importance."""
        return self._flat["consolidate_decay"]

    @property
    def trace_decay(self) -> float:
        """gamma, decay of the trace per token."""
        return self._flat["trace_decay"]

    @property
    def trace_every(self) -> int:
        """Of each so many tokens one stands for all in the trace."""
        return self._flat["trace_every"]

    @property
    def si_xi(self) -> float:
        """xi, the damping of synaptic intelligence."""
        return self._flat["si_xi"]

    @property
    def replay_rows(self) -> int:
        """Remembered inputs replayed at each commit."""
        return self._flat["replay_rows"]

    @property
    def distill_rows(self) -> int:
        """Inputs of the window itself replayed at each commit."""
        return self._flat["distill_rows"]

    @property
    def generated_rows(self) -> int:
        """Inputs replayed at each commit that are drawn from a Gaussian of past ones."""
        return self._flat["generated_rows"]

    @property
    def generated_rank(self) -> int:
        """Principal directions of that Gaussian."""
        return self._flat["generated_rank"]

    @property
    def replay_beta(self) -> float:
        """beta, strength of the replay step."""
        return self._flat["replay_beta"]

    @property
    def replay_eps(self) -> float:
        """Ridge of the replay step, relative to the mean squared norm of the rows."""
        return self._flat["replay_eps"]

    @property
    def orthogonal(self) -> int:
        """k, principal directions that updates leave alone."""
        return self._flat["orthogonal"]

    @property
    def kronecker(self) -> int:
        """k, principal directions of either factor of the Fisher information along which updates are damped."""
        return self._flat["kronecker"]

    @property
    def kronecker_power(self) -> float:
        """p, the power to which the inverse of the factors damps updates."""
        return self._flat["kronecker_power"]

    @property
    def kronecker_damping(self) -> float:
        """eps, added to the eigenvalues of the factors, in units of their mean."""
        return self._flat["kronecker_damping"]

    @property
    def decay(self) -> float:
        """Pull of all weights to the anchor, per token and unit of ``lr``."""
        return self._flat["decay"]

    @property
    def budget(self) -> float:
        """Estimated KL in nats within which the change of the weights is kept; 0 for no budget."""
        return self._flat["budget"]

    @property
    def budget_slowest(self) -> float:
        """The smallest factor by which a budget multiplies steps."""
        return self._flat["budget_slowest"]

    @property
    def commit_rows(self) -> int:
        """R of every commit, wherever its rows come from."""
        return self.replay_rows + self.distill_rows + self.generated_rows

    @property
    def calibrates(self) -> bool:
        """Whether a defence is on that `ttt.Learner.calibrate` measures something for."""
        return any(self._flat[name] for name in SWITCHES if name not in ("distill_rows", "decay", "budget"))


@dataclasses.dataclass(frozen=True)
class TTTConfig(FlatSettings):
    """Which layers learn, and how. Frozen: `dataclasses.replace` makes a changed copy.

    The defaults were measured to learn well and forget little (docs/choices.md). They need `ttt.Learner.calibrate`,
    with data that the model knows or with text that it writes itself. Without it the model learns all the same, but
    unprotected until `ttt.Learner.consolidate`, and `ttt.Learner` warns: importance, replay memory and directions are
    zeros, which have no effect, and the unit of ``rate`` comes from the stream alone.

    Args:
        target_modules: as in PEFT: a list of names or name suffixes, or one regular expression that the
            whole name must match, or ``"all-linear"``, which leaves out the output head, classifiers, routers of
            experts, adapters, tied weights, and all but the language model (`ttt.info` lists what was left out).
        layers: which blocks of a stack: ``"all"``, ``"last:0.25"`` (the last quarter, rounded up),
            ``"last:2"`` (the last two; the model must have as many), or a list of indices, negative ones counting from
            the end. The index of a module is the first number in its name. Each stack of blocks is counted by itself,
            and in a model with other parts, as a vision tower, only those of the language model are meant. A dictionary
            names the stacks: ``{"language_model": "last:0.25", "vision_tower": [0]}``.
        lr: step per token (eta), in the units of ``rate``. The loss is summed over tokens, so the rate does not depend
            on ``chunk`` or ``window`` to first order.
        window: C, tokens that are in effect before they are written into the weights.
        chunk: tokens that `ttt.Learner.observe` scores before it learns from them.
        rate: the unit of ``lr`` (`ttt.nn.rates`). ``"decrease"``: ``lr`` is in nats, the decrease of a typical token's
            own loss by its own update, to first order and summed over the layers of the model; it means the same for
            every model, whatever the scales of its weights, inputs and gradients. At each layer by itself:
            ``"constant"`` 1; ``"energy"`` 1 / the mean |x|^2 of its inputs (normalised least mean squares); ``"rms"``
            1 / the root mean square of its tokens' gradient norms |delta| |x|. Means are over all rows learnt, and
            those of the calibration.
        clip: bound on the norm of one token's gradient at one layer, |delta| |x|: a token above it learns at a
            rate smaller in proportion. With ``rate`` "decrease" and "rms" it is in units of the root mean square, so
            the default does not suit the other rates. None for no bound.
        burst: bound on the norm of the summed gradients of T tokens that are learnt at once, in units of sqrt(T) root
            mean squares; ordinary text has about 1 (`ttt.nn.rates`). None for no bound. Ignored unless ``rate`` is
            ``"decrease"`` or ``"rms"``.
        feedback: kappa, how much smaller a layer's steps become while they undo each other, down to 1/20 of what they
            would be (`ttt.nn.feedback`). 0 for no such feedback. Ignored unless ``rate`` is ``"decrease"`` or
            ``"rms"``, and with users.
        momentum: mu, what the update of one token keeps of that before: a velocity that the commit carries (Titans,
            Behrouz et al. 2024; see `ttt.ops.momentum`). In the end a token moves the weights by 1 / (1 - mu) times
            its gradient, so choose ``lr`` smaller accordingly. 0 keeps no velocity.
        protect: the defences against forgetting, any of `ttt.EWC`, `ttt.SI`, `ttt.MAS` (one of these three),
            `ttt.LayerReplay`, `ttt.LayerDistillation`, `ttt.LayerGenerativeReplay`, `ttt.Decay`, `ttt.DriftBudget`,
            and `ttt.KroneckerFisher` or `ttt.OrthogonalUpdates`. An empty list is plain gradient descent.
        per_user: `ttt.LowRank`: every user has low-rank weights of their own beside the model's, which never change
            (`ttt.nn.LowRankLinear`); ``window`` and what is said of the trace do not apply then. None: one set of
            weights for all.
        replay_capacity: K, inputs in the replay memory of each layer, for `ttt.LayerReplay` and
            `ttt.OrthogonalUpdates`.
        head_mass: probability that words left out of the gradient at the output head may have in sum, per token
            (`ttt.learn.head.input_gradient`). 0 for the exact gradient, which is always computed on a GPU, and with
            users where no C++ kernel applies.
        state_dtype: ``"float32"``, ``"bfloat16"`` or ``"8bit"`` (`ttt.ops.log8`; not with `ttt.SI`) for
            importance and trace. None: bfloat16 for 16-bit weights, float32 for others. 8 bits save memory; on CPUs
            they save no time, because encoding takes longer than moving the bytes that are saved.
        seed: of everything random: replay rows, reservoir, rounding, sampled labels.

    Raises:
        ValueError: for a value out of range; it names the argument, the value and what is allowed.
    """

    target_modules: Sequence[str] | str | None = None
    layers: Layers = "all"
    lr: float = 0.5
    window: int = 64
    chunk: int = 64
    rate: str = "decrease"
    clip: float | None = 3.0
    burst: float | None = 1.2
    feedback: float = 30.0
    momentum: float = 0.0
    protect: Sequence[Defence] = DEFAULT_PROTECTION
    per_user: LowRank | None = None
    replay_capacity: int = 4096
    head_mass: float = 0.01
    state_dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        check_number("lr", self.lr, 0.0, finite=True)
        check_whole("window", self.window, 1, MOST_ROWS)
        check_whole("chunk", self.chunk, 1)
        check_choice("rate", self.rate, ("constant", "energy", "rms", "decrease"))
        for name in ("clip", "burst"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0.0, above=True, finite=True)
        check_number("feedback", self.feedback, 0.0, finite=True)
        check_number("momentum", self.momentum, 0.0, 1.0, below=True)
        check_whole("replay_capacity", self.replay_capacity, 1, MOST_ROWS)
        check_number("head_mass", self.head_mass, 0.0, 0.5)
        if self.state_dtype is not None:
            check_choice("state_dtype", self.state_dtype, ("float32", "bfloat16", "8bit"))
        check_whole("seed", self.seed, 0, 2**63 - 1)
        check_names("target_modules", self.target_modules)
        check_layers("layers", self.layers)
        # Lists become tuples, so that a configuration is hashable and truly frozen.
        for name in ("target_modules", "layers"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                put(name, FrozenMap({k: v if isinstance(v, str) else tuple(v) for k, v in value.items()}))
            elif value is not None and not isinstance(value, str):
                put(name, tuple(value))
        if isinstance(self.protect, (Defence, str)) or not isinstance(self.protect, Sequence):
            raise ValueError(f"protect must be a list of defences, as [ttt.EWC(0.003)], got {self.protect!r:.80}")
        put("protect", build(flatten(self.protect)))  # without those that are switched off
        put("_flat", flatten(self.protect))
        if self.state_dtype == "8bit" and self.importance == "si":
            raise ValueError(f"state_dtype must be a float type for importance='si', got {self.state_dtype!r}")
        if self.budget and self.rate != "decrease":
            raise ValueError(f"rate must be 'decrease' with a DriftBudget, got {self.rate!r}")
        if self.per_user is not None:
            self._check_per_user()

    def _check_per_user(self) -> None:
        if not isinstance(self.per_user, LowRank):
            raise ValueError(f"per_user must be a ttt.LowRank or None, got {self.per_user!r}")
        for name in ("distill_rows", "generated_rows", "momentum", "decay"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} must be {type(getattr(self, name))(0)!r} with users, got {getattr(self, name)!r}"
                )
        if self.ewc_lambda > 0 and self.importance == "si":
            raise ValueError(
                "importance must be 'fisher' or 'mas' with users (SI needs a trace of each user), got 'si'"
            )

    @property
    def follows(self) -> bool:
        """Whether layers with one set of weights have feedback (`ttt.nn.feedback`)."""
        return self.feedback > 0 and self.lr > 0 and self.rate in ("decrease", "rms")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; each defence is a dictionary with its class's name under ``"defence"``."""
        out = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.layers, Mapping):
            out["layers"] = dict(self.layers)
        out["protect"] = [{"defence": type(d).__name__, **dataclasses.asdict(d)} for d in self.protect]
        out["per_user"] = None if self.per_user is None else dataclasses.asdict(self.per_user)
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TTTConfig:
        """The inverse of `to_dict`. It also reads flat settings, as files of the first format hold them.

        Flat settings (``ewc_lambda``, ``replay_rows``, ...; see `FlatSettings`) replace those of ``protect``, which is
        empty if only flat settings are given.

        Raises:
            ValueError: for a name that is no setting, or a value of a wrong type or out of range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a configuration must be a dictionary, got {type(values).__name__}")
        values = _without_removed(values)
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)} - set(OFF) - {"users"}
        if unknown:
            raise ValueError(f"unknown configuration fields {sorted(map(str, unknown))}")
        if "users" in values:
            values["per_user"] = values.pop("users")
        if isinstance(values.get("per_user"), Mapping):
            per_user = dict(values["per_user"])
            if per_user.pop("shrink", "truncate") != "truncate":
                raise ValueError(f"shrink must be 'truncate', got {values['per_user']['shrink']!r}, which was removed")
            values["per_user"] = _from_fields(LowRank, per_user, "per_user")
        if "protect" in values:
            values["protect"] = _read_defences(values["protect"])
        flat = {name: values.pop(name) for name in OFF if name in values}
        if flat:
            values["protect"] = build(_changed(flatten(values.get("protect", ())), flat))
        return cls(**values)

    def with_flat(self, **settings: Any) -> TTTConfig:
        """A changed copy; flat settings (``ewc_lambda=0.0``; see `FlatSettings`) may stand beside fields.

        Raises:
            ValueError: as the constructor, or for a name that is neither.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return type(self).from_dict(fields | settings)


# Settings of release 0.1 that are gone -> the one value that means what is done today.
_REMOVED = {"replay": "projection"}


def _without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without settings that no longer exist.

    Raises:
        ValueError: if one of them asks for what was removed.
    """
    for name, kept in _REMOVED.items():
        if name in values and values[name] != kept:
            raise ValueError(f"{name} must be {kept!r}, got {values[name]!r}, which was removed")
    return {name: value for name, value in values.items() if name not in _REMOVED}


def _changed(flat: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``flat`` settings with ``changes``; of the two defences that set a layer's directions, one asked for wins."""
    for name, other in (("orthogonal", "kronecker"), ("kronecker", "orthogonal")):
        if changes.get(name) and other not in changes:
            changes = {**changes, other: 0}
    return {**flat, **changes}


def _from_fields(kind: Any, values: Mapping[str, Any], what: str) -> Any:
    unknown = set(values) - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"unknown fields {sorted(map(str, unknown))} of {what}")
    return kind(**values)


def _read_defences(values: Any) -> list[Defence]:
    if isinstance(values, (str, Mapping, Defence)) or not isinstance(values, Sequence):
        raise ValueError(f"protect must be a list of defences, got {values!r}")
    made = []
    for value in values:
        if isinstance(value, Mapping):
            rest = dict(value)
            name = rest.pop("defence", None)
            if name not in KINDS:
                raise ValueError(f"defence must be one of {tuple(KINDS)}, got {name!r}")
            value = _from_fields(KINDS[name], rest, name)
        made.append(value)
    return made


def _take_old_names(init: Any) -> Any:
    """The constructor that also takes the flat settings and ``users`` of release 0.1, and warns."""

    @functools.wraps(init)
    def wrapped(self: TTTConfig, *args: Any, **kwargs: Any) -> None:
        kwargs = _without_removed(kwargs)
        flat = {name: kwargs.pop(name) for name in OFF if name in kwargs}
        if flat:
            warnings.warn(
                f"TTTConfig({', '.join(flat)}) is deprecated; name the defences: "
                "TTTConfig(protect=[ttt.EWC(0.003), ttt.LayerReplay(rows=4), ...])",
                DeprecationWarning,
                stacklevel=2,
            )
            kwargs["protect"] = build(_changed(flatten(kwargs.get("protect", DEFAULT_PROTECTION)), flat))
        if "users" in kwargs:
            warnings.warn("TTTConfig(users=...) is deprecated; use per_user=...", DeprecationWarning, stacklevel=2)
            kwargs["per_user"] = kwargs.pop("users")
        init(self, *args, **kwargs)

    return wrapped


TTTConfig.__init__ = _take_old_names(TTTConfig.__init__)  # type: ignore[method-assign]
