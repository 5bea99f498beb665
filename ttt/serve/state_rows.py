"""The states of the sequences that a model of sequence layers generates side by side, a row for each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ttt.ops.sequence.states import own, select_rows, tensors_of
from ttt.sequence_models import SequenceCache
from ttt.serve.state_reader import StatePool


class StateRows:
    """The states of up to ``rows`` sequences, whose methods are those of `ttt.serve.row_cache.RowCache`.

    Sequences that are decoded stand in the first rows, so that the states of a batch are a slice, which a decoding step
    changes in place. A row begins with a copy of its user's state, which generating never changes.

    Args:
        pool: of the users.
        rows: number of sequences.
    """

    pads = False
    """Whether tokens after the last one of a row leave the row as it is: a state takes in whatever it reads."""

    def __init__(self, pool: StatePool, rows: int) -> None:
        self.pool, self.model, self.rows = pool, pool.model, rows
        self.states = [own(layer.state) for layer in self.model.new_cache(rows).layers]
        self.device = self.model.lm_head.weight.device

    def begin(self, row: int, user: str | None) -> None:
        """Let a new sequence of ``user``, None for nobody, begin in ``row``."""
        for state, layer in zip(self.states, self.pool.cache(user).layers, strict=True):
            for held, new in zip(tensors_of(state), tensors_of(layer.state), strict=True):
                held[row] = new[0]

    def run(self, users: list[str | None], ids: Tensor, first: int, positions: Tensor, **options: Any) -> Tensor:
        """The logits of ``ids`` (B, T), the next tokens of the rows from ``first`` on.

        Args:
            users: not needed: a row has begun with the state of its user.
            positions: not needed: the states know how far they are.
            options: further arguments of the model.
        """
        rows = slice(first, first + len(ids))
        cache = SequenceCache(len(self.states))
        held = [select_rows(state, rows) for state in self.states]  # views
        for layer, state in zip(cache.layers, held, strict=True):
            layer.state = state
        logits = self.model(input_ids=ids, cache=cache, use_cache=True, **options).logits
        for layer, state in zip(cache.layers, held, strict=True):
            _write(tensors_of(state), tensors_of(layer.state))
        return logits

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the state of row ``source`` to row ``target``; a state is whole whatever ``length`` it has read."""
        for state in self.states:
            for held in tensors_of(state):
                held[target] = held[source]

    def clear(self, row: int) -> None:
        """Zero a row: nothing of a sequence is kept after it has ended."""
        for state in self.states:
            for held in tensors_of(state):
                held[row].zero_()


def _write(held: list[Tensor], new: list[Tensor]) -> None:
    """Copy the tensors of ``new`` that are not ``held`` already, as after a step in place, into those."""
    places = {t.untyped_storage().data_ptr() for t in held}
    # A new tensor may be another held one, as the first weights of a mini-batch are the last ones of the one before.
    for old, value in [
        (old, value.clone() if value.untyped_storage().data_ptr() in places else value)
        for old, value in zip(held, new, strict=True)
        if value is not old
    ]:
        old.copy_(value)
