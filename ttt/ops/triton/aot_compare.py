"""Whether a kernel has become worse than in a file that `ttt.ops.triton.aot` wrote before."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
_ALLOWED = 0.1  # of the bytes that are loaded, which may go over to narrower instructions


def key_of(row: Row) -> tuple[str, str, str]:
    """What a row is compared by: its kernel, its variant and the target."""
    return row["kernel"], row["variant"], row["target"]


def wide_share(row: Row) -> float:
    """The share of the bytes that one pass over the instructions loads with instructions of 128 bits."""
    total = sum(int(bits) * count for bits, count in row["loads"].items())
    return 128 * row["loads"].get("128", 0) / total if total else 1.0


def worse(new: Row, old: Row) -> list[str]:
    """In words, what is worse in ``new``: more memory for spills, narrower loads, or no tensor instructions any more.

    A row of a kernel that could not be compiled holds only why, in ``failed``.
    """
    if "failed" in new or "failed" in old:
        return [] if "failed" in old else [f"it does not compile any more: {new['failed']}"]
    found = [f"{name} rose from {old[name]} to {new[name]}" for name in ("stack", "spills") if new[name] > old[name]]
    if wide_share(new) < wide_share(old) - _ALLOWED:
        found.append(f"loads of 128 bits carry {wide_share(new):.0%} of the bytes, and carried {wide_share(old):.0%}")
    if old["tensor"] and not new["tensor"]:
        found.append(f"no tensor instruction is left of {old['tensor']}")
    return found


def compare(new: list[Row], old: list[Row]) -> list[str]:
    """One line for everything that is worse in ``new``, of the rows that ``old`` has, too."""
    before = {key_of(row): row for row in old}
    return [
        f"{' '.join(key_of(row))}: {what}"
        for row in new
        if key_of(row) in before
        for what in worse(row, before[key_of(row)])
    ]
