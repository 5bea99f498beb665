"""`SequenceCache`: the states of a model's layers, in the form in which transformers passes a cache on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ttt.ops.sequence.states import map_state, own, state_bytes, tensors_of

NOT_CROPPED = (
    "a SequenceCache cannot be cropped: the states of its layers have taken the tokens up. Keep a copy "
    "(SequenceCache.copy) from before them instead; assisted generation is not possible with this model"
)


class StateLayer:
    """The states of one block: of its sequence layer, and of its MLP if that learns."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, state: Any = None):
        self.state = state

    def get_max_length(self) -> int:
        """-1: there is no longest text."""
        return -1

    def select(self, index: Tensor) -> None:
        """Keep the rows ``index`` of the batch."""
        self.state = map_state(lambda t: t.index_select(0, index.to(t.device)), self.state)


class SequenceCache(Cache):
    """What a `TTTSequenceForCausalLM` carries from token to token: a state for each block, of constant size.

    ``generate`` makes one, and beam search reorders it. It cannot be cropped: a state has no parts that belong to
    single tokens. `tensors` and `load` bring it to a `ttt.Store` and back, `copy` keeps it as it is at a moment.

    Args:
        blocks: blocks of the model.
    """

    layers: list[Any]  # of `StateLayer`

    def __init__(self, blocks: int):
        super().__init__(layers=[StateLayer() for _ in range(blocks)])  # type: ignore[misc, arg-type]
        self.seen = 0
        self.torn = False  # whether some blocks have taken a token up that others have not

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The tokens that were read so far, with padding."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest text."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: there is no longest text."""
        return -1

    @property
    def batch_size(self) -> int:
        """The rows of the states, or -1 before the first token."""
        tensors = tensors_of(self.layers[0].state) if self.layers else []
        return len(tensors[0]) if tensors else -1

    @property
    def is_compileable(self) -> bool:
        """False: the model's forward pass may be compiled, but not by ``generate``."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False, always."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether tokens were read."""
        return self.batch_size >= 0

    @property
    def is_linear(self) -> list[bool]:
        """False for each block: with a cache of linear layers alone, ``generate`` reads the whole text again."""
        return [False] * len(self.layers)

    @property
    def nbytes(self) -> int:
        """The bytes of all states."""
        return sum(int(state_bytes(layer.state)) for layer in self.layers)

    def check_whole(self) -> None:
        """Raise RuntimeError if an error left the states between two tokens."""
        if self.torn:
            raise RuntimeError(
                "the cache cannot be used any more: an error ended a decoding step after some blocks had taken the "
                "token up. Go on from a copy (SequenceCache.copy) of before, or reset() it and read the text again"
            )

    def take(self, states: Sequence[Any], tokens: int) -> None:
        """Hold the ``states`` of the blocks after ``tokens`` more tokens."""
        for layer, state in zip(self.layers, states, strict=True):
            layer.state = state
        self.seen += tokens
        self.torn = False

    def copy(self) -> SequenceCache:
        """A cache with copies of the states."""
        self.check_whole()
        made = SequenceCache(len(self.layers))
        for layer, other in zip(made.layers, self.layers, strict=True):
            layer.state = own(other.state)
        made.seen = self.seen
        return made

    def reset(self) -> None:
        """Begin a new text."""
        for layer in self.layers:
            layer.state = None
        self.seen, self.torn = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row ``beam_idx[i]``."""
        for layer in self.layers:
            layer.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes ``repeats`` rows."""
        for layer in self.layers:
            layer.state = map_state(lambda t: t.repeat_interleave(repeats, 0), layer.state)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError: a state has no parts that belong to single tokens."""
        raise NotImplementedError(NOT_CROPPED)

    def tensors(self) -> dict[str, Tensor]:
        """All states by name, and the tokens read, for ``store.put``; `load` takes them back.

        They are the states themselves, which the next token changes: take those of a `copy` to keep them.

        Raises:
            ValueError: if no token was read.
            RuntimeError: if an error left the states between two tokens.
        """
        self.check_whole()
        if not self.is_initialized:
            raise ValueError("the cache must have read tokens before it is stored, got an empty one")
        found = {"seen": torch.tensor([self.seen])}
        for number, layer in enumerate(self.layers):
            found |= {f"{number}.{part}": t for part, t in enumerate(tensors_of(layer.state))}
        return found

    @classmethod
    def load(cls, model: Any, tensors: Mapping[str, Tensor]) -> SequenceCache:
        """The cache of ``model`` whose `tensors` these are; they are copied to the model's device.

        Args:
            model: a `TTTSequenceForCausalLM`.

        Raises:
            ValueError: if names, shapes or dtypes are not those of the model's states.
        """
        wanted = model.new_cache(1)
        names = {"seen"} | {f"{n}.{i}" for n, l in enumerate(wanted.layers) for i in range(len(tensors_of(l.state)))}
        if set(tensors) != names:
            odd = sorted(set(tensors) ^ names)[:4]
            raise ValueError(f"tensors must be those of this model's states, missing or unknown are {odd}")
        rows = len(tensors["0.0"])
        for number, layer in enumerate(wanted.layers):
            parts = iter(range(len(tensors_of(layer.state))))

            def taken(like: Tensor, number=number, parts=parts) -> Tensor:
                name = f"{number}.{next(parts)}"
                given = tensors[name]
                if given.shape != (rows, *like.shape[1:]) or given.dtype != like.dtype:
                    raise ValueError(
                        f"tensors[{name!r}] must be {like.dtype} {(rows, *like.shape[1:])}, got {given.dtype} "
                        f"{tuple(given.shape)}"
                    )
                return given.to(like.device, copy=True)

            layer.state = map_state(taken, layer.state)
        wanted.seen = int(tensors["seen"])
        return wanted
