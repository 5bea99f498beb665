"""Which user each row of a batch belongs to: named for a block of code, in the thread or task that runs it.

The block's users are kept in a context variable, so that every thread and every asyncio task has its own, and blocks
may end in any order. Generators have no context of their own. So a block inside of one counts only while the
generator itself runs: code that runs while it is paused is not inside the block.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ttt.nn.base import in_backward, is_traced

_PAUSES = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_keys = itertools.count()
_routings: weakref.WeakValueDictionary[int, Routing] = weakref.WeakValueDictionary()


class Route:
    """The slots of a batch's rows inside one block.

    Attributes:
        slots: (B,) int32, -1 for the base model.
        repeats: for how many rows each of them stands, where ``generate`` keeps several for each row of its input.
        frame: of the function that holds the block; None once the block has ended, and where that is not known.
        pauses: whether that is a generator: the block counts only while it runs.
        open: False once the block has ended.
    """

    def __init__(self, routing: Routing, slots: Tensor, frame: FrameType | None = None) -> None:
        self.routing, self.slots, self.frame = routing, slots, frame
        self.pauses = frame is not None and bool(frame.f_code.co_flags & _PAUSES)
        self.repeats, self.open = 1, True
        self.thread = threading.get_ident()
        self._tokens: dict[int, Tensor] = {}

    def tokens(self, shape: torch.Size, flat: bool = False, name: str = "") -> Tensor:
        """(T,) int32: the slot of each token of inputs of ``shape`` (B, ..., n), or (B T, n) if ``flat``.

        Raises:
            ValueError: if these are not the rows that users were named for.
        """
        batch, rows = self.slots.numel(), shape[0] if len(shape) > 1 else -1
        if flat and len(shape) == 2 and rows % batch == 0:
            return self._each(rows // batch)
        if rows not in (batch, batch * self.repeats):
            raise ValueError(
                f"{name or 'x'} must get inputs of shape ({batch}, ..., n) for {batch} users, got {tuple(shape)}: name "
                "a user for each row; or, if the model flattens its tokens or chooses some of them for this layer, as "
                "for experts, leave it out of target_modules: nobody can tell whose tokens it gets"
            )
        return self._each(shape[1:-1].numel() * (1 if rows == batch else self.repeats))

    def _each(self, each: int) -> Tensor:
        found = self._tokens.get(each)
        if found is None:
            found = self._tokens[each] = self.slots.repeat_interleave(each)
        return found

    def close(self) -> None:
        """End the block."""
        self.open, self.frame = False, None
        self.routing._open.remove(self)


_NAMED: ContextVar[tuple[Route, ...]] = ContextVar("ttt_users", default=())


class Routing:
    """The users of the rows of one model's batches, shared by all its layers.

    A copy, as of a copied model, has no users named.
    """

    def __init__(self) -> None:
        self.key = next(_keys)
        self._open: list[Route] = []
        self._read: set[int] = set()  # threads whose latest forward pass had users
        _routings[self.key] = self

    def __deepcopy__(self, memo: dict) -> Routing:
        return Routing()

    def __reduce__(self):
        return Routing, ()

    @contextlib.contextmanager
    def named(self, slots: Tensor) -> Iterator[Route]:
        """Inside, row i of a batch belongs to slot ``slots[i]`` (B,) int32, where -1 stands for the base model."""
        route = Route(self, slots, _holding_frame())
        self._enter(route)
        try:
            yield route
        finally:
            route.close()
            _NAMED.set(_still_open())  # the block may end in another context than the one that it began in

    def set(self, slots: Tensor | None) -> None:
        """Name ``slots`` for the rest of the present context, in place of all named before; None names nobody."""
        for each in self._named():
            each.close()
        _NAMED.set(_still_open())
        if slots is not None:
            self._enter(Route(self, slots))

    def _enter(self, route: Route) -> None:
        self._open.append(route)
        _NAMED.set((*_still_open(), route))

    @property
    def slots(self) -> Tensor | None:
        """(B,) int32: the slots that are named for the code which asks; None if there are none."""
        route = self.route()
        return None if route is None else route.slots

    def route(self) -> Route | None:
        """The innermost block that the present code is inside of; None for the base model.

        Raises:
            RuntimeError: if that cannot be told: autograd computes checkpointed layers again after the block has ended,
                or in a thread of its own while several blocks are open; or a generator that named users waits for this
                thread.
        """
        if not self._open:
            self._refuse_late()
            return None
        named = self._named()
        if any(each.pauses for each in self._open):
            return self._by_stack(named)
        if named:
            return named[-1]
        return self._only_open() if in_backward() else None

    def tokens(self, x: Tensor, flat: bool = False, name: str = "") -> Tensor | None:
        """(T,) int32: the slot of each token of ``x`` (B, ..., n), or (B T, n) if ``flat``; None for no users.

        ``name`` is that of the layer, for errors.

        Raises:
            ValueError: if ``x`` has another number of rows. RuntimeError: as `route`.
        """
        if is_traced():
            return torch.ops.ttt.routed_slots(x, self.key, flat)
        return self.tokens_now(x, flat, name)

    def tokens_now(self, x: Tensor, flat: bool = False, name: str = "") -> Tensor | None:
        """`tokens`, of the block that the code is inside of which runs now, and not of code that is being compiled."""
        route = self.route()
        if not in_backward():
            (self._read.discard if route is None else self._read.add)(threading.get_ident())
        return None if route is None else route.tokens(x.shape, flat, name)

    def _refuse_late(self) -> None:
        """Raise RuntimeError if a backward pass computes layers again whose users are no longer named.

        Nothing tells the forward pass that is repeated. What is known is whether the latest one of this thread, or of
        any where autograd has a thread of its own, had users.
        """
        if not self._read or not in_backward():
            return
        me = threading.get_ident()
        if me in self._read or me not in {thread.ident for thread in threading.enumerate()}:
            raise RuntimeError(
                "checkpointed layers are computed again after the block that named their users has ended, and would be "
                "given the base model's weights; call backward() inside ttt.users(model, [...])"
            )

    def _named(self) -> list[Route]:
        return [each for each in _NAMED.get() if each.open and each.routing is self]

    def _by_stack(self, named: list[Route]) -> Route | None:
        """`route`, where generators have named users: the block held by the innermost function that is running."""
        held = {each.frame: each for each in list(self._open) if each.pauses or each in named}
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame in held:
                return held[frame]
            frame = frame.f_back
        if any(each.pauses and each.thread != threading.get_ident() for each in named):
            raise RuntimeError(
                "a generator has named users and waits for this thread, which may belong to it or not; name the users "
                "in the function that calls the model"
            )
        if in_backward() and not named:
            return self._only_open()
        return next((each for each in reversed(named) if not each.pauses), None)

    def _only_open(self) -> Route | None:
        """The block that a backward pass in a thread of autograd's belongs to."""
        opened = list(self._open)
        if len(opened) > 1:
            raise RuntimeError(
                f"checkpointed layers are computed again while {len(opened)} blocks have named users of this model, "
                "and autograd's thread cannot know whose they are; run one backward pass at a time"
            )
        return opened[0] if opened else None


_STARTS = {
    kind.__enter__.__code__ if hasattr(kind, "__enter__") else kind.__aenter__.__code__
    for kind in (contextlib._GeneratorContextManager, contextlib._AsyncGeneratorContextManager)
}


def _still_open() -> tuple[Route, ...]:
    return tuple(each for each in _NAMED.get() if each.open)


def _holding_frame() -> FrameType | None:
    """The function that holds the block which is being entered.

    Generators behind context managers (`contextlib.contextmanager`) do not hold it: they are paused inside the block.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        manages = frame.f_back is not None and frame.f_back.f_code in _STARTS
        if not (manages or module == "contextlib" or module == "ttt" or module.startswith("ttt.")):
            return frame
        frame = frame.f_back
    return None


# Compiled code cannot read a context variable. It calls this op, which reads it whenever the code runs.
torch.library.define("ttt::routed_slots", "(Tensor x, int key, bool flat) -> Tensor")


@torch.library.impl("ttt::routed_slots", "default")
def _routed_slots(x: Tensor, key: int, flat: bool) -> Tensor:
    found = _routings[key].tokens_now(x, flat)
    if found is None:
        return torch.full((x.shape[:-1].numel(),), -1, dtype=torch.int32, device=x.device)
    return found.clone()  # an op may not return what something else holds


@torch.library.register_fake("ttt::routed_slots")
def _fake_slots(x: Any, key: int, flat: bool) -> Any:
    return x.new_empty((x.shape[:-1].numel(),), dtype=torch.int32)
