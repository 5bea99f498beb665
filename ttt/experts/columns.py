"""`Column`: what was learnt in one domain, as low-rank factors of W - W* for every learning layer."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ttt.adapt import checkpoint
from ttt.adapt.convert import require_layers
from ttt.adapt.validate import parse_json
from ttt.checks import check_number, check_path, check_whole
from ttt.experts.signature import Signature, joined
from ttt.files import write_atomically

_LARGEST_METADATA = 1 << 20  # bytes; a column takes about 100
_COUNTS = ("pairs", "first", "second")
_OVERSAMPLED, _ITERATIONS = 8, 2  # of the range finder; advice of Halko et al. for slowly decaying spectra


@dataclasses.dataclass(frozen=True)
class Column:
    """W - W* = b^T a for every layer, in the learner's order. It never changes.

    Attributes:
        a: of every layer (r, n), float32 (float64 for float64 weights); r <= min(m, n).
        b: of every layer (r, m). The square root of each singular value is in both factors.
        tokens: number of tokens that were learnt in it.
        worth: bits per token that it gains over the anchor on its own text, as `ttt.GrowingLearner` measured.
        error: relative Frobenius error of the last truncation, over all layers together.
        signature: of the text that it has read.
    """

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    tokens: int
    worth: float
    error: float
    signature: Signature

    @property
    def bytes(self) -> int:
        """Memory of its factors and its signature."""
        return sum(t.numel() * t.element_size() for t in (*self.a, *self.b)) + self.signature.bytes

    def delta(self, layer: int) -> Tensor:
        """(m, n): W - W* of one layer. A new tensor."""
        return self.b[layer].T @ self.a[layer]


@torch.no_grad()
def compress(deltas: Sequence[Tensor], rank: int, tokens: int, worth: float, signature: Signature, seed: int) -> Column:
    """Truncate ``deltas``, (m, n) of every layer, to a column of ``rank``, nearly the best one in the Frobenius norm.

    By a randomised SVD (Halko, Martinsson, Tropp 2011, algorithm 4.4) with random numbers from ``seed``, which differ
    between kinds of devices. ``tokens``, ``worth`` and ``signature`` are those of the `Column`.
    """
    a, b, kept, whole = [], [], 0.0, 0.0
    for number, delta in enumerate(deltas):
        delta = delta if delta.dtype == torch.float64 else delta.float()
        generator = torch.Generator(delta.device).manual_seed(seed + number)
        width = min(rank + _OVERSAMPLED, *delta.shape)
        start = torch.randn(delta.shape[1], width, generator=generator, device=delta.device, dtype=delta.dtype)
        q = torch.linalg.qr(delta @ start).Q
        for _ in range(_ITERATIONS):
            q = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ q).Q).Q
        u, s, vh = torch.linalg.svd(q.T @ delta, full_matrices=False)
        root = s[:rank].sqrt().unsqueeze(1)
        a.append(root * vh[:rank])
        b.append(root * (q @ u[:, :rank]).T)
        kept += float(s[:rank].square().sum(dtype=torch.float64))
        whole += float(delta.square().sum(dtype=torch.float64))
    return Column(tuple(a), tuple(b), tokens, worth, _missing(kept, whole), signature)


@torch.no_grad()
def merge(one: Column, other: Column, rank: int) -> Column:
    """The mean of two columns, deltas and worth, weighted by their tokens, truncated to ``rank``.

    It is exact, and makes no m x n matrix: the QR decompositions of the stacked factors leave an SVD of 2r x 2r.
    """
    tokens = one.tokens + other.tokens
    share = one.tokens / tokens
    a, b, kept, whole = [], [], 0.0, 0.0
    for a1, b1, a2, b2 in zip(one.a, one.b, other.a, other.b, strict=True):
        qa, ra = torch.linalg.qr(torch.cat([a1, a2]).T)
        qb, rb = torch.linalg.qr(torch.cat([share * b1, (1 - share) * b2]).T)
        u, s, vh = torch.linalg.svd(rb @ ra.T)
        root = s[:rank].sqrt().unsqueeze(1)
        a.append(root * (qa @ vh[:rank].T).T)
        b.append(root * (qb @ u[:, :rank]).T)
        kept += float(s[:rank].square().sum(dtype=torch.float64))
        whole += float(s.square().sum(dtype=torch.float64))
    worth = share * one.worth + (1 - share) * other.worth
    return Column(tuple(a), tuple(b), tokens, worth, _missing(kept, whole), joined(one.signature, other.signature))


def _missing(kept: float, whole: float) -> float:
    return math.sqrt(max(0.0, 1 - kept / whole)) if whole else 0.0


def save(columns: Sequence[Column], model: nn.Module, path: str | os.PathLike) -> None:
    """Write ``columns`` of ``model`` to ``path``, safely as `ttt.save` does.

    Raises:
        OSError: if the file cannot be written; an existing file stays as it was.
    """
    tensors = {
        f"{number}.{side}.{layer}": t.cpu().contiguous()
        for number, column in enumerate(columns)
        for side in ("a", "b")
        for layer, t in enumerate(getattr(column, side))
    }
    for number, column in enumerate(columns):
        for name, counts in zip(_COUNTS, column.signature.counts, strict=True):
            tensors[f"{number}.{name}"] = counts.cpu()
    rows = [{"tokens": c.tokens, "worth": c.worth, "error": c.error} for c in columns]
    metadata = {
        "format": checkpoint.FORMAT,
        "format_version": checkpoint.FORMAT_VERSION,
        "columns": json.dumps(rows),
        "base_sha256": checkpoint.base_hash(model),
        "tensors_sha256": checkpoint.tensor_hash(tensors),
    }
    write_atomically(check_path("path", path), safetensors.torch.save(tensors, metadata))


def _rows_of(text: str, path: str) -> list[dict[str, Any]]:
    """The numbers of every column, from the metadata of a file.

    Raises:
        ValueError: if it is no list of them.
    """
    what = f"{path} is damaged: columns in its metadata"
    rows = parse_json(text, what, _LARGEST_METADATA)
    if not isinstance(rows, list):
        raise ValueError(f"{what} must be a list, got {type(rows).__name__}")
    for row in rows:
        if not isinstance(row, dict) or set(row) != {"tokens", "worth", "error"}:
            raise ValueError(f"{what} must hold tokens, worth and error of every column, got {row!r:.200}")
        check_whole(f"{what}: tokens", row["tokens"], 0)
        check_number(f"{what}: worth", row["worth"], -math.inf, finite=True)
        check_number(f"{what}: error", row["error"], 0.0, finite=True)
    return rows


def _check_values(what: str, a: Sequence[Tensor], b: Sequence[Tensor], signature: Signature) -> None:
    """Raise ValueError unless all values are finite floats, and all counts at least 0."""
    for name, tensors in (("a", a), ("b", b), ("signature", signature.counts)):
        for t in tensors:
            if not t.is_floating_point() or not bool(torch.isfinite(t).all()):
                raise ValueError(f"{what}: {name} must hold finite floats")
            if name == "signature" and bool((t < 0).any()):
                raise ValueError(f"{what}: counts of the signature must be at least 0")


def load(model: nn.Module, path: str | os.PathLike) -> list[Column]:
    """The columns in a file of `save`, on the devices of ``model``'s learning layers.

    Raises:
        TypeError: if ``path`` is no path.
        ValueError: if the file is truncated, damaged, holds no columns, or belongs to another model.
        OSError: if the file cannot be read.
    """
    layers, path = require_layers(model), check_path("path", path)
    tensors, metadata = checkpoint.read_tensors(path)
    if "columns" not in metadata:
        raise ValueError(f"{path} holds no columns")
    if metadata.get("base_sha256") != checkpoint.base_hash(model):
        raise ValueError(f"{path} belongs to another base model: the hash of the base weights differs")
    found = []
    for number, row in enumerate(_rows_of(metadata["columns"], str(path))):
        try:
            a, b = (
                tuple(tensors[f"{number}.{side}.{i}"].to(layer.weight.device) for i, layer in enumerate(layers))
                for side in ("a", "b")
            )
            signature = Signature.of(*(tensors[f"{number}.{name}"].to(layers[0].weight.device) for name in _COUNTS))
        except KeyError as error:
            raise ValueError(f"{path} does not fit this model's learning layers: {error} is missing") from None
        shapes = [(layer.out_features, layer.in_features) for layer in layers]
        pairs = list(zip(a, b, strict=True))
        if (
            any(x.ndim != 2 or y.ndim != 2 or len(x) != len(y) for x, y in pairs)
            or [(y.shape[1], x.shape[1]) for x, y in pairs] != shapes
        ):
            raise ValueError(f"{path} does not fit this model's learning layers of shapes {shapes}")
        _check_values(f"{path}: column {number}", a, b, signature)
        found.append(Column(a, b, signature=signature, **row))
    return found
