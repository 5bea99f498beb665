"""When a `ttt.Learner` may use its model: by one thread at a time, in eval mode, with whole layers still in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttt.adapt.convert import kept_originals, refuse_apart, refuse_sharded, require_layers
from ttt.adapt.fit import refuse_parallel
from ttt.adapt.sharding import is_distributed, is_fully_sharded, processes_of, refuse_unjoined, shards_fully
from ttt.atomic import refuse_torn
from ttt.checks import check_bool, check_model
from ttt.layer_lock import exclusive
from ttt.nn import Linear, LowRankLinear
from ttt.nn.base import Adapted
from ttt.nn.parallel import agreed, is_sharded, require_same, together
from ttt.nn.quantized import QuantizedLowRankLinear, quantized
from ttt.per_user.pool import Pool, has_pool, pool_of


class Access:
    """Finds the learning layers of ``model`` and lets the methods of a `ttt.Learner` use them.

    Args:
        data_parallel: as of a `ttt.Learner`.

    Raises:
        TypeError: if ``data_parallel`` is no bool.
        ValueError: if there is no learning layer, one was replaced, or the model cannot learn with ``data_parallel``.
        RuntimeError: if a parameter or buffer was made in inference mode, so that autograd cannot use it.

    Attributes:
        pool: the users of a model that was adapted for many; None for one set of weights.
        layers: the learning layers, in the model's order; of a model for many users, those of its pool.
        single_layers: the same for one set of weights; empty for a model with users.
        config: of the layers.
        processes: for each group of processes that share the model, what its members exchange tensors by
            (`ttt.nn.parallel.SharedSide`); empty for one process.
        replicas: the same as ``processes`` if FSDP2 shards the model or ``joins``, and otherwise empty. Then each
            process holds the whole of every learning layer, so that all must learn from the same rows, and all users'
            slots.
        guard: of the learner, whose strength the layers have inside of `enter`; None for a strength of 1.
        joins: whether these rows are those of all processes, each of which reads a text of its own.
    """

    def __init__(self, model: nn.Module, data_parallel: bool = False) -> None:
        self.model, self.joins = model, check_bool("data_parallel", data_parallel)
        self.guard: Any = None
        self.pool: Pool | None = pool_of(model) if has_pool(check_model(model)) else None
        refuse_parallel(model, fsdp=True)
        self.single_layers: list[Linear] = require_layers(model, sharded=True) if self.pool is None else []
        self.layers: Sequence[Linear | LowRankLinear] = self.single_layers
        if self.pool is not None:
            self.layers = list(self.pool.layers.values())
        refuse_apart(self.layers)
        self.config = self.layers[0].config
        if data_parallel:
            refuse_unjoined(model)
        self.processes = processes_of(model, data_parallel)
        self.replicas = self.processes if data_parallel or shards_fully(model) else []
        self._sharded = any(map(is_sharded, model.parameters()))
        self._originals = kept_originals(model)
        self._require_in_place()
        self._modules = list(model.modules())  # listing them takes longer than looking at them
        self._kinds = list(map(type, self._modules))
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
            RuntimeError: as `exclusive`; or if the model was restored, adapted again, sharded or put in training mode
                since.
        """
        # The locks are taken first: another thread may be restoring the model.
        with exclusive(self.layers, what, repairs=True):
            self._require_usable(what)
            if not repairs:
                refuse_torn(self.layers, what)
            for layer in self.single_layers:
                if self.guard is not None and layer.strength != self.guard.strength:
                    layer.strength, layer.guarded = self.guard.strength, True
                elif self.guard is None and layer.guarded:  # by another learner's guard
                    layer.strength, layer.guarded = 1.0, False
            yield

    @contextlib.contextmanager
    def enter_together(self, what: str, *, repairs: bool = False) -> Iterator[None]:
        """As `enter`, which in all processes over which the model is sharded raises if it does in one of them."""
        with contextlib.ExitStack() as held:
            with self.checks(what, held, repairs=repairs):
                pass  # there are no more than those of `enter`
            yield

    @contextlib.contextmanager
    def checks(self, what: str, held: contextlib.ExitStack, *, repairs: bool = False) -> Iterator[None]:
        """`enter`, until ``held`` is closed, for a method ``what`` whose own checks stand inside of the block.

        An error in one of the processes over which the model is sharded is one in all (`ttt.nn.parallel.together`).
        """
        with together(self.processes, what):
            held.enter_context(self.enter(what, repairs=repairs))
            yield

    def agreed(self, finite: Tensor) -> Tensor:
        """Where ``finite``, bool of any shape, is True in all processes over which the model is sharded."""
        return agreed(self.processes, finite)

    def same(self, t: Tensor) -> Tensor:
        """``t`` of the first of the processes over which the model is sharded, for what each of them drew."""
        for side in self.processes:
            t = side.same(t)
        return t

    def anywhere(self, found: bool) -> bool:
        """Whether ``found`` is True in one of the processes over which the model is sharded."""
        return not bool(agreed(self.processes, torch.tensor(not found, device=self.layers[0].weight.device)))

    def require_same(self, what: str, *values: Any, **named: Any) -> None:
        """`ttt.nn.parallel.require_same` in all processes over which the model is sharded."""
        require_same(self.processes, what, *values, **named)

    def refuse_several(self, what: str) -> None:
        """Raise ValueError if several processes share the model, with which ``what`` cannot work."""
        refuse_sharded(self.model, what)
        if self.joins:
            raise ValueError(f"data_parallel must be False for {what}, which does not join what several processes read")

    def _require_in_place(self) -> None:
        """Raise ValueError if something took the place of a learning layer, or of its weight, after `adapt_`."""
        advice = "as when a model is quantized. Quantize the model first, then adapt it"
        modules = dict(self.model.named_modules())
        for name in self._originals:
            found = modules.get(name)  # a stack of experts holds several layers; a wrapper gives them other names
            if found is not None and not any(isinstance(each, Adapted) for each in found.modules()):
                raise ValueError(
                    f"{name} no longer learns: a {type(found).__name__} took its place after ttt.adapt_, {advice}"
                )
        for layer in self.layers:
            if not isinstance(layer, QuantizedLowRankLinear) and (kind := quantized(layer)):
                raise ValueError(
                    f"{layer.name} can no longer learn: its weight became {kind} after ttt.adapt_, {advice}"
                )

    def _require_usable(self, what: str) -> None:
        """Raise RuntimeError if the model has other layers than it had, was sharded, or is in training mode."""
        originals = kept_originals(self.model)
        moved = originals is not self._originals and bool(originals or self._originals)
        if moved or has_pool(self.model) != (self.pool is not None):
            raise RuntimeError(
                f"{what} needs the layers that this Learner was made for, but the model was restored or adapted again "
                "since then; make a new one with ttt.Learner(model)"
            )
        if self._sharded_since():
            raise RuntimeError(
                f"{what} needs the model as it was when this Learner was made, but it was sharded over processes since "
                "then; shard it first, then make a new one with ttt.Learner(model)"
            )
        if any(module.training for module in self._modules):
            raise RuntimeError(
                f"{what} needs the model in eval mode, but some of it was put in training mode after the Learner was "
                "made; call model.eval()"
            )

    def _sharded_since(self) -> bool:
        """Whether a part of the model was sharded after the processes were found that share it."""
        kinds = zip(self._kinds, map(type, self._modules), strict=True)
        if any(new is not old and is_fully_sharded(new) for old, new in kinds):
            return True
        if self._sharded or not is_distributed():
            return False
        return any(is_sharded(p) for module in self._modules for p in module._parameters.values())
