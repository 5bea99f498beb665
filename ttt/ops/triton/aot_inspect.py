"""What the machine code of a kernel needs and contains: registers, memory, spills, loads and tensor instructions."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

_TENSOR = re.compile(r"\b(?:HGMMA|HMMA|IMMA|DMMA|UTC\w*MMA)\b")
_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.E((?:\.\w+)*)")
_AMD_LOAD = re.compile(r"\b(?:global|buffer)_load_(\w+)")
_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def inspect(compiled: Any) -> dict[str, Any]:
    """Count registers, spills, tensor instructions and loads, and measure stack and shared memory in bytes.

    Registers and stack are those of a thread. Spills are instructions that store or load spilled registers, on AMD the
    spilled registers. ``loads`` counts the instructions that load from global memory.
    """
    found = _amd(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _kept(compiled.asm["cubin"])
    return {**found, "shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}


def _kept(cubin: bytes) -> dict[str, Any]:
    """`_nvidia`, kept where Triton keeps what it has compiled: a listing takes longer than finding the kernel there."""
    key = hashlib.sha256(b"|".join((triton.__version__.encode(), Path(__file__).read_bytes(), cubin)))
    cache = get_cache_manager(key.hexdigest())
    path = cache.get_file("inspected.json")
    if path is None:
        path = cache.put(json.dumps(_nvidia(cubin)), "inspected.json", binary=False)
    found: dict[str, Any] = json.loads(Path(path).read_text())
    return found


def _nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(_first(r"REG:(\d+)", text)),
        "stack": int(_first(r"STACK:(\d+)", text)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "loads": _counted(_width_of(suffixes) for suffixes in _LOAD.findall(text)),
        "tensor": len(_TENSOR.findall(text)),
    }


def _width_of(suffixes: str) -> int:
    for part in suffixes.split("."):
        if part in ("64", "128", "U8", "S8", "U16", "S16"):
            return int(part.lstrip("US"))
    return 32


def _amd(text: str) -> dict[str, Any]:
    number = {
        name: int(_first(rf"\.{name}:\s+(\d+)", text))
        for name in ("vgpr_count", "agpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    }
    return {
        "registers": number["vgpr_count"],  # with those for accumulators
        "stack": number["private_segment_fixed_size"],
        "spills": number["vgpr_spill_count"] + number["sgpr_spill_count"],
        "loads": _counted(_amd_width_of(name) for name in _AMD_LOAD.findall(text)),
        "tensor": len(re.findall(r"\bv_s?mfma\w*", text)),
    }


def _amd_width_of(name: str) -> int:
    if name in _AMD_BITS:
        return _AMD_BITS[name]
    return 8 if "byte" in name else 16


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the listing of the machine code must hold {pattern!r}")
    return found[1]


def _counted(widths) -> dict[str, int]:
    counts: dict[str, int] = {}
    for width in widths:
        counts[str(width)] = counts.get(str(width), 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -int(item[0])))
