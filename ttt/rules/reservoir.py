"""`SampleReservoir`: a uniform sample, of fixed size, of all samples so far."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ttt.checks import check_whole
from ttt.ops.philox import INSERT, philox
from ttt.ops.reference import MOST_ROWS_SEEN


class SampleReservoir:
    """A uniform sample of fixed size of all samples so far, by reservoir sampling (algorithm R; Vitter 1985).

    After N samples each of them is held with probability capacity / N. Slots are drawn from the counters that
    `ttt.ops.reservoir_insert` uses: the same seed keeps the same samples.

    Args:
        capacity: K >= 1.
        seed: of the slots, and of `draw`.

    Raises:
        ValueError: for a capacity below 1.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity, self.seed = check_whole("capacity", capacity, 1), seed
        self.seen = 0
        self.fields: dict[str, Tensor | None] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def check(self, **fields: Tensor | None) -> int:
        """N, if `insert` takes ``fields``. Nothing is changed.

        Raises:
            ValueError: for fields of different lengths, or other ones or other shapes than before.
        """
        given = {name: t.detach() for name, t in fields.items() if t is not None}
        lengths = {name: len(t) for name, t in given.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"fields must have one length, got {lengths}")
        if self.fields and {n for n, t in self.fields.items() if t is not None} != set(given):
            raise ValueError(f"fields must be {sorted(self.fields)} as before, got {sorted(given)}")
        for name, t in given.items():
            held = self.fields.get(name)
            if held is not None and held.shape[1:] != t.shape[1:]:
                shape = ", ".join(["N", *map(str, held.shape[1:])])
                raise ValueError(f"{name} must have shape ({shape}) as before, got {tuple(t.shape)}")
        return next(iter(lengths.values()))

    def insert(self, **fields: Tensor | None) -> None:
        """Add N samples. Each field is (N, ...), or None in every call.

        Raises:
            ValueError: as `check`; nothing has changed then.
        """
        self.admit(
            self.check(**fields),
            lambda rows: {n: None if t is None else t.detach()[rows] for n, t in fields.items()},
        )

    def admit(self, count: int, fields_of: Callable[[Tensor], dict[str, Tensor | None]]) -> None:
        """Add ``count`` samples, computing the fields only of those that stay.

        Args:
            count: samples that are offered.
            fields_of: maps the indices (R,) int64 of samples that stay to their fields, each (R, ...) or None. It is
                not called if none stays.
        """
        s = self.seen + torch.arange(count)
        last = s.clamp_max(MOST_ROWS_SEEN - 1)  # rows beyond are sampled as the last of so many
        slots = torch.where(s < self.capacity, s, (philox(s, 0, 0, INSERT, self.seed)[0] * (last + 1)) >> 32)
        kept = dict(zip(slots.tolist(), range(count), strict=True))  # in order: the last of two samples stays
        pairs = [(slot, row) for slot, row in kept.items() if slot < self.capacity]
        if pairs:
            into, rows = torch.tensor(pairs).T
            for name, t in fields_of(rows).items():
                if self.seen == 0:
                    self.fields[name] = None if t is None else t.new_zeros((self.capacity, *t.shape[1:]))
                if (held := self.fields[name]) is not None and t is not None:
                    held[into] = t.to(held.dtype)
        self.seen += count

    def draw(self, rows: int) -> dict[str, Tensor | None]:
        """Draw ``rows`` distinct samples, or all if fewer are held, in random order; {} while it is empty."""
        if not len(self):
            return {}
        index = torch.randperm(len(self), generator=self.generator)[:rows]
        return {name: None if t is None else t[index] for name, t in self.fields.items()}

    def state(self) -> tuple:
        """A copy of the samples and of the state of the random draws."""
        fields = {name: None if t is None else t.clone() for name, t in self.fields.items()}
        return self.seen, fields, self.generator.get_state()

    def load_state(self, state: tuple) -> None:
        """Restore what `state` returned, bit for bit."""
        self.seen, fields, drawn = state
        self.fields = {name: None if t is None else t.clone() for name, t in fields.items()}
        self.generator.set_state(drawn)

    def tensors(self) -> list[Tensor]:
        """The tensors that are held, for counting bytes."""
        return [t for t in self.fields.values() if t is not None]
