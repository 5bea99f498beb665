"""`version`: a number that tells whether what a model computes for somebody has changed."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from ttt.adapt.convert import require_layers
from ttt.checks import check_model
from ttt.per_user.pool import has_pool, pool_of


def version(model: nn.Module, user: str | None = None) -> int:
    """A number for what ``model`` has learnt so far; keep it beside a KV cache, which fits the model while it is equal.

    After a learning step, a commit, a rollback, a reset or a load the model has another version; a cache from before
    holds keys and values of other weights. Of a user it depends on the content only: whoever has the same weights, in
    another slot or process, has the same version.

    Args:
        model: adapted by `ttt.adapt_`.
        user: who has a slot, where every user has weights of their own; None for the base model's weights.

    Raises:
        TypeError, ValueError: if ``model`` is no module or not adapted, or ``user`` is given for one set of weights.
        KeyError: if ``user`` has no slot.
    """
    digest = hashlib.blake2b(digest_size=7)
    if has_pool(check_model(model)):
        pool = pool_of(model)
        with pool.one_thread():
            slot = None if user is None else pool.slot(user)
            for name, layer in pool.layers.items():
                digest.update(f"{name}|{layer.weight._version - layer.first_version}|".encode())
                for t in [] if slot is None else [layer.a[slot], layer.b[slot]]:
                    digest.update(_bytes(t[: int(layer.rows[slot])]))
    else:
        layers: list[Any] = require_layers(model, sharded=True)
        if user is not None:
            raise ValueError(f"user must be None for a model with one set of weights, got {user!r:.80}")
        for layer in layers:
            # Torch counts the writes to a tensor, except those of a CUDA graph, which the layer counts itself.
            written = [t._version for t in (layer.weight, layer.win_x, layer.win_delta, layer.win_eta)]
            digest.update(repr((written, int(layer.step), int(layer.tokens), layer.pending)).encode())
    return int.from_bytes(digest.digest(), "big")


def _bytes(t: torch.Tensor) -> bytes:
    return t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""
