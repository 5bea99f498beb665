"""Who has which slot of a model's `ttt.nn.LowRankLinear` layers."""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ttt.nn.low_rank import LowRankLinear, Routing

State = dict[str, Tensor]
_POOL = "_ttt_pool"  # on the model, beside its modules and parameters


class Pool:
    """The users of one model: names to slots. A user who is not here yet gets a slot when first named.

    With every slot taken, the user who was not named for the longest time is evicted. What a user learnt is a plain
    dict of tensors, ``{"LAYER.a": (rows, n), "LAYER.b": (rows, m), "LAYER.eta_sum": (1,), ...}``, which goes to
    ``on_evict`` then, and comes from ``on_miss`` when the user is named again. Not for several threads at a time.

    Args:
        layers: the model's learning layers, by name; all of one `ttt.LowRank`.

    Attributes:
        on_evict: called with (user, state) before a slot is given to another user; if it raises, nothing changes.
            None: what an evicted user learnt is lost.
        on_miss: called with a user who has no slot; returns a state, or None for one who begins with the base model.
    """

    def __init__(self, layers: dict[str, LowRankLinear]) -> None:
        if not layers:
            raise ValueError("layers must hold at least one ttt.nn.LowRankLinear, got none")
        self.layers = dict(layers)
        self.config = next(iter(layers.values())).config
        self.slots = next(iter(layers.values())).low_rank.slots
        self.on_evict: Callable[[Hashable, State], None] | None = None
        self.on_miss: Callable[[Hashable], State | None] | None = None
        self.routing = Routing()
        for layer in self.layers.values():
            layer.routing = self.routing
        self._slot: OrderedDict[Hashable, int] = OrderedDict()  # the user named last stands last
        self._in_use: Counter[Hashable] = Counter()

    # -- slots ----------------------------------------------------------------------------------------------------

    @property
    def users(self) -> tuple[Hashable, ...]:
        """Those who have a slot; who was named last stands last."""
        return tuple(self._slot)

    def slot(self, user: Hashable) -> int:
        """The slot of a user who has one.

        Raises:
            KeyError: if ``user`` has none.
        """
        if user not in self._slot:
            raise KeyError(f"user {user!r} has no slot; pool.open(user) gives one")
        return self._slot[user]

    def open(self, user: Hashable) -> int:
        """The user's slot, one for a new or returning user if need be.

        Raises:
            ValueError: if ``user`` is None, or what ``on_miss`` returned does not fit the layers.
            RuntimeError: if all slots belong to users of the present batch.
        """
        if user is None:
            raise ValueError("user must be the name of a user, got None, which stands for the base model")
        if user not in self._slot:
            state = self.on_miss(user) if self.on_miss is not None else None
            if state is not None:
                self._check(user, state)
            slot = self._free()
            self._place(user, slot, state)
        self._slot.move_to_end(user)
        return self._slot[user]

    def evict(self, user: Hashable | None = None) -> Hashable:
        """Take the slot of ``user`` (None: of the one not named for the longest time) after ``on_evict`` has the state.

        Returns:
            Who was evicted.

        Raises:
            KeyError: if ``user`` has no slot, or nobody has. RuntimeError: while the user's rows are being computed.
        """
        if user is None:
            idle = (u for u in self._slot if not self._in_use[u])
            user = next(idle, None)
            if user is None:
                raise KeyError("no user can be evicted: none has a slot, or all are in use")
        self._idle(user)
        if self.on_evict is not None:
            self.on_evict(user, self.export(user))
        self.forget(user)
        return user

    def forget(self, user: Hashable) -> None:
        """Free the slot of ``user`` and zero its memory; ``on_evict`` is not called. Nothing if there is no slot.

        Raises:
            RuntimeError: while the user's rows are being computed.
        """
        if user in self._slot:
            self._idle(user)
            slot = self._slot.pop(user)
            for layer in self.layers.values():
                layer.clear_slot(slot)

    def forget_all(self) -> None:
        """`forget` every user."""
        for user in self.users:
            self.forget(user)

    # -- state ------------------------------------------------------------------------------------------------------

    def export(self, user: Hashable) -> State:
        """A copy of all that ``user`` learnt, as `load` takes it.

        Raises:
            KeyError: if ``user`` has no slot.
        """
        slot = self.slot(user)
        return {f"{name}.{key}": t for name, layer in self.layers.items() for key, t in layer.slot_state(slot).items()}

    def load(self, user: Hashable, state: State) -> int:
        """Give ``user`` a state that `export` returned, to the bit, in a slot of theirs; ``on_miss`` is not asked.

        Returns:
            The slot.

        Raises:
            ValueError, TypeError: if the state does not fit the layers. RuntimeError: while the user's rows are being
                computed, or if there is no slot to be had. Nothing has changed then.
        """
        if user is None:
            raise ValueError("user must be the name of a user, got None, which stands for the base model")
        self._check(user, state)
        if user in self._slot:
            self._idle(user)
        self._place(user, self._slot[user] if user in self._slot else self._free(), state)
        self._slot.move_to_end(user)
        return self._slot[user]

    def lost(self, user: Hashable) -> dict[str, float]:
        """By layer: a bound on the Frobenius norm of what compression dropped of the user's weights so far."""
        slot = self.slot(user)
        return {name: float(layer.lost[slot]) for name, layer in self.layers.items()}

    # -- batches ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, users: Sequence[Hashable | None]) -> Iterator[Tensor]:
        """Inside, row i of every batch goes through the model with the weights of ``users[i]``; None: the base model's.

        Yields:
            (B,) int32: their slots, -1 for None.

        Raises:
            ValueError: for no users, or more than there are slots; nothing has changed then.
        """
        named = list(dict.fromkeys(u for u in users if u is not None))
        if isinstance(users, (str, bytes)) or not len(users):
            raise ValueError(f"users must be a list with a user or None for each row of the batch, got {users!r}")
        if len(named) > self.slots:
            raise ValueError(f"users names {len(named)} users, but the model was adapted for {self.slots} at a time")
        self._in_use.update(named)  # so that none makes room for another
        before = self.routing.slots
        try:
            slots = [-1 if u is None else self.open(u) for u in users]
            held = torch.tensor(slots, dtype=torch.int32, device=next(iter(self.layers.values())).rows.device)
            self.routing.set(held)
            yield held
        finally:
            self.routing.set(before)
            self._in_use.subtract(named)
            self._in_use = +self._in_use

    # -- inner --------------------------------------------------------------------------------------------------------

    def _idle(self, user: Hashable) -> None:
        self.slot(user)
        if self._in_use[user]:
            raise RuntimeError(f"user {user!r} is in use; leave ttt.users(...) first")

    def _free(self) -> int:
        """A slot that nobody has."""
        if len(self._slot) == self.slots:
            if all(self._in_use[u] for u in self._slot):
                raise RuntimeError(f"all {self.slots} slots belong to users of the present batch")
            self.evict()
        return min(set(range(self.slots)) - set(self._slot.values()))

    def _place(self, user: Hashable, slot: int, state: State | None) -> None:
        if state is not None:
            for name, layer in self.layers.items():
                layer.load_slot(slot, _part(state, name))
        self._slot[user] = slot

    def _check(self, user: Hashable, state: State) -> None:
        names = {f"{name}.{key}" for name, layer in self.layers.items() for key in _part(state, name)}
        if names != set(state):
            raise ValueError(f"the state of user {user!r} has tensors of other layers: {sorted(set(state) - names)}")
        for name, layer in self.layers.items():
            layer.check_slot_state(_part(state, name))


def _part(state: State, layer: str) -> State:
    """What ``state`` holds of one layer, by the tensors' own names."""
    return {k[len(layer) + 1 :]: t for k, t in state.items() if k.rpartition(".")[0] == layer}


def pool_of(model: nn.Module) -> Pool:
    """The `Pool` of a model that was adapted with ``TTTConfig(per_user=...)``.

    Raises:
        ValueError: if it was not.
    """
    pool = getattr(model, _POOL, None)
    if pool is None:
        raise ValueError(
            f"model ({type(model).__name__}) has one set of weights for all; "
            "ttt.adapt_(model, ttt.TTTConfig(..., per_user=ttt.LowRank())) gives every user their own"
        )
    return pool


def has_pool(model: nn.Module) -> bool:
    """Whether `pool_of` finds one."""
    return getattr(model, _POOL, None) is not None


def attach(model: nn.Module, layers: dict[str, LowRankLinear]) -> None:
    """Give ``model`` a pool over its ``layers``."""
    object.__setattr__(model, _POOL, Pool(layers))


def detach(model: nn.Module) -> None:
    """Take it away again."""
    object.__delattr__(model, _POOL)


@contextlib.contextmanager
def users(model: nn.Module, users: Sequence[Hashable | None]) -> Iterator[Tensor]:
    """Any forward pass inside reads row i of its batch with the weights of ``users[i]``; None: with the base model's::

        with ttt.users(model, ["alice", None, "bob"]):
            model.generate(input_ids, max_new_tokens=20)

    See `Pool.using`.

    Raises:
        ValueError: if the model was not adapted for users, or ``users`` is empty or names too many.
    """
    with pool_of(model).using(users) as slots:
        yield slots
