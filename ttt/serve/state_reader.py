"""Users of a model of sequence layers: what learns from a user is the state of the layers, by reading.

`StatePool` and `StateReader` stand where `ttt.Pool` and `ttt.Learner` stand for users with weights of their own.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from ttt.checks import check_type, check_whole
from ttt.ops.sequence.states import tensors_of
from ttt.sequence_models import SequenceCache, TTTSequenceForCausalLM
from ttt.user_name import check_user_name

_PART = 32  # tokens that are read in one step
_FORM = ("mixers", "in_place", "num_attention_heads", "window", "mini_batch", "chunk", "convolution")
"""Options of a model that say what the numbers of a state mean."""


class StatePool:
    """The states of the users who are in memory, each a `SequenceCache` of one row.

    Its methods are those of `ttt.Pool` that `ttt.serve.sessions.Sessions` uses; they are for one thread.

    Args:
        model: whose states they are.
        slots: largest number of users.
    """

    def __init__(self, model: TTTSequenceForCausalLM, slots: int) -> None:
        self.model, self.slots = model, check_whole("slots", slots, 1)
        self._new = model.new_cache(1)
        self._caches: dict[str, SequenceCache] = {}

    @property
    def users(self) -> tuple[str, ...]:
        """The users who are in memory."""
        return tuple(self._caches)

    def cache(self, user: str | None) -> SequenceCache:
        """The state of ``user``, or of a model that has read nothing (None). It must not be changed.

        Raises:
            KeyError: if ``user`` is not in memory.
        """
        if user is None:
            return self._new
        if check_user_name(user) not in self._caches:
            raise KeyError(f"user {user!r} has no slot; open(user) gives one")
        return self._caches[user]

    def open(self, user: str) -> None:
        """Give ``user`` a slot, with the state of a model that has read nothing; nothing changes if they have one.

        Raises:
            RuntimeError: if all slots are taken.
        """
        if check_user_name(user) not in self._caches:
            self._put(user, self._new)

    def put(self, user: str, cache: SequenceCache) -> None:
        """Make ``cache``, which the caller gives away, the state of ``user``, who has a slot."""
        self.cache(user)
        self._caches[user] = cache

    def load(self, user: str, state: dict[str, Tensor]) -> None:
        """Give ``user`` a slot with a ``state`` that `export` returned, bit for bit.

        Raises:
            ValueError: if it is not the state of one sequence of this model. RuntimeError: if all slots are taken.
                Nothing has changed then.
        """
        check_user_name(user)
        cache = SequenceCache.load(self.model, state)
        if cache.batch_size != 1:
            raise ValueError(f"state must be that of one sequence, got {cache.batch_size}")
        if not is_finite(cache):
            raise ValueError("state must be finite")
        self._put(user, cache)

    def export(self, user: str) -> dict[str, Tensor]:
        """A copy of the state of ``user``, which `load` accepts."""
        return {name: t.clone() for name, t in self.cache(user).tensors().items()}

    def forget(self, user: str) -> None:
        """Free the slot of ``user``; a user without one is ignored."""
        self._caches.pop(check_user_name(user), None)

    def _put(self, user: str, cache: SequenceCache) -> None:
        if user not in self._caches and len(self._caches) == self.slots:
            raise RuntimeError(f"all {self.slots} slots are taken")
        self._caches[user] = cache


class StateReader:
    """Lets the states of users read what they say, with a model whose weights never change.

    Args:
        model: in eval mode.
        slots: largest number of users whose states are in memory.

    Attributes:
        pool: of the users.
        context: largest number of tokens of a text: there is no bound.
    """

    context = sys.maxsize

    def __init__(self, model: TTTSequenceForCausalLM, *, slots: int) -> None:
        check_type("model", model, TTTSequenceForCausalLM, "a ttt.sequence_models.TTTSequenceForCausalLM")
        self.model, self.pool = model.eval(), StatePool(model, slots)

    @property
    def name(self) -> str:
        """A short name of the model, 16 hexadecimal digits: of all that its states depend on, and of some weights."""
        form = {name: getattr(self.model.config, name) for name in _FORM}
        digest = hashlib.sha256(json.dumps(form, sort_keys=True).encode())
        # Buffers hold what a calibration protects.
        for name, weight in (*self.model.named_parameters(), *self.model.named_buffers()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().flatten()[::997].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def read_in_steps(self, user: str, ids: Sequence[int]) -> Generator[None, None, float | None]:
        """Let the state of ``user`` read ``ids``, in parts; what it is in between is not seen by anybody.

        Yields:
            After every part.

        Returns:
            The mean loss of the tokens but the first, in nats, each before it was read; None if there is only one.

        Raises:
            KeyError: if ``user`` has no slot. FloatingPointError: if the state is not finite afterwards. The user's
                state is as before then.
        """
        cache = self.pool.cache(user).copy()
        device = self.model.lm_head.weight.device
        losses: list[Tensor] = []
        last: Tensor | None = None  # (1, V), the logits of the next token
        for start in range(0, len(ids), _PART):
            part = torch.tensor([list(ids[start : start + _PART])], device=device)
            with torch.no_grad():
                logits = self.model(part, cache=cache, use_cache=True).logits[0].float()
            before = logits[:-1] if last is None else torch.cat([last, logits[:-1]])
            losses.append(
                torch.nn.functional.cross_entropy(before, part[0, part.shape[1] - len(before) :], reduction="none")
            )
            last = logits[-1:]
            yield
        if not is_finite(cache):
            raise FloatingPointError("the state after the text is not finite")
        self.pool.put(user, cache)
        nll = torch.cat(losses).double() if losses else torch.zeros(0)
        return float(nll.mean()) if len(nll) else None


def is_finite(cache: SequenceCache) -> bool:
    """Whether all numbers of the states are finite."""
    return all(bool(torch.isfinite(t).all()) for layer in cache.layers for t in tensors_of(layer.state))
