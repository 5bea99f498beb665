"""`Snapshot`: copies of a learner's state, taken and put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ttt.atomic import whole_write
from ttt.checks import check_type
from ttt.learn.episodes import EpisodeLog
from ttt.learn.stream_rule import StreamRule
from ttt.nn import Linear


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Copies of all learning state, from `ttt.Learner.snapshot`.

    Attributes:
        layers: of each layer, its state (`ttt.nn.Linear`) by name.
        bases: of each layer, what `ttt.Learner.reset` goes back to after a consolidation; empty before the first.
        rules: of each rule, its class and its state.
        episodes: what the log held; None without a log.
    """

    layers: list[dict[str, Tensor]]
    bases: list[dict[str, Tensor]]
    rules: list[tuple[type[StreamRule], Any]] = dataclasses.field(default_factory=list)
    episodes: dict[str, Tensor] | None = None


def take_snapshot(layers: Sequence[Linear], rules: Sequence[StreamRule], log: EpisodeLog | None) -> Snapshot:
    """A snapshot of ``layers``, ``rules`` and ``log``."""
    # Shared tensors and bases are never written in place: they need no copy.
    states = [{name: t if name in layer.shared else t.clone() for name, t in layer.state().items()} for layer in layers]
    held = None if log is None else log.export(None)
    return Snapshot(
        states, [dict(layer.base) for layer in layers], [(type(rule), rule.state()) for rule in rules], held
    )


def check_snapshot(snapshot: Snapshot, layers: Sequence[Linear], rules: Sequence[StreamRule]) -> None:
    """Raise an error unless ``layers`` and ``rules`` can be given the state in ``snapshot``.

    Raises:
        TypeError: if ``snapshot`` is none.
        ValueError: if it is of layers of other shapes, or of other rules, or a capturable layer cannot take its window
            (`ttt.nn.Linear.capturable_`).
    """
    check_type("snapshot", snapshot, Snapshot, "what Learner.snapshot returns")
    shapes = [{name: t.shape for name, t in layer.state().items()} for layer in layers]
    if [{name: t.shape for name, t in state.items()} for state in snapshot.layers] != shapes:
        raise ValueError("snapshot does not fit this model's learning layers; nothing was changed")
    if (kinds := [type(rule) for rule in rules]) != [kind for kind, _ in snapshot.rules]:
        raise ValueError(
            f"snapshot must be of a learner with the rules {[kind.__name__ for kind in kinds]}, "
            f"got {[kind.__name__ for kind, _ in snapshot.rules]}; nothing was changed"
        )
    for layer, state in zip(layers, snapshot.layers, strict=True):
        layer.check_state(state)


def put_back(snapshot: Snapshot, layers: Sequence[Linear], rules: Sequence[StreamRule], log: EpisodeLog | None) -> None:
    """Give ``layers``, ``rules`` and ``log`` the state in ``snapshot``, which `check_snapshot` has found to fit."""
    with whole_write(layers, "Learner.rollback"):
        for layer, state, base in zip(layers, snapshot.layers, snapshot.bases, strict=True):
            layer.load_state(state)
            layer.base = dict(base)
            layer.loads += 1
        for rule, (_, held) in zip(rules, snapshot.rules, strict=True):
            rule.load_state(held)
        if log is not None and snapshot.episodes is not None:
            log.load(None, snapshot.episodes)
