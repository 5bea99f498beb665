"""``python -m ttt.demo.recall WEIGHTS ROWS``: load saved weights in a new process and score unread text with them.

The demo runs this command. ROWS is a JSON file with rows of bytes. It prints one line of JSON: ``frozen`` and
``loaded``, bits per byte before and after the weights are loaded, and ``bytes``, the number of bytes in ROWS.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import ttt
from ttt.demo.model import bits_per_byte, load_model


def main(weights: str, rows: str) -> None:
    """Score ``rows`` with the demo model, before and after ``weights`` are loaded."""
    model, _ = load_model()
    ids = torch.tensor(json.loads(Path(rows).read_text()))
    frozen = bits_per_byte(model, ids)
    ttt.load(model, weights)
    print(json.dumps({"frozen": frozen, "loaded": bits_per_byte(model, ids), "bytes": ids.numel()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
