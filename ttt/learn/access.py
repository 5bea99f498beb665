"""When a model's learning layers can be used: by one thread at a time, in eval mode, whole and still in the model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ttt.adapt.convert import kept_originals, require_layers
from ttt.learn.atomic import refuse_torn
from ttt.nn import Linear, LowRankLinear
from ttt.per_user.pool import Pool, has_pool, pool_of
from ttt.signals import SignalsDeferred

_LOCK = "_ttt_lock"  # in the layer's __dict__: not a module, parameter or buffer


class LayerLock:
    """A lock of one layer that the thread holding it may take again. A copy of the layer has a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self.holder = ""  # what holds it, for error messages

    def acquire(self, what: str) -> bool:
        """Take the lock for ``what``; False if another thread has it."""
        if not self._lock.acquire(blocking=False):
            return False
        self.holder = self.holder if self._depth else what
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        self._lock.release()

    def __deepcopy__(self, memo: dict) -> LayerLock:
        return LayerLock()

    def __reduce__(self):
        return LayerLock, ()


@contextlib.contextmanager
def exclusive(layers: Sequence[nn.Module], what: str, *, repairs: bool = False) -> Iterator[None]:
    """Inside, no other thread enters with one of ``layers``, and tensors are ordinary ones in inference mode, too.

    Layers keep what a backward pass leaves and the rows of the present window: two threads would mix them.

    Args:
        what: the name of the caller, for messages.
        repairs: whether the block puts a complete state in place, so that torn layers are allowed.

    Raises:
        RuntimeError: if another thread is inside, or a write to one of the layers ended half-way (`ttt.learn.atomic`).
    """
    locks = [layer.__dict__.setdefault(_LOCK, LayerLock()) for layer in layers]
    taken: list[LayerLock] = []
    try:
        with SignalsDeferred():
            for lock in locks:
                if not lock.acquire(what):
                    raise RuntimeError(
                        f"{what} was called while another thread is in {lock.holder} of the same layers: one thread at "
                        "a time learns; wait for it, or give each thread a model of its own (ttt.fork)"
                    )
                taken.append(lock)
        if not repairs:
            refuse_torn(layers, what)
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            yield
    finally:
        with SignalsDeferred():
            for lock in taken:
                lock.release()


class Access:
    """Finds the learning layers of ``model`` and lets the methods of a `ttt.Learner` use them.

    Raises:
        ValueError: if there is no learning layer.
        RuntimeError: if a parameter or buffer was made in inference mode, so that autograd cannot use it.

    Attributes:
        pool: the users of a model that was adapted for many; None for one set of weights.
        layers: the learning layers, in the model's order; of a model for many users, those of its pool.
        single_layers: the same for one set of weights; empty for a model with users.
        config: of the layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pool: Pool | None = pool_of(model) if has_pool(model) else None
        self.single_layers: list[Linear] = require_layers(model) if self.pool is None else []
        self.layers: Sequence[Linear | LowRankLinear] = self.single_layers
        if self.pool is not None:
            self.layers = list(self.pool.layers.values())
        self.config = self.layers[0].config
        self._originals = kept_originals(model)
        self._modules = list(model.modules())  # listing them takes longer than looking at them
        named: list[tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
        for name, t in named:
            if t.is_inference():
                raise RuntimeError(
                    f"{name} was made under torch.inference_mode, and autograd cannot use it; load and adapt the model "
                    "outside of inference mode"
                )

    @contextlib.contextmanager
    def enter(self, what: str, *, repairs: bool = False) -> Iterator[None]:
        """As `exclusive`, with the same arguments, for all of the model's layers.

        Raises:
            RuntimeError: as `exclusive`; or if the model was restored, adapted again or put in training mode since.
        """
        originals = kept_originals(self.model)
        moved = originals is not self._originals and bool(originals or self._originals)
        if moved or has_pool(self.model) != (self.pool is not None):
            raise RuntimeError(
                f"{what} needs the layers that this Learner was made for, but the model was restored or adapted again "
                "since then; make a new one with ttt.Learner(model)"
            )
        if any(module.training for module in self._modules):
            raise RuntimeError(
                f"{what} needs the model in eval mode, but some of it was put in training mode after the Learner was "
                "made; call model.eval()"
            )
        with exclusive(self.layers, what, repairs=repairs):
            yield
