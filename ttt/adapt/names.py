"""Names of modules as they are in the model itself, whatever it is wrapped in."""

from __future__ import annotations

from torch import nn

_PEFT = "base_model.model."  # before the names of what `peft.get_peft_model` wraps


def unwrapped(model: nn.Module) -> nn.Module:
    """``model``, or what ``torch.compile(model)`` was made of."""
    while type(model).__name__ == "OptimizedModule":
        model = model.get_submodule("_orig_mod")
    return model


def canonical(name: str) -> str:
    """``name`` of a module or a parameter without what ``torch.compile`` and PEFT put into it.

    So a file that is written beside them fits the model without them.
    """
    parts = name.removeprefix(_PEFT).split(".")
    return ".".join(part for part in parts if part not in ("_orig_mod", "base_layer"))
