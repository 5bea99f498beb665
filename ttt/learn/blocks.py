"""The blocks of a model that hold its learning layers, and leaving out those that would compute the same again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from ttt.adapt.training import other_hooks
from ttt.learn.huggingface import swapped
from ttt.ops.backends import record

_LIMIT = 256 * 2**20  # bytes of hidden states that are kept
_PROBE = 16  # tokens on which a model without its first blocks is compared with all of it


def blocks_of(model: nn.Module, layers: Sequence[nn.Module], head: nn.Module | None) -> tuple[Any, int, str]:
    """Find the blocks that learn: (the model's list of blocks, the index of the lowest, why they cannot run alone).

    Args:
        layers: those that learn.
        head: the output head, which may be one of them.
    """
    blocks, lowest = None, 0
    for name, module in model.named_modules():
        if not any(module is layer for layer in layers) or module is head:
            continue
        parts = name.split(".")
        for i in range(len(parts) - 1):
            parent = model.get_submodule(".".join(parts[:i]))
            if isinstance(parent, nn.ModuleList):
                break
        else:
            return None, 0, f"{name} is in no list of blocks"
        if blocks is not None and parent is not blocks:
            return None, 0, f"{name} is in another list of blocks than other layers that learn"
        lowest = int(parts[i]) if blocks is None else min(lowest, int(parts[i]))
        blocks = parent
    if blocks is None:
        return None, 0, "only the output head learns"
    if any("forward" in vars(block) or other_hooks(block) for block in blocks):
        return None, 0, "the model's blocks have hooks"
    return blocks, lowest, ""


class KnownBlocks:
    """Leaves out the first blocks of a causal language model where it reads texts again that it has read before.

    While the layers of some blocks learn, the blocks below compute the same each time they read a text; and where
    nothing that was learnt is in effect, all blocks do. What the rest of the model gets from them is kept for each
    text, up to 256 MB, and handed on the next time. Masks, positions, the final norm and the head are computed as ever.

    A model is read in this way only if its logits for the tokens given to `check` are the same. Where it cannot be,
    all of it runs, and `ttt.info()` reports why.

    Args:
        model: a transformers causal language model in eval mode.
        layers: those that learn.
        head: the output head.

    Attributes:
        why: why no block can be left out; empty if some can.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module], head: nn.Module | None) -> None:
        self.model = model
        blocks, lowest, self.why = blocks_of(model, layers, head)
        self.blocks: list[nn.Module] = [] if blocks is None else list(blocks)
        self.lowest = lowest
        self._held: dict[bool, dict[bytes, Tensor]] = {False: {}, True: {}}
        self._bytes, self._stamp = 0, self._parameters()
        self._in_tuple = False  # whether a block returns (hidden state,), as in older releases of transformers
        self.why = self.why or self._unfit()

    def _unfit(self) -> str:
        every = list(self.model.modules())
        if any(other_hooks(m) or "forward" in vars(m) for m in every):
            return "the model has hooks"
        if _module._global_forward_hooks or _module._global_forward_pre_hooks:
            return "there are global module hooks"
        if hasattr(self.model, "_orig_mod") or any(m._compiled_call_impl is not None for m in every):
            return "the model is compiled"
        return ""

    def _parameters(self) -> list[Any]:
        """What differs once a parameter was written."""
        return [(p._version, p.dtype, p.device) for p in self.model.parameters()]

    @torch.no_grad()
    def check(self, ids: Tensor) -> None:
        """Find out on ``ids`` (T,), of which a few are read, whether blocks can be left out. No change is in effect."""
        if self.why or not len(ids):
            return
        ids, order, inputs = ids[None, :_PROBE], list[int](), {"use_cache": False}
        with contextlib.ExitStack() as stack:
            for at, block in enumerate(self.blocks):
                handle = block.register_forward_hook(lambda module, args, out, at=at: order.append(at))
                stack.callback(handle.remove)
            for every in (False, True):
                stack.enter_context(self._keeping(ids, [ids.shape[1]], every))
            whole = self.model(input_ids=ids, **inputs).logits
        if order != list(range(len(self.blocks))):
            self.why = "the model does not run each of its blocks once, from the first to the last"
        for every in () if self.why else (False, True):
            with self._given(ids, [ids.shape[1]], every):
                try:
                    found = self.model(input_ids=ids, **inputs).logits
                except Exception as error:  # whatever a block misses that the ones below left to it
                    self.why = f"the upper blocks need more of those below than a hidden state ({type(error).__name__})"
                    break
            differ = float((found - whole).abs().max()) / max(float(whole.abs().max()), 1e-30)
            if not differ <= 8 * torch.finfo(whole.dtype).eps:
                self.why = "the upper blocks compute something else without those below"
                break

    @contextlib.contextmanager
    def reading(self, ids: Tensor, lengths: Sequence[int], *, every: bool = False) -> Iterator[None]:
        """Inside, the model reads ``ids`` (B, T) once, without a cache, a mask or positions.

        Args:
            lengths: of the rows; what comes after is padding, whose logits mean nothing.
            every: leave out all blocks: nothing that was learnt since the first time is in effect.
        """
        if self.why or not (every or self.lowest):
            record("study", "all blocks", self.why)
            yield
            return
        if self._stamp != (now := self._parameters()):  # something wrote the base model: what is held is of another one
            self._held, self._bytes, self._stamp = {False: {}, True: {}}, 0, now
        known = all(key in self._held[every] for key in _keys(ids, lengths))
        full = not known and self._bytes >= _LIMIT
        if known:
            record("study", "head" if every else "upper blocks")
        else:
            record("study", "all blocks", f"there are more than {_LIMIT >> 20} MB of hidden states" if full else "")
        with contextlib.ExitStack() as stack:
            if known:
                stack.enter_context(self._given(ids, lengths, every))
            for each in () if known else {every, False}:  # all blocks run: the lower ones, too
                stack.enter_context(self._keeping(ids, lengths, each))
            yield

    def _first(self, every: bool) -> list[nn.Module]:
        return self.blocks if every else self.blocks[: self.lowest]

    @contextlib.contextmanager
    def _keeping(self, ids: Tensor, lengths: Sequence[int], every: bool) -> Iterator[None]:
        """Inside, what the last of the first blocks computes is kept."""
        blocks, thread, found = self._first(every), threading.get_ident(), list[Any]()
        if not blocks:
            yield
            return
        handle = blocks[-1].register_forward_hook(
            lambda module, args, out: found.append(out) if threading.get_ident() == thread else None
        )
        try:
            yield
        finally:
            handle.remove()
        hidden = found[0] if len(found) == 1 else None
        self._in_tuple = isinstance(hidden, tuple)
        if isinstance(hidden, tuple) and len(hidden) == 1:
            hidden = hidden[0]
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != ids.shape:
            self.why = "a block does not return the hidden state of each token, and nothing else"
            return
        for key, row, length in zip(_keys(ids, lengths), hidden.detach(), lengths, strict=True):
            if key not in self._held[every] and self._bytes < _LIMIT:
                self._held[every][key] = row[:length].clone()
                self._bytes += row[:length].nbytes

    @contextlib.contextmanager
    def _given(self, ids: Tensor, lengths: Sequence[int], every: bool) -> Iterator[None]:
        """Inside, the first blocks compute nothing, and return what is held of ``ids``."""
        rows = [self._held[every][key] for key in _keys(ids, lengths)] if self._first(every) else []
        hidden = rows[0].new_zeros((*ids.shape, *rows[0].shape[1:])) if rows else None
        for at, row in enumerate(rows):
            hidden[at, : len(row)] = row  # type: ignore[index]
        output = (hidden,) if self._in_tuple else hidden
        with contextlib.ExitStack() as stack:
            for block in self._first(every):
                stack.enter_context(swapped(block, _returning(output, block.forward)))
            yield


def _returning(output: Any, forward: Any) -> Any:
    """A forward pass that returns ``output``; in other threads, which may use the model otherwise, ``forward``."""
    thread = threading.get_ident()
    return lambda *args, **kwargs: output if threading.get_ident() == thread else forward(*args, **kwargs)


def _keys(ids: Tensor, lengths: Sequence[int]) -> list[bytes]:
    """What tells texts from each other."""
    return [row[:length].numpy().tobytes() for row, length in zip(ids.cpu(), lengths, strict=True)]
