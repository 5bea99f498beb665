"""`Sharding`: which dimension of a layer's weight is spread over processes (tensor parallelism), and sums over them.

Of a row-parallel layer every process holds some of the inputs and the columns of the weight that belong to them, of a
column-parallel layer some of the outputs and their rows. Inputs, gradients and all state with that dimension are spread
in the same way; everything else is computed by every process, and is the same in all of them, to the bit where they run
on processors of one kind. A sum over the inputs or the outputs of a layer is the sum of the processes' parts. So
whatever computes one goes through the `Side` that it sums over, which for a layer that is whole does nothing.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ttt.ops import cpu


def is_sharded(t: Any) -> bool:
    """Whether ``t`` is a DTensor, of which this process holds a part."""
    return hasattr(t, "device_mesh")


def whole(t: Any) -> Tensor:
    """``t``, or of a DTensor all of it, which the processes gather."""
    return t.full_tensor() if is_sharded(t) else t


class Side:
    """The inputs or the outputs of a layer, all of which are in this process."""

    shared = False

    def size(self, part: int) -> int:
        """How many there are in all, if this process holds ``part`` of them."""
        return part

    def sum(self, t: Tensor) -> Tensor:
        """The sum of the processes' ``t``, the same to the bit in all of them."""
        return t

    def same(self, t: Tensor) -> Tensor:
        """The first process's ``t``, for what all compute but which must not differ by a bit (eigenvectors)."""
        return t

    def gather(self, t: Tensor) -> Tensor:
        """The whole of ``t`` (..., part), joined along its last dimension from those of all processes."""
        return t

    def part(self, t: Tensor) -> Tensor:
        """This process's part of ``t`` (..., size)."""
        return t

    def norms(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The lengths (T,) of ``rows`` (T, part), or (L, T) of (L, T, part), computed in ``dtype``."""
        if dtype == torch.float32 and cpu.takes(rows):
            return cpu.row_dots(rows, rows).sqrt_()
        return torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)


class SharedSide(Side):
    """The inputs or the outputs of a layer, of which each process of a group holds a part.

    Args:
        group: the processes.
        sizes: how many each of them holds, in the order of their ranks in ``group``.
        device: of the tensors that the processes exchange.
    """

    shared = True

    def __init__(self, group: dist.ProcessGroup, sizes: tuple[int, ...], device: torch.device) -> None:
        self.group, self.sizes, self.device = group, sizes, device
        self.rank = dist.get_rank(group)

    def __deepcopy__(self, memo: dict) -> SharedSide:
        return self  # a process group cannot be copied

    def size(self, part: int) -> int:
        return sum(self.sizes)

    def sum(self, t: Tensor) -> Tensor:
        t = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(t, group=self.group)
        return t

    def same(self, t: Tensor) -> Tensor:
        t = t.clone(memory_format=torch.contiguous_format)
        dist.broadcast(t, dist.get_global_rank(self.group, 0), group=self.group)
        return t

    def gather(self, t: Tensor) -> Tensor:
        # All parts must have one size to be gathered.
        padded = torch.nn.functional.pad(t, (0, max(self.sizes) - t.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[..., :size] for part, size in zip(parts, self.sizes, strict=True)], -1)

    def join(self, t: Tensor) -> Tensor:
        """The rows of all processes' ``t`` (T, ...), of which each may have another number T, in the order of ranks."""
        own = torch.tensor([len(t)], device=t.device)
        counts = [torch.empty_like(own) for _ in self.sizes]
        dist.all_gather(counts, own, group=self.group)
        rows = [int(count) for count in counts]
        padded = t.new_zeros(max(rows), *t.shape[1:])
        padded[: len(t)] = t
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    def part(self, t: Tensor) -> Tensor:
        start = sum(self.sizes[: self.rank])
        return t[..., start : start + self.sizes[self.rank]]

    def norms(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return self.sum(super().norms(rows, dtype).square_()).sqrt_()


WHOLE = Side()


class Sharding:
    """How the weight (m, n) of a layer is spread over processes.

    Attributes:
        input, output: the `Side` of the n inputs and that of the m outputs; at most one of them is shared.
        side: the shared one; None for a layer that is whole.
    """

    def __init__(self, input: Side = WHOLE, output: Side = WHOLE, mesh: Any = None) -> None:
        self.input, self.output, self._mesh = input, output, mesh
        self.side: SharedSide | None = next((side for side in (input, output) if isinstance(side, SharedSide)), None)

    def __bool__(self) -> bool:
        return self.side is not None

    def __deepcopy__(self, memo: dict) -> Sharding:
        return self

    def sum(self, t: Tensor) -> Tensor:
        """The sum of ``t``, itself a sum over the elements of a matrix that is spread as the weight is."""
        return t if self.side is None else self.side.sum(t)

    def norm(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """The norm, (), of a ``matrix`` (m, n) that is spread as the weight is, or (L,) of L, computed in ``dtype``."""
        found = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=dtype)
        return found if self.side is None else self.side.sum(found.square()).sqrt()

    def shape(self, matrix: Tensor) -> tuple[int, int]:
        """(m, n) of the whole of a ``matrix`` that is spread as the weight is."""
        return self.output.size(matrix.shape[0]), self.input.size(matrix.shape[1])

    def gather(self, matrix: Tensor) -> Tensor:
        """The whole of a ``matrix`` (m, n) that is spread as the weight is."""
        if self.output.shared:
            return self.output.gather(matrix.T).T.contiguous()
        return self.input.gather(matrix)

    def part(self, matrix: Tensor) -> Tensor:
        """This process's part of a whole ``matrix`` (m, n)."""
        return self.output.part(self.input.part(matrix).T).T

    # -- torch.distributed.tensor, in which other parts of a model know of the sharding --------------------------------

    def dtensor(self, part: Tensor) -> Tensor:
        """The weight or the bias of the layer as a DTensor that shares the memory of ``part``."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape = list(part.shape)
        placement: Any = Replicate()
        if self.output.shared:
            shape[0], placement = self.output.size(shape[0]), Shard(0)
        elif part.ndim == 2:
            shape[1], placement = self.input.size(shape[1]), Shard(1)
        return DTensor.from_local(
            part, self._mesh, [placement], run_check=False, shape=torch.Size(shape), stride=_strides(shape)
        )

    def called(self, forward: Callable[[Tensor], Tensor], x: Any) -> Any:
        """``forward`` of this process's part, for a DTensor ``x``, as torch's ``parallelize_module`` makes them."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        last = x.ndim - 1
        before, after = (Shard(last), Replicate()) if self.input.shared else (Replicate(), Shard(last))
        local = x.redistribute(placements=[before]).to_local(grad_placements=[before])
        # torch's collectives may give a tensor that is still on its way; a copy waits for it.
        y = forward(local if type(local) is Tensor else local.clone())
        shape = (*y.shape[:-1], self.output.size(y.shape[-1]))
        return DTensor.from_local(
            y, self._mesh, [after], run_check=False, shape=torch.Size(shape), stride=_strides(shape)
        )


UNSHARDED = Sharding()


def groups_of(shardings: Iterable[Sharding]) -> list[SharedSide]:
    """A side for each group of processes over which there is something shared; empty for one process."""
    sides = [sharding.side for sharding in shardings if sharding.side is not None]
    return list({id(side.group): side for side in sides}.values())


# -- what the processes decide together -----------------------------------------------------------------------------


def agreed(processes: Sequence[SharedSide], good: Tensor) -> Tensor:
    """Where ``good``, bool of any shape, is True in all ``processes``."""
    for side in processes:
        good = side.sum((~good).long()) == 0
    return good


@contextlib.contextmanager
def together(processes: Sequence[SharedSide], what: str) -> Iterator[None]:
    """Inside, an error in one of the ``processes`` is an error in all, so that none waits for one that gave up.

    For checks, in which the processes exchange nothing, before ``what`` writes anything.

    Raises:
        RuntimeError: at the end, if another process raised.
    """
    good = False
    try:
        yield
        good = True
    finally:
        all_good = good
        for side in processes:
            all_good = bool(side.sum(torch.tensor(not all_good, dtype=torch.int64, device=side.device)) == 0)
    if not all_good:
        raise RuntimeError(
            f"{what} was refused in another process that shares the model, whose error says why; nothing has changed"
        )


def require_same(processes: Sequence[SharedSide], what: str, *values: Any, **named: Any) -> None:
    """Raise ValueError, in all ``processes``, unless all were given the same.

    Args:
        what: the name of all values together.
        values: tensors, numbers, texts or None.
        named: more of them, by name; the error says which of these differ.
    """
    if not processes or _same_everywhere(processes, [*values, *named.values()]):
        return
    found = [name for name, value in named.items() if not _same_everywhere(processes, [value])]
    which = f" ({', '.join(found)})" if found else ""
    raise ValueError(f"{what} must be the same in all processes of a sharded model, got others in one of them{which}")


def _same_everywhere(processes: Sequence[SharedSide], values: Sequence[Any]) -> bool:
    """Whether all ``processes`` were given the same ``values``; each gets the same answer."""
    plain = [(tuple(v.shape), v.tolist()) if isinstance(v, Tensor) else v for v in values]
    same = True
    for side in processes:
        own = torch.tensor(zlib.crc32(repr(plain).encode()), device=side.device)
        same = bool(agreed(processes, side.same(own) == own)) and same
    return same


def same_bits(processes: Sequence[SharedSide], tensors: Iterable[Tensor]) -> bool:
    """Whether all ``processes`` hold the same ``tensors``, in the same order, to the bit; each gets the same answer."""
    own, same = torch.zeros((), dtype=torch.int64), True
    for t in tensors:
        own = 3 * own + _digest(t)
    for side in processes:
        digest = own.to(side.device)
        same = bool(agreed(processes, side.same(digest) == digest)) and same
    return same


_DIGESTED = 1 << 20  # numbers of which a digest is made at a time


def _digest(t: Tensor) -> Tensor:
    """(), int64: a sum that depends on every bit of ``t`` and on their places."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    found = torch.zeros((), dtype=torch.int64, device=t.device)
    for start, part in enumerate(t.detach().contiguous().flatten().view(kind).split(_DIGESTED)):
        bits, first = part.long(), start * _DIGESTED
        places = torch.arange(first, first + len(bits), device=t.device)
        found += ((bits ^ (bits >> 17)) * (2 * places + t.numel())).sum()
    return found.cpu()


def _strides(shape: Any) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()
