"""The plugin's options, which come from the environment: vLLM passes it on to all of its processes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from ttt.checks import check_choice, check_number, check_whole, last_blocks
from ttt.conversation import MOST_PASSES, Telling

PREFIX = "TTT_VLLM_"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM serves; it allows 1, too, which is less than a user needs."""
STORING = 60.0
"""Seconds that the store has, at the end, to take what was learnt."""
RPC_METHODS = ("begin", "proceed", "cancel")


def enabled(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment has an option of the plugin, in capitals or not, or what looks like one.

    A server whose ``TTT_VLLM_STORE`` was mistyped or left empty would serve everybody without asking for a key; so any
    of the options switches the plugin on, and `Options` refuses to go on without a store.
    """
    return any(map(_is_ours, environment))


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``TTT_VLLM_{NAME}`` of the environment says; without it, the default.

    Attributes:
        store: URL or path of the `ttt.Store` of what users learn. Needed.
        keys: path of the file of API keys. Needed if ``identity`` is "keys".
        identity: "keys": an API key tells who asks (`ttt.serve.keys`). "header": a proxy in front of the server, which
            nobody can get around, has authenticated the user and tells it in the header ``x-ttt-user``.
        learn: whether a request of a user teaches that does not say so in the header ``x-ttt-learn``: "on" or "off".
        slots: users whose weights are in memory at the same time, and of whom requests run at the same time.
        rank, window: as in `ttt.LowRank`. vLLM's adapters have the next of `RANKS`, of rank + window or more.
        layers: the last blocks that learn: "last:0.25" is a quarter of them, "last:4" is four.
        lr: nats by which a token's update lowers its own loss (`ttt.TTTConfig`).
        passes, emphasis: how what users say is read, as in `ttt.conversation.Telling`.
        chunk: tokens that are learnt together, each of them scored before.
        slice: milliseconds that learning takes between two steps of the engine, about, while it answers others.
        lesson: largest number of tokens, with context, that are learnt of a request.
        captured: largest number of tokens whose hidden states wait for their request to end.
        lease: seconds of a lease on a user in the store.
        patience: seconds that a request waits for a slot, if all are in use.
        drain: seconds, after SIGTERM, in which what users have said may still be learnt.
        calibration: a file for what is measured of the base model at the first start; by default in
            ``~/.cache/ttt``.
        untested: names what may be used although it was not tested: "" or "gpu".
    """

    store: str
    keys: str = ""
    identity: str = "keys"
    learn: str = "on"
    slots: int = 8
    rank: int = 96
    window: int = 32
    layers: str = "last:0.25"
    lr: float = 0.5
    passes: int = Telling.passes
    emphasis: float = Telling.emphasis
    chunk: int = 128
    slice: float = 20.0
    lesson: int = 1024
    captured: int = 65536
    lease: float = 30.0
    patience: float = 30.0
    drain: float = 30.0
    calibration: str = ""
    untested: str = ""

    def __post_init__(self) -> None:
        if not self.store.strip():
            raise ValueError(
                f"TTT_VLLM_STORE must be the URL or path of a store for what users learn, got {self.store!r}; to start "
                f"vLLM without the plugin, leave out all variables {PREFIX}..."
            )
        check_choice("TTT_VLLM_IDENTITY", self.identity, ("keys", "header"))
        if (self.identity == "keys") != bool(self.keys):
            raise ValueError(
                "TTT_VLLM_KEYS must be the path of a file of API keys if, and only if, TTT_VLLM_IDENTITY is 'keys' "
                f"(the default), got {self.keys!r} with TTT_VLLM_IDENTITY={self.identity!r}"
            )
        check_choice("TTT_VLLM_LEARN", self.learn, ("on", "off"))
        check_choice("TTT_VLLM_UNTESTED", self.untested, ("", "gpu"))
        check_whole("TTT_VLLM_SLOTS", self.slots, 1, 4096)
        check_whole("TTT_VLLM_RANK", self.rank, 1)
        check_whole("TTT_VLLM_WINDOW", self.window, 1)
        if self.rank + self.window > RANKS[-1]:
            raise ValueError(
                f"TTT_VLLM_RANK + TTT_VLLM_WINDOW must be at most {RANKS[-1]}, got {self.rank} + {self.window}: "
                "vLLM serves no larger adapters"
            )
        if not isinstance(self.layers, str) or last_blocks(self.layers) is None:
            raise ValueError(f"TTT_VLLM_LAYERS must be as 'last:0.25' or 'last:4', got {self.layers!r}")
        check_number("TTT_VLLM_LR", self.lr, 0.0, finite=True)
        check_whole("TTT_VLLM_PASSES", self.passes, 1, MOST_PASSES)
        check_number("TTT_VLLM_EMPHASIS", self.emphasis, 0.0, 100.0, above=True)
        check_whole("TTT_VLLM_CHUNK", self.chunk, 1, 4096)
        check_number("TTT_VLLM_SLICE", self.slice, 0.0, 10_000.0)
        check_whole("TTT_VLLM_CAPTURED", self.captured, 2, 2**24)
        check_whole("TTT_VLLM_LESSON", self.lesson, 2)
        if self.lesson > self.captured:
            raise ValueError(
                f"TTT_VLLM_LESSON must be at most TTT_VLLM_CAPTURED, which is {self.captured}, got {self.lesson}"
            )
        check_number("TTT_VLLM_LEASE", self.lease, 1.0, 3600.0)
        check_number("TTT_VLLM_PATIENCE", self.patience, 0.0, 3600.0)
        check_number("TTT_VLLM_DRAIN", self.drain, 0.0, 3600.0)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Options:
        """The options in ``TTT_...`` of ``environment``.

        Raises:
            ValueError: for a value that is not allowed; it names the variable, the value and what is.
        """
        values: dict[str, Any] = {"store": ""}
        names = [PREFIX + field.name.upper() for field in dataclasses.fields(cls)]
        if unknown := sorted(name for name in environment if _is_ours(name) and name not in names):
            raise ValueError(f"{unknown[0]} is no option of the plugin; there are {', '.join(names)}")
        for name, field in zip(names, dataclasses.fields(cls), strict=True):
            text = environment.get(name, "")
            if text:
                values[field.name] = _parsed(name, text, type(field.default))
        return cls(**values)

    @property
    def telling(self) -> Telling:
        """How what users say is read."""
        return Telling(self.passes, self.emphasis)

    @property
    def adapter_rank(self) -> int:
        """The rank of vLLM's adapters."""
        return next(rank for rank in RANKS if rank >= self.rank + self.window)

    def blocks(self, of: int) -> range:
        """The indices of the blocks that learn in a model of ``of`` blocks.

        Raises:
            ValueError: if the model has fewer.
        """
        last = last_blocks(self.layers)
        count = last if isinstance(last, int) else -int(-(last or 0) * of // 1)
        if not 1 <= count <= of:
            raise ValueError(f"TTT_VLLM_LAYERS must name 1 to {of} blocks of this model, got {self.layers!r}")
        return range(of - count, of)


def _is_ours(name: str) -> bool:
    """Whether the variable ``name`` is an option, or was meant to be one."""
    return name.upper().startswith(PREFIX)


def _parsed(name: str, text: str, kind: type) -> Any:
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} must be {'a whole number' if kind is int else 'a number'}, got {text!r}") from None
