"""`LearntState`: what a model has learnt, as a part of a checkpoint of torch.distributed.checkpoint."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ttt.adapt.checkpoint import content_of, load, refuse_users
from ttt.adapt.convert import require_layers
from ttt.adapt.sharding import processes_of
from ttt.checks import check_model, check_type
from ttt.files import write_atomically
from ttt.nn.parallel import together

_KEY = "safetensors"


class _Unsavable:
    """In place of the content of a state that cannot be saved: raises ``error`` where a checkpoint would take it up."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __create_write_items__(self, name: str, content: Any) -> list[Any]:
        """What torch.distributed.checkpoint calls when it plans what to save, before it writes anything."""
        raise self.error

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What copies and other ways of saving call."""
        raise self.error


class LearntState:
    """What an adapted model has learnt, for ``torch.distributed.checkpoint.save`` and ``load``:

        torch.distributed.checkpoint.save({"learnt": ttt.LearntState(model)}, checkpoint_id=folder)
        torch.distributed.checkpoint.load({"learnt": ttt.LearntState(model)}, checkpoint_id=folder)

    It is the content of the file that `ttt.save` writes: the state of the whole model, whatever it is sharded over. So
    it can be loaded by another number of processes, bit for bit, into a model that was adapted from the same base.

    ``get_model_state_dict`` alone holds the weights as of the last commit, without windows, anchors and importance;
    ``set_model_state_dict`` takes them as other base weights, on which what was learnt is gone (`ttt.nn.Linear`).

    Args:
        model: adapted by `ttt.adapt_`, with one set of weights.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if it was adapted for users, or is not adapted.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_users(check_model(model), "put into a checkpoint")
        require_layers(model, sharded=True)
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        """The content of the file, which all processes gather.

        Where `ttt.save` would raise ValueError or RuntimeError, ``torch.distributed.checkpoint.save`` raises it, as the
        cause of a CheckpointException, before it writes anything. Here it is not raised: ``load`` calls this method,
        too, and a state that is torn or not finite is where loading another one helps.
        """
        try:
            return {_KEY: content_of(self.model)}
        except (ValueError, RuntimeError) as error:
            return {_KEY: _Unsavable(error)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the model what ``state_dict`` of a saved `LearntState` holds.

        Raises:
            TypeError, ValueError, OSError, RuntimeError: as `ttt.load`; or if ``state_dict`` holds something else, or a
                temporary file cannot be written. The model is unchanged, to the bit, in all processes.
        """
        with contextlib.ExitStack() as held:
            with together(processes_of(self.model), "LearntState.load_state_dict"):
                check_type("state_dict", state_dict, Mapping, "the state of a ttt.LearntState")
                content = state_dict.get(_KEY)
                if set(state_dict) != {_KEY} or not isinstance(content, bytes):
                    raise ValueError(
                        f"state_dict must hold bytes named {_KEY!r}, as a ttt.LearntState gives, got "
                        f"{list(state_dict)!r:.200} and {type(content).__name__}"
                    )
                folder = held.enter_context(tempfile.TemporaryDirectory())
                path = Path(folder) / "LearntState.safetensors"
                write_atomically(path, content)
            load(self.model, path)
