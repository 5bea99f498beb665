"""Tables of docs/gpu.md: what the compiler made of the Triton kernels, and how long they should take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttt.ops.triton.aot_compare import wide_share

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if "failed" in row:
        return "not compiled"
    shared, wide = f"{row['shared'] / 1024:.1f}", f"{100 * wide_share(dict(row)):.0f}"
    return f"{row['registers']} / {shared} / {row['spills']} / {wide} / {row['tensor']}"


def compiled(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The first variant of each kernel that was compiled for bfloat16, or its first one, on every target."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        cells.setdefault(row["kernel"], {}).setdefault(row["variant"], {})[row["target"]] = row
    lines: list[tuple[str, ...]] = [("kernel", "variant", *TARGETS)]
    for kernel, variants in cells.items():
        chosen = next((name for name in variants if name.startswith("bfloat16")), next(iter(variants)))
        lines.append((f"`{kernel}`", chosen, *(_cell(variants[chosen].get(target)) for target in TARGETS)))
    return lines


def predicted(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Predicted times on each GPU, what bounds the longest launch, and the share of the ceiling."""
    gpus = list(results["ceilings"])
    head = [cell for gpu in gpus for cell in (f"{gpu}, us (predicted)", "of the bound")]
    lines: list[tuple[str, ...]] = [("case", "launches", *head, f"the longest launch is bound by ({gpus[0]})")]
    for row in results["rows"]:
        cells, first = [], row["predicted"][gpus[0]]
        for gpu in gpus:
            found = row["predicted"][gpu]
            cells += [f"{found['us']:.1f}", f"{found['us'] / found['bound_us']:.2f} x {_bound(row)}"]
        longest = max(first["launches"], key=lambda part: part["us"] * part["times"], default={"bound by": "bytes"})
        count = sum(part["times"] for part in first["launches"]) + len(row["products"])
        lines.append((row["case"], f"{count:.2f}".rstrip("0").rstrip("."), *cells, longest["bound by"]))
    return lines


def _bound(row: Mapping[str, Any]) -> str:
    return "products" if row["matmul"] else "copy"
