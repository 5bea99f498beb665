"""Users' weights in the slots of vLLM's adapters, written in place: addresses stay, and nothing is loaded from disk."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ttt.per_user.pool import Pool

PREFIX = "ttt://"
"""What the path of a user's adapter begins with: ``ttt://KEY@BOOT.STAMP``."""
log = logging.getLogger("vllm.ttt")


def label(key: str, boot: str, stamp: int) -> str:
    """The path of a user's adapter. vLLM's prefix cache is keyed by it, so each state of a user has its own."""
    return f"{PREFIX}{key}@{boot}.{stamp}"


def key_of(path: str) -> str:
    """The key in a `label`."""
    return path[len(PREFIX) :].partition("@")[0]


class Adapters:
    """Writes users' rows where vLLM's forward pass reads them.

    Args:
        manager: vLLM's ``LoRAModelManager``.
        pool: the users; its layers have the names of vLLM's modules.
        rank: of vLLM's adapters.
    """

    def __init__(self, manager: Any, pool: Pool, rank: int) -> None:
        self.manager, self.pool, self.rank = manager, pool, rank
        self.modules = {name: manager.modules[name] for name in pool.layers}
        self._users: dict[str, str] = {}  # key -> user
        self._ids: dict[str, set[int]] = {}  # user -> vLLM's numbers of their adapters

    def introduce(self, key: str, user: str) -> None:
        """From now on ``key`` in a path stands for ``user``."""
        self._users[key] = user

    def load(self, request: Any) -> Any:
        """The adapter that vLLM asks for with ``request``: zeros for a user without a slot, who is the base model."""
        from vllm.lora.lora_model import LoRAModel

        user = self._users.get(key_of(request.lora_path))
        if user is not None:
            self._ids.setdefault(user, set()).add(request.lora_int_id)
        return LoRAModel(request.lora_int_id, self.rank, self._layers(user))

    @torch.no_grad()
    def publish(self, user: str) -> None:
        """Put what ``user`` has learnt, or forgotten, into effect for all later steps of vLLM."""
        slot = self.pool.slot(user) if user in self.pool.users else None
        for number in self._ids.get(user, ()):
            kept = self.manager._registered_adapters.cache.get(number)
            if kept is None:
                continue
            kept.loras = self._layers(user)  # or activating it again would bring old weights back
            if number not in self.manager.lora_index_to_id:
                continue
            index = self.manager.lora_index_to_id.index(number)
            for name, module in self.modules.items():
                a, b = module.lora_a_stacked[0][index, 0], module.lora_b_stacked[0][index, 0]
                rows = 0
                if slot is not None:
                    layer = self.pool.layers[name]
                    rows = int(layer.rows[slot])
                    a[:rows].copy_(layer.a[slot, :rows])
                    b[:, :rows].copy_(layer.b[slot, :rows].T)
                a[rows:].zero_()
                b[:, rows:].zero_()

    def remove(self, user: str) -> None:
        """Take the adapters of a user who has left out of vLLM: nothing of the user stays in its memory.

        A request that still runs, as of a user who was forgotten, goes on with the base model's weights.
        """
        self._users = {key: each for key, each in self._users.items() if each != user}
        for number in self._ids.pop(user, set()):
            if number in self.manager.lora_index_to_id:
                index = self.manager.lora_index_to_id.index(number)
                for module in self.modules.values():
                    module.reset_lora(index)
            if number in self.manager._registered_adapters.cache:
                self.manager.remove_adapter(number)

    def _layers(self, user: str | None) -> dict[str, Any]:
        from vllm.lora.lora_weights import LoRALayerWeights

        slot = self.pool.slot(user) if user in self.pool.users else None
        found = {}
        for name, layer in self.pool.layers.items():
            rows = 0 if slot is None else int(layer.rows[slot])
            a: Tensor = layer.a.new_zeros(max(rows, 1), layer.in_features)  # without tensors it would end the engine
            b: Tensor = layer.b.new_zeros(layer.out_features, max(rows, 1))
            if slot is not None and rows:
                a.copy_(layer.a[slot, :rows])
                b.copy_(layer.b[slot, :rows].T)
            found[name] = LoRALayerWeights(name, self.rank, self.rank, a, b, 1.0)
        return found
