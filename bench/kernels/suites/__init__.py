"""The suites and their cases on each device. To add a suite, add a file here and a line in `SUITES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.kernels.case import Case
from bench.kernels.suites import (
    commit,
    decode,
    fisher,
    generate,
    growth,
    head,
    language,
    loops,
    low_rank,
    mixture,
    observe,
    sequence,
    sequence_training,
    window_linear,
)

SUITES: dict[str, Callable[[str], list[Case]]] = {
    "commit": commit.cases,
    "decode": decode.cases,
    "window_linear": window_linear.cases,
    "fisher": fisher.cases,
    "observe": observe.cases,
    "language": language.cases,
    "mixture": mixture.cases,
    "generate": generate.cases,
    "loops": loops.cases,
    "head": head.cases,
    "growth": growth.cases,
    "low_rank": low_rank.cases,
    "sequence": lambda device: sequence.cases(device) + sequence_training.cases(device),
}


def select(device: str, suites: Sequence[str] = tuple(SUITES), only: str = "", quick: bool = False) -> list[Case]:
    """The cases of ``suites``, in their order.

    Args:
        device: "cpu" or "cuda".
        only: select the cases whose "suite: name, dtype" contains this text.
        quick: select the cases marked as ``quick``.

    Raises:
        ValueError: for an unknown suite.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise ValueError(f"suite must be of {', '.join(SUITES)}, got {', '.join(map(repr, unknown))}")
    found = [case for suite in suites for case in SUITES[suite](device)]
    return [c for c in found if only in f"{c.suite}: {c.name}, {c.dtype}" and (c.quick or not quick)]
