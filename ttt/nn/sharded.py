"""`ShardedLinear`: a learning layer of which this process holds a part (tensor parallelism)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttt import ops
from ttt.nn.linear import Linear
from ttt.nn.parallel import is_sharded, whole
from ttt.ops import reference, schema
from ttt.ops.backends import record


class ShardedLinear(Linear):
    """A `ttt.nn.Linear` whose weight is spread over processes: it learns what the whole layer would in one process.

    ``in_features``, ``out_features`` and all tensors are those of this process's part (`ttt.nn.parallel`). A
    row-parallel layer takes its part of the inputs and gives all outputs, a column-parallel layer takes all inputs and
    gives its part of the outputs. All processes must make the same calls in the same order, on the same tokens.

    `state_dict` holds the weight and the bias as DTensors, and takes DTensors or whole tensors.
    """

    def forward(self, x: Any) -> Any:
        """As `ttt.nn.Linear.forward`; of a DTensor it gives a DTensor."""
        return self.sharding.called(super().forward, x) if is_sharded(x) else super().forward(x)

    def _apply_window(self, x: Tensor) -> Tensor:
        inputs = self.sharding.input
        bias = None if inputs.shared else self.bias  # added once, not by every process
        y = ops.window_linear(x.contiguous(), self.weight, bias, self.win_x, self.win_delta, self.win_eta)
        if inputs.shared:
            y = inputs.sum(y)
            y = y if self.bias is None else y + self.bias
        return y

    def _transposed_window(self, delta: Tensor) -> Tensor:
        return self.sharding.output.sum(super()._transposed_window(delta))

    @torch.no_grad()
    def _commit(
        self, x: Tensor, delta: Tensor, eta: Tensor, trace_delta: Tensor | None, gate: Tensor | None = None
    ) -> None:
        if not self.sharding.input.shared or not self.config.commit_rows:
            super()._commit(x, delta, eta, trace_delta, gate)
            return
        # The drift of the replayed outputs and the products of the replayed inputs are sums over the inputs.
        memory, seen = (self._replay_rows(x), None) if self.mixes_replay_sources else (self.replayed, self.seen)
        arguments = self.commit_arguments(x, delta, eta, trace_delta)._replace(memory=memory, seen=seen)
        schema.check_commit(arguments)
        record("commit", "reference", "replay of a row-parallel layer, with sums over processes")
        reference.commit(*arguments, total=self.sharding.input.sum)
        self.add_present_inputs(x)

    def check_capturable(self, rows: int) -> None:
        """Raise ValueError: sums over processes are not captured."""
        raise ValueError(
            f"{self.name or 'the layer'} is sharded over processes, whose sums are not captured in a CUDA graph"
        )

    # -- the rest of the model --------------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        moved = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device))
        if moved.device != self.weight.device:
            raise RuntimeError(
                f"{self.name or 'a layer'} is sharded over processes, which exchange tensors on {self.weight.device}, "
                f"and cannot be moved to {moved.device}"
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("weight", "bias"):
            if destination.get(prefix + name) is not None:
                destination[prefix + name] = self.sharding.dtensor(destination[prefix + name].detach())

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict = {**state_dict}
        for name, part in (("weight", self.sharding.part), ("bias", self.sharding.output.part)):
            if (given := state_dict.get(prefix + name)) is None:
                continue
            given = whole(given)
            own = getattr(self, name)
            if own is not None and given.shape == self.sharding.dtensor(own).shape:
                given = part(given)
            state_dict[prefix + name] = given
        super()._load_from_state_dict(state_dict, prefix, *args)
