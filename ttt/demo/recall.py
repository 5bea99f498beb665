"""``python -m ttt.demo.recall WEIGHTS ROWS``: what a process that has read nothing knows with a user's weights.

ROWS is a JSON file with rows of bytes. Prints one line of JSON: bits per byte frozen and with the weights loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import ttt
from ttt.demo.model import bits_per_byte, load_model


def main(weights: str, rows: str) -> None:
    model, _ = load_model()
    ids = torch.tensor(json.loads(Path(rows).read_text()))
    frozen = bits_per_byte(model, ids)
    ttt.load(model, weights)
    print(json.dumps({"frozen": frozen, "loaded": bits_per_byte(model, ids), "bytes": ids.numel()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
