"""Reports which backends, instruction sets and devices this process uses, and why any of them is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from ttt.adapt.convert import left_out
from ttt.checks import check_model
from ttt.installing import how_to_install
from ttt.nn.base import Adapted
from ttt.ops import backends, cpu


class Report(dict[str, Any]):
    """What `info` returns: a dict that shows itself as the lines of a report."""

    def __repr__(self) -> str:
        return "\n".join(_lines(self))

    __str__ = __repr__


def info(file: TextIO | None = None, *, model: nn.Module | None = None) -> Report:
    """Return which backend runs each op on each device, and why a faster one is missing.

    Args:
        file: a text file to print the report to; None prints nothing.
        model: an adapted model, for the last two keys; None for none.

    Returns:
        A dict that Python shows, and ``print`` prints, as a report of one line for each entry. Its keys are

        - ``ttt``, ``python``, ``torch``, ``triton``: versions; None if not installed;
        - ``processor``: its name; ``threads``: the number of threads that torch and the C++ kernels use;
        - ``isa``: the instruction set of the C++ kernels, None without them; ``isas``: all that this processor has;
        - ``devices``: ``"cpu"``, then each CUDA device with its name;
        - ``ops``: op -> {``"cpu"``: backend, ``"cuda"``: backend};
        - ``missing``: backend -> the reason why it cannot be used;
        - ``isolation``: dtype -> whether torch's linear layer on the CPU keeps the rows of a batch apart;
        - ``calls``: ``"OP on BACKEND"`` -> number of calls in this process, where the fastest backend ran;
        - ``slow_calls``: ``"OP on BACKEND: REASON"`` -> number of calls that a slower backend ran, for that reason;
        - ``learning``: names of the layers of ``model`` that learn;
        - ``left_out``: name -> why ``target_modules="all-linear"`` did not take it.

    Raises:
        TypeError: if ``file`` is no text file, or ``model`` no module.
    """
    if file is not None and not callable(getattr(file, "write", None)):
        raise TypeError(f"file must be a text file to write to, or None, got {type(file).__name__}")
    found = Report({
        "ttt": _version("ttt"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "isa": None,
        "isas": [],
        "devices": ["cpu"],
        "missing": dict(backends.unavailable),
    })  # fmt: skip
    if cpu._C is not None:
        found["isa"], found["isas"] = cpu._C.active_isa(), cpu._C.available_isas()
    if torch.cuda.is_available():
        found["devices"] += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        found["missing"]["cuda"] = "torch.cuda.is_available() is False: no CUDA device, or a torch built without CUDA"
    if importlib.util.find_spec("triton") is None:
        found["missing"]["triton"] = f"the package triton is not installed ({how_to_install('triton')})"
    on_cpu = f"C++ ({found['isa']}; float32, bfloat16), reference (others)" if found["isa"] else "reference"
    on_cuda = "reference" if "triton" in found["missing"] else "Triton (float32, bfloat16, float16), reference (others)"
    joined = dict.fromkeys(backends.JOINED, "as two ops")
    found["ops"] = {op: {"cpu": joined.get(op, on_cpu), "cuda": on_cuda} for op in backends.OPS}
    one_by_one = backends.ONE_BY_ONE
    many = {device: on.replace("reference", one_by_one) for device, on in (("cpu", on_cpu), ("cuda", on_cuda))}
    for op in backends.MANY:
        found["ops"][op] = many if op in backends.MANY_ON_GPU else {**many, "cuda": one_by_one}
    found["isolation"] = {str(dtype).removeprefix("torch."): _isolation(dtype) for dtype in _PROBED}
    found["calls"] = {f"{op} on {b}": n for (op, b, why), n in sorted(backends.calls.items()) if not why}
    found["slow_calls"] = {f"{op} on {b}: {why}": n for (op, b, why), n in sorted(backends.calls.items()) if why}
    if model is not None:
        names = [name for name, module in check_model(model).named_modules() if isinstance(module, Adapted)]
        found["learning"], found["left_out"] = names, left_out(model)
    if file is not None:
        print(found, file=file)
    return found


_PROBED = (torch.float32, torch.bfloat16, torch.float16)
_ROWS_APART = "torch.nn.functional.linear keeps the rows of a batch apart"
_ROWS_MIXED = (
    "torch.nn.functional.linear turns rows into NaN beside a row that holds an infinity or NaN (inputs of {widths} "
    "features; multiples of 32 are safe on processors with AMX). ttt's layers for users take such rows out first. The "
    "model's other layers do not: one user's overflow can cause chunks of other users in the batch to be rejected, but "
    "nothing wrong is learnt. With ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16, set before torch is imported, AMX is not used"
)


def _isolation(dtype: torch.dtype) -> str:
    """What torch's product of ``dtype`` on the CPU does to rows beside one that is not finite."""
    leaking = [str(width) for width in (64, 65, 80, 100, 500) if _leaks(dtype, width)]
    return _ROWS_MIXED.format(widths=", ".join(leaking)) if leaking else _ROWS_APART


@torch.no_grad()
def _leaks(dtype: torch.dtype, width: int) -> bool:
    """Whether a row of infinities and one of NaN change a bit of the other rows of a product of ``width`` inputs."""
    generator = torch.Generator().manual_seed(width)
    rows, weight = (torch.randn(k, width, generator=generator).to(dtype) for k in (48, 32))
    spoilt = rows.clone()
    spoilt[7], spoilt[30] = torch.inf, torch.nan
    others = torch.ones(len(rows), dtype=torch.bool).index_fill_(0, torch.tensor([7, 30]), False)
    want, found = (torch.nn.functional.linear(t, weight)[others] for t in (rows, spoilt))
    return not torch.equal(want, found)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(found: Report) -> Iterator[str]:
    """A line for each entry; a caller may have taken entries out."""
    for key in ("ttt", "python", "torch", "triton", "processor", "threads"):
        if key in found:
            yield f"{key:12}{found[key] if found[key] is not None else 'not installed'}"
    if "isa" in found:
        forced = f" (forced by {cpu.ISA_VARIABLE})" if os.environ.get(cpu.ISA_VARIABLE) else ""
        has = ", ".join(found.get("isas", ())) or "unknown"
        yield f"{'isa':12}{found['isa']}{forced}; this processor has {has}"
    if "devices" in found:
        yield f"{'devices':12}{'; '.join(found['devices'])}"
    for title in ("missing", "ops", "isolation", "calls", "slow_calls", "left_out"):
        for key, value in found.get(title, {}).items():
            text = "; ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
            yield f"{title:12}{key}: {text}"
    for name in found.get("learning", ()):
        yield f"{'learning':12}{name}"
