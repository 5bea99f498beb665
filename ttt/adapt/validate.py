"""Checks of everything that a file of `ttt.save` holds, before any of it reaches a model.

The checks run from cheap to expensive: the size of the header, the configuration, the shapes and dtypes of the header
against those that the configuration gives, then the values, and last a trial of the next commit on copies. All raise
ValueError with the name of what is wrong. `ttt.save` makes the checks of values, too: what it writes can be loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttt.checks import check_layers, check_names
from ttt.config import TTTConfig
from ttt.nn import Linear
from ttt.nn.gaussian import PAST, PRESENT
from ttt.nn.state import BASE
from ttt.ops import log8
from ttt.ops.reference import LARGEST_SEEN

Kind = tuple[tuple[int, ...], str]
"""Shape and dtype of a tensor; the dtype by the name that safetensors gives it."""

LARGEST = 2.0**40
"""Bound on weights, inputs, gradients, importance, one token's update, and the numbers of a configuration.

Products of two stay finite in float32, sums of thousands of them included."""
LARGEST_SQUARE = 2.0**80  # of sums of squared gradients (trace)
LARGEST_SUM = 2.0**200  # of sums kept in float64
LARGEST_COUNT = 2**62  # a counter must not overflow int64 when it goes on counting

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.uint8: "U8",
}  # fmt: skip
_COUNTERS = ("step", "tokens", "seen", "recent_seen")
_SUMS = ("moments", "input_sums", "output_sums", PAST[2], PRESENT[2])
_WRITTEN = ("weight", "trace", "momentum", "step", *PRESENT)  # by a commit
_ANCHOR = "anchor"
_DEPTH = 8  # of nested JSON values
_CONFIG_BYTES = 1 << 20
_HEADER_BYTES = 1 << 22  # of a header, beside that of its layers' tensors
_TENSORS, _ENTRY_BYTES = 64, 256  # of a layer, at most


# -- the header ---------------------------------------------------------------------------------------------------


def header_allowance(names: Iterable[str]) -> int:
    """The most bytes that the header of a file may take, of a model with the linear layers ``names``."""
    return _HEADER_BYTES + sum(_TENSORS * (_ENTRY_BYTES + 6 * len(name)) for name in names)


def check_header_size(path: Path, allowed: int) -> None:
    """Refuse a safetensors file whose header takes more than ``allowed`` bytes.

    Reading a header takes time and memory before anything is known about its content.

    Raises:
        ValueError: if it does, or if the file is too short for a header. OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(8)
    if len(start) < 8:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file ({len(start)} bytes)")
    size = int.from_bytes(start, "little")
    if size > allowed:
        raise ValueError(
            f"{path} is truncated, damaged or of another model: its header must take at most {allowed} bytes, "
            f"got {size}"
        )


def parse_json(text: str | bytes, what: str, largest: int) -> Any:
    """The JSON value ``text``: at most ``largest`` bytes, nested at most 8 deep, without NaN and Infinity.

    Raises:
        ValueError: otherwise; it begins with ``what``.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    if len(text) > largest:
        raise ValueError(f"{what} must take at most {largest} bytes, got {len(text)}")
    try:
        value = json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{what} cannot be read ({error})") from None
    except RecursionError:
        raise ValueError(f"{what} must be nested at most {_DEPTH} deep") from None
    _check_depth(value, what, _DEPTH)
    return value


def _check_depth(value: Any, what: str, depth: int) -> None:
    if isinstance(value, (dict, list)):
        if not depth:
            raise ValueError(f"{what} must be nested at most {_DEPTH} deep")
        for part in value.values() if isinstance(value, dict) else value:
            _check_depth(part, what, depth - 1)


def layer_names(text: str | None, what: str) -> list[str]:
    """The names of learning layers in a file's metadata.

    Raises:
        ValueError: if ``text`` is no JSON list of different strings.
    """
    names = parse_json(text or "", what, len(text or ""))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what} must be a list of strings, got {names!r:.200}")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{what} must hold at least one name, and none twice, got {names!r:.200}")
    return names


def config_of(text: str | None, what: str) -> TTTConfig:
    """The configuration in a file's metadata.

    Raises:
        ValueError: if it is no configuration, or one for users, whose state is not kept in such files.
    """
    values = parse_json(text or "", what, _CONFIG_BYTES)
    if not isinstance(values, dict):
        raise ValueError(f"{what} must be a dict, got {values!r:.200}")
    if values.get("users") is not None or values.get("per_user") is not None:
        raise ValueError(f"{what} is for weights of every user's own, which ttt.save does not write")
    check_names(f"{what}: target_modules", values.get("target_modules"))
    check_layers(f"{what}: layers", values.get("layers", "all"))
    check_numbers(values, what)
    try:
        return TTTConfig.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{what} is not valid ({error})") from None


def check_numbers(values: Any, what: str) -> None:
    """Raise ValueError unless every number in a configuration, however deep, is of at most `LARGEST`.

    Larger ones overflow in float32, or in the sizes of tensors. ``seed`` may be any whole number of 63 bits.
    """
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    for key, value in items:
        if isinstance(value, (Mapping, list, tuple)):
            check_numbers(value, f"{what}: {key}")
        elif isinstance(value, (int, float)) and key != "seed" and not abs(value) <= LARGEST:
            raise ValueError(f"{what}: {key} must be a number in [{-LARGEST:g}, {LARGEST:g}], got {value!r:.80}")


# -- shapes -------------------------------------------------------------------------------------------------------


def blank_layer(weight: Tensor, config: TTTConfig, name: str) -> Linear:
    """Make a layer for ``weight`` (m, n) on the meta device: its state has shapes and dtypes, and takes no memory."""
    blank = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)
    return Linear.from_weight(blank, None, config, name)


def check_layout(where: str, layer: Linear, found: Mapping[str, Kind]) -> None:
    """Compare the tensors that a file holds of ``layer`` with those that the layer has.

    Of a layer that was consolidated a file holds the anchor, and under ``base.`` what was before it. Of others the
    anchor is the base weight, which is not in the file.

    Args:
        where: begins the error.
        layer: with its state; on the meta device that of `blank_layer`.
        found: key -> shape and dtype.

    Raises:
        ValueError: if a tensor is missing, or one too many, or has another shape or dtype.
    """
    expected = {key: (tuple(t.shape), _DTYPES.get(t.dtype, str(t.dtype))) for key, t in layer.state().items()}
    if _ANCHOR in found:
        expected |= {f"base.{key}": expected[key] for key in BASE if key in expected and key != _ANCHOR}
    else:
        expected.pop(_ANCHOR)
    if dict(found) != expected:
        differ = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        raise ValueError(f"{where}: {differ[:8]} differ in presence, shape or dtype (other config?)")


# -- values -------------------------------------------------------------------------------------------------------


def check_state(
    where: str,
    layer: Linear,
    state: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
) -> None:
    """Check the values of one layer's state, and that its next commit gives finite weights.

    Args:
        where: begins the error.
        layer: a `blank_layer`, with the ``strength`` of the layer that the state is for. It takes the tensors of
            ``state`` and cannot be used again.
        state: all of `ttt.nn.Linear.state`, on the CPU, of the right shapes and dtypes. Nothing in it is written.
        base: the state from before the first consolidation, if there was one.

    Raises:
        ValueError: for a counter out of range, a value that is not finite, is too large or has the wrong sign, or
            state that cannot go on learning.
    """
    pending = int(state["pending"])
    if not 0 <= pending <= layer.config.window:
        raise ValueError(f"{where}: pending must be in [0, {layer.config.window}], got {pending}")
    for key, t in [*state.items(), *((f"base.{key}", t) for key, t in base.items())]:
        if key != "pending":
            _check_range(f"{where}: {key}", key.removeprefix("base."), t, layer)
    for counter, counted in (("seen", "memory"), ("recent_seen", "recent")):
        if counted not in state and int(state[counter]):
            raise ValueError(f"{where}: {counter} must be 0 without {counted}, got {int(state[counter])}")
    if int(state["tokens"]) and not int(state["step"]):
        raise ValueError(f"{where}: tokens must be 0 before the first commit (step 0), got {int(state['tokens'])}")
    _check_window(where, state, pending)
    _check_next_commit(where, layer, state, pending)


def _check_range(what: str, key: str, t: Tensor, layer: Linear) -> None:
    """Every element of ``t`` is finite and within the bounds of ``key``."""
    if t.numel() == 0:
        return
    if log8.is_packed(t):  # of the exponents alone: no code of 8 bits is wrong
        largest, bound = int(t[:, layer.in_features :].max()), 127 + int(math.log2(_bounds(key, layer)[1]))
        if largest > bound:
            raise ValueError(f"{what} must have exponents in [0, {bound}], got {largest}")
        return
    low, high = _bounds(key, layer)
    least, most = (e.item() for e in torch.aminmax(t.detach()))
    if not (low <= least and most <= high):  # false for NaN
        raise ValueError(f"{what} must hold numbers in [{low:g}, {high:g}], got {least:g} to {most:g}")
    if key in ("basis", "output_basis"):
        gram = t.double() @ t.double().T
        size = gram.diagonal()
        wanted = size.clamp(0, 1) if layer.config.kronecker else size.round().clamp(0, 1)
        if bool(((gram - torch.diag(wanted)).abs() > 2**-4).any()):
            allowed = "orthogonal rows of length 1 or less" if layer.config.kronecker else "orthonormal rows, or zeros"
            raise ValueError(f"{what} must hold {allowed}")


def _bounds(key: str, layer: Linear) -> tuple[float, float]:
    if key in ("seen", "recent_seen"):
        return 0, LARGEST_SEEN
    if key in _COUNTERS:
        return 0, LARGEST_COUNT
    if key in _SUMS:
        return 0.0, LARGEST_SUM
    if key in ("importance_scale", "drift"):
        return 0.0, LARGEST_SQUARE
    if key == "trace":
        return (-LARGEST_SQUARE if layer.config.importance == "si" else 0.0), LARGEST_SQUARE
    if key in ("win_eta", "win_weight"):
        return 0.0, torch.finfo(torch.float32).max
    if key == "agreement":
        return -1.0, 1.0
    return (0.0 if key == "importance" else -LARGEST), LARGEST


def _check_window(where: str, state: Mapping[str, Tensor], pending: int) -> None:
    """The rows in use are such as a layer learns from, and the others are marked empty."""
    eta = state["win_eta"]
    if bool(eta[pending:].any()):
        raise ValueError(f"{where}: win_eta must be 0 from row pending = {pending} on")
    x, delta = (
        torch.linalg.vector_norm(state[key][:pending], dim=1, dtype=eta.dtype) for key in ("win_x", "win_delta")
    )
    norm = x * delta
    # The first is the test that every token had to pass; see `ttt.nn.rates`.
    if not bool((torch.isfinite(norm * norm) & (norm * eta[:pending] <= LARGEST)).all()):
        raise ValueError(f"{where}: a row of the window (win_x, win_delta, win_eta) makes too large an update")


def _check_next_commit(where: str, layer: Linear, state: Mapping[str, Tensor], pending: int) -> None:
    """Commit the window, or a row of zeros if it is empty, on copies: pull and replay may make values too large."""
    for key, t in state.items():
        if key == "weight":
            layer.weight = nn.Parameter(t.clone(), requires_grad=False)
        elif key != "pending":
            setattr(layer, key, t.clone() if key in _WRITTEN else t)
    rows = [
        None if t is None else t[:pending] if pending else torch.zeros_like(t[:1])
        for t in (layer.win_x, layer.win_delta, layer.win_eta, layer.win_trace)
    ]
    try:
        layer._commit(*rows)
    except RuntimeError as error:  # of an eigendecomposition
        raise ValueError(f"{where}: the next commit fails ({error})") from None
    for key in _WRITTEN:
        if (t := getattr(layer, key)) is not None:
            _check_range(f"{where}: the next commit would leave {key}, which", key, t, layer)
