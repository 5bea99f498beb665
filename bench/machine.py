"""The machine and the command that a measurement was made with, for the head of every file of results."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import ttt


def machine() -> dict[str, Any]:
    """Processor, cores, threads, instruction set of the kernels, and the versions of Python and torch."""
    found = ttt.info(file=None)
    return {
        "processor": found["processor"],
        "cores": os.cpu_count(),
        "threads": found["threads"],
        "isa": found["isa"],
        "python": found["python"],
        "torch": found["torch"],
    }


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
