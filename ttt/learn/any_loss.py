"""Learning with any model and any loss: `learning`, and `capturable_` for learning inside a CUDA graph."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ttt.adapt.convert import refuse_apart, require_layers
from ttt.adapt.sharding import processes_of, refuse_unjoined, shards_fully
from ttt.atomic import whole_write
from ttt.checks import check_bool
from ttt.layer_lock import exclusive
from ttt.learn.data_parallel import joined_rows, learnt_together, refuse_other_replicas
from ttt.learn.step import refuse_other_updates, write
from ttt.nn import Capturing
from ttt.nn.graph_steps import forbid_capture
from ttt.nn.many_updates import updates_from
from ttt.nn.parallel import require_same, together


@dataclasses.dataclass
class LearningResult:
    """What `ttt.learning` yields for capturable layers; it is set when the block ends.

    Attributes:
        learned: (1,) int64, 1 if the layers learnt and 0 if something was not finite; None if nothing was captured. Of
            a block in a CUDA graph it is the tensor that every replay writes.
    """

    learned: Tensor | None = None


def capturable_(model: nn.Module, rows: int | None) -> nn.Module:
    """Let learning from steps of ``rows`` rows (of a language model: tokens) be captured in a CUDA graph, in place:

        ttt.capturable_(model, rows=8)
        with torch.cuda.graph(graph), ttt.learning(model) as result:
            model(static_input).square().sum().backward()

    See `ttt.nn.Linear.capturable_` for what differs then. ``rows`` None ends it.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: if ``model`` is no module or has no learning layer, or ``rows`` does not suit one of
            them. Nothing has changed then.
        RuntimeError: as `learning`; or while a CUDA graph is being captured.
    """
    layers = require_layers(model)
    with exclusive(layers, "ttt.capturable_"):
        forbid_capture("capturable_")
        for layer in layers:
            if rows is not None:
                layer.check_capturable(rows)
        with whole_write(layers, "ttt.capturable_"):  # windows may be committed
            for layer in layers:
                layer.capturable_(rows)
    return model


@contextlib.contextmanager
def learning(model: nn.Module, *, data_parallel: bool = False) -> Iterator[LearningResult]:
    """Learn from every ``backward()`` inside: ``with ttt.learning(model): loss.backward()``.

    The loss must be SUMMED over tokens (or samples), as ``lr`` is a step per token. The forward pass must run
    inside, too. What was captured is learnt when the block ends; if it raises, nothing is. All layers learn or none
    does, as in a step of `ttt.Learner`.

    After `ttt.capturable_` the block may stand in a CUDA graph. Then a gradient that is not finite raises nothing: the
    device finds it and changes nothing, and the block's `LearningResult` says so.

    If the model is sharded over processes, all of them must differentiate the same loss of the same inputs. With FSDP2,
    whose learning layers are whole in each process, that is checked.

    Args:
        data_parallel: whether each process differentiates the loss of inputs of its own, and all learn from all inputs,
            as from one batch. The processes are those over which FSDP2 shards the model, those of
            DistributedDataParallel if that wraps it, or the default group of torch.distributed; all must hold the same
            model, to the bit.

    Raises:
        TypeError, ValueError: if ``model`` is no module, or has no learning layer; if processes of FSDP2 would learn
            from other tokens; if ``data_parallel`` is no bool; or if it is True in a process without a group, for
            layers that are sharded or captured in a CUDA graph, or where the processes hold different models. Nothing
            has changed then.
        FloatingPointError: if a gradient is not finite; nothing has changed then.
        RuntimeError: if another thread is learning with these layers, or a write to them ended half-way.
    """
    joins = check_bool("data_parallel", data_parallel)
    layers, result = require_layers(model, sharded=True, replicated=joins), LearningResult()
    refuse_apart(layers)
    processes = processes_of(model, joins)
    with contextlib.ExitStack() as held:
        with together(processes, "ttt.learning"):
            if joins:
                refuse_unjoined(model)
            held.enter_context(exclusive(layers, "ttt.learning"))
            if joins and any(layer.capturable is not None for layer in layers):
                raise ValueError("data_parallel must be False for layers that are captured in a CUDA graph")
        with Capturing(layers, joins) as capturing, torch.enable_grad():
            yield result
            captured = capturing.renew()
        require_same(processes, "data_parallel", data_parallel)
        if joins:
            refuse_other_replicas(processes, model, layers)
        given: list[Any] = [(rows, None, None) for rows in captured]
        if joins:
            given = [joined_rows(processes, layer, own) for layer, own in zip(layers, given, strict=True)]
        found = zip(layers, updates_from(layers, given), strict=True)
        updates = [(layer, update) for layer, update in found if update is not None]
        if processes and shards_fully(model) and not joins:
            refuse_other_updates(processes, updates)
        if any(layer.capturable is not None for layer in layers):
            finite = [update.finite.view(1) for _, update in updates]
            result.learned = torch.cat(finite).all().long().view(1) if finite else None
            write(updates, result.learned)
            return
        with together(processes, "ttt.learning"):
            for layer, update in updates:
                if not bool(update.finite):
                    raise FloatingPointError(f"the gradient at {layer.name or layer} is not finite; nothing was learnt")
        write(updates)
        if joins:
            learnt_together(layers)
