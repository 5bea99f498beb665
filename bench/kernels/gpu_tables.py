"""Tables of docs/gpu.md: what the compiler made of the Triton kernels, how long they should take, and do take."""

from __future__ import annotations

import re
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


def measured(results: Mapping[str, Any], suite: str) -> list[tuple[str, ...]]:
    """The cases of ``suite``: our time, that of the forward pass alone and of torch, and the share of the ceilings."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["suite"] == suite:
            cases.setdefault(row["case"], {})[row["contender"]] = row

    def us(row: Mapping[str, Any] | None) -> str:
        return "" if row is None else f"{row['us']:.0f}" if row["us"] >= 100 else f"{row['us']:.1f}"

    lines: list[tuple[str, ...]] = [
        ("case", "ttt, us", "nn.Linear, us", "ratio", "% of the copy", "% of the product", "torch, us", "compiled, us")
    ]
    for case, rows in cases.items():
        ours, forward = rows["ttt"], rows.get("nn.Linear", rows.get("forward"))
        shares = (ours["percent_of_copy"], ours["percent_of_square_matmul"])
        lines.append((
            case, us(ours), us(forward), f"{ours['ratio_to_forward']:.2f}",
            *("" if share is None else f"{share:.0f}" for share in shares),
            us(rows.get("plain torch")), us(rows.get("torch.compile")),
        ))  # fmt: skip
    used = [at for at, _ in enumerate(lines[0]) if any(line[at] for line in lines[1:])]
    return [tuple(line[at] for at in used) for line in lines]


def _measured(row: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The measured time of a predicted case, in us; "-" if it was not measured."""
    case = row["case"].replace("8-bit", "8bit")
    suite, contender = case.partition(" ")[0], "ttt"
    if case.startswith("`nn.Linear`"):
        suite, case, contender = "decode", "decode 4096x4096, window 64", "nn.Linear"
    tokens = re.search(r", (\d+) tokens at once", case)
    if tokens:
        case = case.replace(tokens[0], "") + ("" if tokens[1] == "1" else f", batch {tokens[1]}")
    wanted = (suite, case.partition(" ")[2], contender)
    found = [r["us"] for r in results["rows"] if (r["suite"], r["case"], r["contender"]) == wanted]
    return f"{found[0]:.1f}" if found else "-"


def predicted(results: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Predicted times on each GPU, what bounds the longest launch, the share of the ceiling; the time in ``run``."""
    gpus = list(results["ceilings"])
    head = [cell for gpu in gpus for cell in (f"{gpu}, us (predicted)", "of the bound")]
    last = f"the longest launch is bound by ({gpus[0]})"
    lines: list[tuple[str, ...]] = [("case", "launches", *head, last, "H200, us (measured)")]
    for row in results["rows"]:
        cells, first = [], row["predicted"][gpus[0]]
        for gpu in gpus:
            found = row["predicted"][gpu]
            cells += [f"{found['us']:.1f}", f"{found['us'] / found['bound_us']:.2f} x {_bound(row)}"]
        longest = max(first["launches"], key=lambda part: part["us"] * part["times"], default={"bound by": "bytes"})
        count = sum(part["times"] for part in first["launches"]) + len(row["products"])
        lines.append(
            (row["case"], f"{count:.2f}".rstrip("0").rstrip("."), *cells, longest["bound by"], _measured(row, run))
        )
    return lines


def _bound(row: Mapping[str, Any]) -> str:
    return "products" if row["matmul"] else "copy"
