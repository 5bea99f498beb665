"""Torch's fast path of transformer encoders, which reads the weights of their layers without calling them.

In eval mode `nn.TransformerEncoderLayer` computes all of itself from the parameters of its linear layers. Neither a
window nor a user's weights would have any effect there. So it is switched off for blocks that hold layers which learn,
and `nn.TransformerEncoder` no longer packs their input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_SWITCHES = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_CHANGED = "_ttt_fast_paths"  # attribute of the model: (module, attribute, value from before)


def switch_off_fast_paths(model: nn.Module, layers: Iterable[str]) -> None:
    """Switch the fast path off in all modules around ``layers``, which are named."""
    changed: list[tuple[Any, str, Any]] = []
    object.__setattr__(model, _CHANGED, changed)
    around = {name[:at] for name in layers for at, character in enumerate(f"{name}.") if character == "."}
    for name in ["", *sorted(around)]:
        module = model.get_submodule(name)
        for kind, attribute, value in _SWITCHES:
            if isinstance(module, kind) and hasattr(module, attribute):
                changed.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, value)


def switch_on_fast_paths(model: nn.Module) -> None:
    """Undo `switch_off_fast_paths`, if it was called."""
    for module, attribute, value in reversed(getattr(model, _CHANGED, [])):
        setattr(module, attribute, value)
    model.__dict__.pop(_CHANGED, None)
