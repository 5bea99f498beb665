"""Which blocks of a model ``TTTConfig.layers`` means: each stack of blocks is counted by itself."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ttt.checks import last_blocks

_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_LANGUAGE = ("language_model", "text_model")

Layers = str | Sequence[int] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stack:
    """Numbered blocks of one module.

    Attributes:
        name: of the module that holds them, as "model.language_model.layers".
        count: how many they are.
        blocks: name of a layer -> the number of its block.
        language: whether they belong to the language model, of a model that has other stacks, too.
    """

    name: str
    count: int
    blocks: dict[str, int]
    language: bool = True


def stacks_of(model: nn.Module, names: Sequence[str]) -> list[Stack]:
    """The stacks that hold layers among ``names``, in the model's order."""
    found: dict[str, dict[str, int]] = {}
    for name in names:
        if (place := _place(name)) is not None:
            found.setdefault(place[0], {})[name] = place[1]
    counts = dict.fromkeys(found, 0)
    for name, _ in model.named_modules():
        if (place := _place(name)) is not None and place[0] in counts:
            counts[place[0]] = max(counts[place[0]], place[1] + 1)
    language = _language_module(model)
    return [Stack(name, counts[name], blocks, _is_language(name, language)) for name, blocks in found.items()]


def in_layers(names: Sequence[str], model: nn.Module, layers: Layers) -> set[str]:
    """Those of ``names`` that ``layers`` (`ttt.TTTConfig`) keeps.

    A text or a list is meant for each stack of the language model; a dictionary for the stacks that it names.

    Raises:
        ValueError: if ``layers`` asks for blocks or stacks that are not there.
    """
    if layers == "all":
        return set(names)
    stacks = stacks_of(model, names)
    if not stacks:
        raise ValueError(f"layers = {layers!r} needs numbered modules; none of {list(names)} has a number in its name")
    if not isinstance(layers, Mapping):
        language = [stack for stack in stacks if stack.language]
        if not language:
            others = [stack.name for stack in stacks]
            raise ValueError(
                f"layers = {layers!r} is meant for the language model, but target_modules match in {others} only; name "
                f"the stack: layers={{{others[0]!r}: {layers!r}}}"
            )
        return {name for stack in language for name in _chosen(stack, layers)}
    wanted: dict[str, Any] = {}
    for key, value in layers.items():
        matched = [stack for stack in stacks if f".{key}." in f".{stack.name}."]
        if not matched:
            raise ValueError(f"layers names {key!r}, but the matched layers are in {[s.name for s in stacks]}")
        for stack in matched:
            if stack.name in wanted:
                raise ValueError(f"layers names the blocks of {stack.name} twice; got {dict(layers)!r}")
            wanted[stack.name] = value
    return {name for stack in stacks if stack.name in wanted for name in _chosen(stack, wanted[stack.name])}


def outside_language(model: nn.Module, names: Sequence[str]) -> set[str]:
    """Those of ``names`` that are not part of the language model, where a model has other parts, as a vision tower."""
    language = _language_module(model)
    return set() if language is None else {name for name in names if not _is_language(name, language)}


def _place(name: str) -> tuple[str, int] | None:
    found = _INDEX.search(name)
    return None if found is None else (name[: found.start(1)].rstrip("."), int(found.group(1)))


def _chosen(stack: Stack, layers: str | Sequence[int]) -> list[str]:
    count = stack.count
    where = f"the model has {count} blocks" + f" in {stack.name}" * bool(stack.name)
    if layers == "all":
        return list(stack.blocks)
    if isinstance(layers, str):
        last = last_blocks(layers)
        assert last is not None  # `TTTConfig` checked it
        if isinstance(last, float):
            last = math.ceil(last * count)
        if last > count:
            raise ValueError(f"layers = {layers!r} asks for more than there are: {where}; last:{count} is all")
        wanted = set(range(count - last, count))
    else:
        for i in layers:
            if not -count <= i < count:
                raise ValueError(f"layers holds {i}; {where}, so it must be in [{-count}, {count})")
        wanted = {i % count for i in layers}
    return [name for name, i in stack.blocks.items() if i in wanted]


def _language_module(model: nn.Module) -> str | None:
    """The name of the language model inside of a model that has other parts; None if it has none."""
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if not hasattr(module, "get_decoder") or not hasattr(config, "get_text_config"):
            continue
        if config.get_text_config(decoder=True) is config or getattr(config, "is_encoder_decoder", False):
            return None
        inner = module.get_decoder()
        found = next((n for n, m in module.named_modules() if m is inner), "")
        if found:
            return f"{name}.{found}".lstrip(".")
        break
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] in _LANGUAGE:
            return name
    return None


def _is_language(name: str, language: str | None) -> bool:
    return language is None or f"{name}.".startswith(f"{language}.")
