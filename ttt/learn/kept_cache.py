"""`KeptCache`: a model's cache of a text, which fits the model until it learns something else."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ttt.adapt.version import version
from ttt.learn.text import Text


class KeptCache:
    """What a model keeps of a text that it has read, so that it need not read it again; see `ttt.Learner.generate`.

    It is used up by what goes on from it, which adds to it.

    Args:
        model: which read the text.
        text: what was read; all of its tokens but the last are in ``held``.
        held: the cache that the model returned.

    Attributes:
        ids: (B, T) int64: the tokens that are in it.
        version: `ttt.version` of the model after the text was read.
    """

    def __init__(self, model: nn.Module, text: Text, held: Any) -> None:
        self.ids = text.ids[:, :-1]
        self._attend = None if text.attend is None else text.attend[:, :-1]
        self.version = version(model)
        self._model, self._held = weakref.ref(model), held

    def check(self, model: nn.Module, text: Text, allow_stale: bool) -> None:
        """Raise ValueError unless ``model`` can go on from here with the rest of ``text``."""
        if self._held is None:
            raise ValueError("cache is used up: something went on from it already; give the cache of that output")
        if self._model() is not model:
            raise ValueError("cache is of another model; its keys and values mean nothing to this one")
        length = self.ids.shape[1]
        if text.ids.shape[1] <= length or not torch.equal(text.ids[:, :length], self.ids.to(text.ids.device)):
            raise ValueError(
                f"cache holds {length} tokens of {len(self.ids)} sequences, with which input_ids must begin, and at "
                f"least one must follow; got input_ids of shape {tuple(text.ids.shape)}"
                + " that begin otherwise"
                * (text.ids.shape[1] > length)
            )
        if not torch.equal(_mask(self._attend, self.ids), _mask(text.attend, text.ids)[:, :length].to(self.ids.device)):
            raise ValueError("attention_mask must be the one that the tokens in cache were read with")
        if not allow_stale and (now := version(model)) != self.version:
            raise ValueError(
                f"cache was computed with version {self.version} of the model's weights, which have since become "
                f"version {now} (something was learnt, rolled back or loaded): its keys and values are those of other "
                "weights. Leave cache out, so that the whole prompt is read again, or pass allow_stale_cache=True"
            )

    def take(self) -> Any:
        """What the model goes on from; afterwards this cache is used up."""
        held, self._held = self._held, None
        return held


def _mask(attend: Tensor | None, ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if attend is None else attend
