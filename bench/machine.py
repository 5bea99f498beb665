"""The machine and the command that a measurement was made with, for the head of every file of results."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ttt

DEVICES = ("cpu", "cuda")
"""Where a model can be measured."""


def check_device(device: str) -> None:
    """Raise ValueError unless ``device`` is one of `DEVICES`, and is there."""
    if device not in DEVICES:
        raise ValueError(f"device must be one of {list(DEVICES)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' where torch.cuda.is_available() is False, got 'cuda'")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads, instruction set of the kernels, and the versions of Python and torch.

    Args:
        device: one of `DEVICES`; for "cuda" also the GPU and the versions of CUDA and triton.
    """
    found, gpu = ttt.info(file=None), {}
    if device == "cuda":
        gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": found["triton"]}
    return {
        **gpu,
        "processor": found["processor"],
        "cores": os.cpu_count(),
        "threads": found["threads"],
        "isa": found["isa"],
        "python": found["python"],
        "torch": found["torch"],
    }


def name_of(found: Mapping[str, Any]) -> str:
    """What computed, by the dict that `machine` returned: the GPU, or the processor."""
    return found.get("gpu") or found["processor"]


def provenance(device: str) -> dict[str, Any]:
    """`machine`, and the device, operating system, version of triton, git commit, date and command line.

    Args:
        device: "cpu" or "cuda"; stored as ``kind``. ``device`` is its name.
    """
    found = machine()
    processor = found.pop("processor")
    name = f"{torch.cuda.get_device_name()} ({processor})" if device == "cuda" else processor
    return {
        "device": name,
        "kind": device,
        **found,
        "triton": ttt.info(file=None)["triton"],
        "system": platform.platform(),
        "commit": _git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
