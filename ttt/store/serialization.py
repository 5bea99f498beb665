"""States to and from bytes: a safetensors file whose metadata holds the caller's JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ttt.checks import check_dense, check_type

META = "ttt.store.meta"
"""The only entry of a file's metadata. Several entries have no fixed order: equal states would give different bytes."""
META_BYTES = 65536
"""The largest ``meta``, as JSON."""


def encode(tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a safetensors file with ``tensors`` and ``meta``.

    Args:
        tensors: name -> tensor of any shape and device, contiguous or not; each is copied.
        meta: a dict that JSON gives back unchanged, 64 KiB at most.

    Raises:
        TypeError: if ``tensors`` is no mapping, or a value no dense tensor.
        ValueError: if a name is not a string or is reserved, safetensors does not know a dtype, or ``meta`` is not such
            a dict.
    """
    check_type("tensors", tensors, Mapping, "a dict of tensors by name")
    copies = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"tensors has the name {name!r}; names must be strings other than '__metadata__'")
        check_dense(f"tensors[{name!r}]", tensor)
        copies[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    metadata = {META: _json_of(meta)}
    try:
        return safetensors.torch.save(copies, metadata)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"tensors cannot be stored as safetensors: {error}") from error


def decode(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) of the bytes of a safetensors file; the file's metadata if `encode` did not write it.

    Raises:
        ValueError: if ``data`` is not a whole safetensors file.
    """
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__", {})
        return tensors, json.loads(metadata[META]) if META in metadata else metadata
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not a whole safetensors file ({error})") from error


def _json_of(meta: Mapping[str, Any] | None) -> str:
    if meta is None:
        return "{}"
    try:
        text = json.dumps(meta, allow_nan=False)
        same = isinstance(meta, dict) and json.loads(text) == meta
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"meta must be a dict that JSON can hold: {error}") from None
    if not same:
        raise ValueError(f"meta must be a dict that JSON gives back unchanged (string keys, lists), got {meta!r:.200}")
    if len(text.encode()) > META_BYTES:
        raise ValueError(f"meta must take at most {META_BYTES} bytes as JSON, got {len(text.encode())}")
    return text
