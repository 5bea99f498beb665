"""Assignment of users to the slots of a model's `ttt.nn.LowRankLinear` layers."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ttt.checks import check_model, check_type
from ttt.nn.low_rank import LowRankLinear
from ttt.nn.routing import Routing
from ttt.per_user.generation import attach_generation, detach_generation
from ttt.per_user.names import check_user_list
from ttt.per_user.turn import Turn
from ttt.per_user.user_state import GUARDS, Companion, Log, State, UserState
from ttt.signals import SignalsDeferred
from ttt.user_name import check_user_name

_POOL = "_ttt_pool"  # attribute of the model, beside its modules and parameters
_COUNTING = threading.Lock()  # held while users in use are counted; not in the pool, which can be copied


class Pool:
    """Assigns users to the slots of one model. A user without a slot gets one when first named.

    If all slots are taken, the user who was not named for the longest time is evicted. A user's state is a plain dict
    of tensors, ``{"LAYER.a": (rows, n), "LAYER.b": (rows, m), "LAYER.eta_sum": (1,), ...}``. It is passed to
    ``on_evict`` at eviction, and taken from ``on_miss`` when the user is named again.

    Several threads may compute inside `using`, each with users of its own. One thread at a time learns: meanwhile
    another one that names users or changes the pool gets a RuntimeError.

    Args:
        layers: the model's learning layers, by name, all with the same `ttt.LowRank`.

    Attributes:
        on_evict: called with (user, state) before a slot is given to another user; if it raises, nothing changes. It
            must not evict users, nor open one for whom a slot would have to become free.
            None: what an evicted user learnt is lost, and the first time a UserWarning says so.
        on_miss: called with a user who has no slot; returns a state, or None for a user who starts from the base model.
        companion: keeps further state for every user in a slot and takes part in learning; None for nothing.
        episodes: keeps what was learnt from (`ttt.EpisodeLog`); None for nothing.
    """

    def __init__(self, layers: dict[str, LowRankLinear]) -> None:
        check_type("layers", layers, dict, "a dict of ttt.nn.LowRankLinear by name")
        if not layers:
            raise ValueError("layers must hold at least one ttt.nn.LowRankLinear, got none")
        self.layers = dict(layers)
        self.config = next(iter(layers.values())).config
        self.slots = next(iter(layers.values())).low_rank.slots
        self.on_evict: Callable[[str, State], None] | None = None
        self.on_miss: Callable[[str], State | None] | None = None
        self.companion: Companion | None = None
        self.episodes: Log | None = None
        self._warned = False  # of learnt weights that were lost
        self.routing = Routing()
        for layer in self.layers.values():
            layer.routing = self.routing
        self._slot: OrderedDict[str, int] = OrderedDict()  # in the order in which users were last named
        self._in_use: Counter[tuple[str, int]] = Counter()  # (user, thread) of batches that are being computed
        self._turn = Turn()
        self._evicted: str | None = None  # while `on_evict` has this user

    # -- slots ----------------------------------------------------------------------------------------------------

    @property
    def users(self) -> tuple[str, ...]:
        """The users who have a slot, in the order in which they were last named."""
        return tuple(self._slot)

    def slot(self, user: str) -> int:
        """The slot of a user who has one.

        Raises:
            KeyError: if ``user`` has none.
        """
        check_user_name(user)
        if user not in self._slot:
            raise KeyError(f"user {user!r} has no slot; pool.open(user) gives one")
        return self._slot[user]

    def open(self, user: str) -> int:
        """The user's slot; a user without one gets one, with the state that ``on_miss`` returns.

        Raises:
            ValueError, TypeError: if ``user`` is None, or what ``on_miss`` returned does not fit the layers.
            RuntimeError: if all slots belong to users of the current batch, or another thread learns.
        """
        check_user_name(user)
        with self.one_thread():
            if user not in self._slot:
                state = self.on_miss(user) if self.on_miss is not None else None
                if state is not None:
                    self._check(user, state)
                slot = self._free()
                self._place(user, slot, state)
            self._slot.move_to_end(user)
            return self._slot[user]

    def evict(self, user: str | None = None) -> str:
        """Free the slot of ``user`` after passing the state to ``on_evict``. None: of the user least recently named.

        Returns:
            The user who was evicted.

        Raises:
            KeyError: if ``user`` has no slot, or nobody has.
            RuntimeError: while the user's rows are being computed, if another thread learns, or inside of
                ``on_evict``.
        """
        with self.one_thread():
            if self._evicted is not None:
                raise RuntimeError(
                    f"on_evict, which was called with user {self._evicted!r}, must not evict a user or open one who "
                    "needs the slot of another"
                )
            if user is None:
                user = self._least_recent()
                if user is None:
                    raise KeyError("no user can be evicted: none has a slot, or all are in use")
            self._idle(user)
            if self.companion is not None:
                self.companion.before_evict(user)
            if self.on_evict is not None:
                self._evicted = user
                try:
                    self.on_evict(user, self.export(user))
                finally:
                    self._evicted = None
            self.forget(user)
            return user

    def forget(self, user: str) -> None:
        """Free the slot of ``user`` and fill its memory with zeros, without calling ``on_evict``.

        A user without a slot is ignored.

        Raises:
            RuntimeError: while the user's rows are being computed, or if another thread learns.
        """
        check_user_name(user)
        with self.one_thread():
            if user in self._slot:
                self._idle(user)
                with SignalsDeferred():
                    slot = self._slot.pop(user)
                    for layer in self.layers.values():
                        layer.clear_slot(slot)
                    for kept in self._kept:
                        kept.forget(user)

    def forget_all(self) -> None:
        """`forget` every user."""
        for user in self.users:
            self.forget(user)

    # -- state ------------------------------------------------------------------------------------------------------

    def export(self, user: str) -> State:
        """A copy of everything that ``user`` has learnt, which `load` accepts.

        Raises:
            KeyError: if ``user`` has no slot. RuntimeError: if another thread learns.
        """
        with self.one_thread():
            state = self._export_layers(user)
            for kept in self._kept:
                state |= self._export_kept(user, kept)
            return state

    def load(self, user: str, state: State) -> int:
        """Give ``user`` a slot with a ``state`` that `export` returned, bit for bit; ``on_miss`` is not called.

        What guards have counted of the user is dropped where the model has none.

        Returns:
            The slot.

        Raises:
            ValueError, TypeError: if the state does not fit the layers.
            RuntimeError: while the user's rows are being computed, if no slot is free, or if another thread uses the
                pool. Nothing has changed in any of these cases.
        """
        check_user_name(user)
        with self.one_thread():
            self._check(user, state)
            if user in self._slot:
                self._idle(user)
            self._place(user, self._slot[user] if user in self._slot else self._free(), state)
            self._slot.move_to_end(user)
            return self._slot[user]

    def restore_learnt(self, user: str, state: State) -> None:
        """Put back a state that `copy_learnt` returned; nothing else of ``user`` changes."""
        with self.one_thread(), SignalsDeferred():
            for name, layer in self.layers.items():
                layer.load_slot(self.slot(user), _part(state, name))
            if self.episodes is not None:
                self.episodes.load(user, _part(state, self.episodes.prefix))

    def copy_learnt(self, user: str) -> State:
        """A copy of what the layers hold for ``user``, and of the log of what they learnt it from."""
        with self.one_thread():
            return self._export_layers(user) | self._export_kept(user, self.episodes)

    def copy_log(self, user: str) -> State:
        """Of `copy_learnt`, the part that is the log's."""
        with self.one_thread():
            return self._export_kept(user, self.episodes)

    def lost(self, user: str) -> dict[str, float]:
        """By layer: a bound on the Frobenius norm of what compression dropped of the user's weights so far."""
        slot = self.slot(user)
        return {name: float(layer.lost[slot]) for name, layer in self.layers.items()}

    # -- batches ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, users: Sequence[str | None], *, learns: bool = False) -> Iterator[Tensor]:
        """Inside, row i of every batch goes through the model with the weights of ``users[i]``; None: the base model's.

        That holds for the thread or asyncio task that enters the block and for those that it starts with its context;
        in a generator, only while the generator runs. Everything else keeps its own users, or the base model's
        weights. Beams and returned sequences of ``generate`` are those of the row that they come from.

        Args:
            learns: whether the users may learn inside: then the block is one thread's alone.

        Yields:
            (B,) int32: their slots, -1 for None.

        Raises:
            TypeError, ValueError: for no users, more than there are slots, or one that is no string; nothing has
                changed then.
            RuntimeError: if another thread learns or, with ``learns``, computes with one of the users; nothing has
                changed then.
        """
        check_user_list(users)
        named = list(dict.fromkeys(u for u in users if u is not None))
        if len(named) > self.slots:
            raise ValueError(f"users names {len(named)} users, but the model was adapted for {self.slots} at a time")
        held = [(user, threading.get_ident()) for user in named]
        with contextlib.ExitStack() as stack:
            turn = stack if learns else stack.enter_context(contextlib.ExitStack())
            turn.enter_context(self._turn.taken(learning=learns))
            if learns and (busy := sorted(self._computed(elsewhere=True).intersection(named))):
                raise RuntimeError(f"users {busy} are in use by another thread; learn when it has left ttt.users(...)")
            stack.enter_context(self._held(held))  # so that no user of the batch is evicted for another one
            slots = [-1 if u is None else self.open(u) for u in users]
            if not learns:
                turn.close()
            with self._routed(slots) as routed:
                yield routed

    @contextlib.contextmanager
    def reading(self, user: str | None, rows: int) -> Iterator[None]:
        """Inside, all ``rows`` rows of a batch go through the model with the weights of ``user``, who has a slot, or of
        the base model (None).

        Unlike `using` this does not count as naming the user, so the order of eviction stays as it is.

        Raises:
            KeyError: if ``user`` has no slot. RuntimeError: if another thread learns.
        """
        with self.one_thread(), self._routed([-1 if user is None else self.slot(user)] * rows):
            yield

    # -- inner --------------------------------------------------------------------------------------------------------

    def one_thread(self) -> contextlib.AbstractContextManager[None]:
        """Inside, no other thread changes the pool; others wait for their turn, or have it now (`Turn.taken`)."""
        return self._turn.taken()

    @contextlib.contextmanager
    def _held(self, held: list[tuple[str, int]]) -> Iterator[None]:
        """Inside, (user, thread) of ``held`` are in use."""
        with _COUNTING:
            self._in_use.update(held)
        try:
            yield
        finally:
            with _COUNTING:
                self._in_use.subtract(held)
                self._in_use = +self._in_use

    def _computed(self, *, elsewhere: bool = False) -> set[str]:
        """The users of the batches that are being computed, or of those ``elsewhere``: in other threads."""
        me = threading.get_ident()
        with _COUNTING:
            return {user for user, thread in self._in_use if not elsewhere or thread != me}

    def require_idle(self) -> None:
        """Raise RuntimeError if a user is part of a batch that is being computed."""
        if busy := sorted(self._computed()):
            raise RuntimeError(f"users {busy} are in use; leave ttt.users(...) first")

    @property
    def _kept(self) -> list[UserState]:
        """What keeps state of users beside the layers: first the log, which guards copy when a user is loaded."""
        return [kept for kept in (self.episodes, self.companion) if kept is not None]

    @contextlib.contextmanager
    def _routed(self, slots: list[int]) -> Iterator[Tensor]:
        device = next(iter(self.layers.values())).rows.device
        with self.routing.named(torch.tensor(slots, dtype=torch.int32, device=device)) as route:
            yield route.slots

    def _idle(self, user: str) -> None:
        """Raise unless ``user`` has a slot and is not part of the current batch."""
        self.slot(user)
        if user in self._computed():
            raise RuntimeError(f"user {user!r} is in use; leave ttt.users(...) first")

    def _free(self) -> int:
        """A free slot, after an eviction if necessary."""
        if len(self._slot) == self.slots:
            user = self._least_recent()
            if user is None:
                raise RuntimeError(f"all {self.slots} slots belong to users of the present batch")
            self._warn_of_loss(user)
            self.evict(user)
        return min(set(range(self.slots)) - set(self._slot.values()))

    def _least_recent(self) -> str | None:
        """Of the users whose rows are not being computed, the one who was not named for the longest time, or None."""
        busy = self._computed()
        return next((user for user in self._slot if user not in busy), None)

    def _warn_of_loss(self, user: str) -> None:
        """Warn, once, if ``user``, who is evicted now, loses what they learnt."""
        if self.on_evict is not None or self._warned:
            return
        if any(bool(layer.rows[self._slot[user]]) for layer in self.layers.values()):
            self._warned = True
            warnings.warn(
                f"all {self.slots} slots are taken: user {user!r} is evicted, and what they learnt is lost. Set "
                "pool.on_evict and pool.on_miss, or take more slots (ttt.LowRank(slots=...))",
                stacklevel=2,
            )

    def _place(self, user: str, slot: int, state: State | None) -> None:
        with SignalsDeferred():
            if state is not None:
                for name, layer in self.layers.items():
                    layer.load_slot(slot, _part(state, name))
            self._slot[user] = slot
            for kept in self._kept:
                kept.load(user, _part(state or {}, kept.prefix))

    def _check(self, user: str, state: State) -> None:
        """Raise ValueError or TypeError unless ``state`` fits what the pool keeps. Nothing is written."""
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise TypeError(f"the state of user {user!r} must be a dict of tensors by name, got {type(state).__name__}")
        prefixes = [*self.layers, *(kept.prefix for kept in self._kept)]
        names = {f"{prefix}.{key}" for prefix in prefixes for key in _part(state, prefix)}
        other = {name for name in set(state) - names if self.companion is not None or not name.startswith(f"{GUARDS}.")}
        if other:
            hint = (
                ""
                if not any(name.startswith("episodes.") for name in other)
                else ("; what the user said is loaded by a ttt.Learner(model, episodes=ttt.EpisodeLog())")
            )
            found, own = _few({name.rpartition(".")[0] or repr(name) for name in other}), _few(self.layers)
            raise ValueError(
                f"the state of user {user!r} has tensors of other layers: {found}; "
                f"users of this model learn in {own}{hint}"
            )
        for name, layer in self.layers.items():
            layer.check_slot_state(_part(state, name))
        for kept in self._kept:
            kept.check_state(_part(state, kept.prefix))

    def _export_kept(self, user: str, kept: UserState | None) -> State:
        return {} if kept is None else {f"{kept.prefix}.{key}": t for key, t in kept.export(user).items()}

    def _export_layers(self, user: str) -> State:
        slot = self.slot(user)
        return {f"{name}.{key}": t for name, layer in self.layers.items() for key, t in layer.slot_state(slot).items()}


def _few(layers: Iterable[str]) -> str:
    """The first and the last of ``layers``, with their number, where there are more than three."""
    named = sorted(layers, key=lambda name: [(len(part), part) for part in name.split(".")])
    return ", ".join(named) if len(named) <= 3 else f"{named[0]} to {named[-1]} ({len(named)})"


def _part(state: State, prefix: str) -> State:
    """The tensors of one layer, or of what is kept beside them, by their own names."""
    return {k[len(prefix) + 1 :]: t for k, t in state.items() if k.rpartition(".")[0] == prefix}


def pool_of(model: nn.Module) -> Pool:
    """The `Pool` of a model that was adapted with ``TTTConfig(per_user=...)``.

    Raises:
        TypeError: if ``model`` is no module. ValueError: if it was not.
    """
    pool = getattr(check_model(model), _POOL, None)
    if pool is None:
        raise ValueError(
            f"model ({type(model).__name__}) has one set of weights for all; "
            "ttt.adapt_(model, ttt.TTTConfig(..., per_user=ttt.LowRank())) gives every user their own"
        )
    return pool


def has_pool(model: nn.Module) -> bool:
    """Whether the model was adapted with ``TTTConfig(per_user=...)``."""
    return getattr(model, _POOL, None) is not None


def attach(model: nn.Module, layers: dict[str, LowRankLinear]) -> None:
    """Give ``model`` a pool over its ``layers``."""
    pool = Pool(layers)
    object.__setattr__(model, _POOL, pool)
    attach_generation(model, pool.routing)


def detach(model: nn.Module) -> None:
    """Remove the pool from ``model``."""
    object.__delattr__(model, _POOL)
    detach_generation(model)


@contextlib.contextmanager
def users(model: nn.Module, users: Sequence[str | None]) -> Iterator[Tensor]:
    """Inside, row i of every batch is computed with the weights of ``users[i]``; None: with the base model's:

        with ttt.users(model, ["alice", None, "bob"]):
            model.generate(input_ids, max_new_tokens=20)

    See `Pool.using`.

    Raises:
        TypeError, ValueError: if the model was not adapted for users, or ``users`` is no list of them, is empty or
            names too many.
        RuntimeError: if another thread learns with the model's users.
    """
    with pool_of(model).using(users) as slots:
        yield slots
