"""What the experiments on the demo's model begin with: their options, the model, and the text that it knows."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor, nn

import ttt
from ttt.demo.model import COMBINED, calibration_batches, load_model, windows
from ttt.demo.text import held_out_python

Setting = tuple[nn.Module, ttt.TTTConfig, Tensor, list[Tensor]]
"""The byte-level model, the demo's configuration, windows of text to measure forgetting on, and calibration batches."""


def options_of(doc: str, size: int, results: Path) -> argparse.Namespace:
    """``bytes`` to read of each text, by default ``size``, and ``json``, the file to write, by default ``results``."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=size, help="bytes to read of each text")
    parser.add_argument("--json", type=Path, default=results, help="file to write")
    return parser.parse_args()


def setting() -> Setting:
    """Load what the experiments share."""
    model, config = load_model()[0], COMBINED
    return model, config, windows(held_out_python(), 32), calibration_batches()
