"""The ``adapter_config.json`` of a LoRA adapter: read, and checked field by field."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ttt.adapt.patterns import Budget, Pattern
from ttt.adapt.validate import LARGEST, parse_json
from ttt.checks import check_layers, check_names, check_real, check_whole

_FILE_BYTES = 1 << 20
# Ways to make initial values that leave the base weights as they are.
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")


def _of_type(*kinds: type) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, kinds):
            allowed = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{name} must be {allowed}, got {value!r:.80}")

    return check


def _rank(name: str, value: Any) -> None:
    check_whole(name, value, 1)


def _alpha(name: str, value: Any) -> None:
    check_real(name, value, -LARGEST, LARGEST)


def _patterns_of(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    def check_all(name: str, value: Any) -> None:
        _maybe_dict(name, value)
        for key, part in (value or {}).items():
            check(f"{name}[{key!r:.80}]", part)

    return check_all


def _indices(name: str, value: Any) -> None:
    if isinstance(value, dict):
        raise ValueError(f"{name} must be a list of indices, got {value!r:.80}")
    if value is not None:
        check_layers(name, [value] if isinstance(value, int) else value)


_bool, _maybe_str, _maybe_dict = _of_type(bool), _of_type(str, type(None)), _of_type(dict, type(None))

# Fields that are used below or do not change the delta, each with its check. Whatever else a config sets is refused by
# name: PEFT's features change what the factors mean (use_dora, alora_invocation_tokens, ...) or add to them (lora_bias,
# modules_to_save).
_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "peft_type": _of_type(str),
    "r": _rank,
    "lora_alpha": _alpha,
    "rank_pattern": _patterns_of(_rank),
    "alpha_pattern": _patterns_of(_alpha),
    "use_rslora": _bool,
    "fan_in_fan_out": _bool,
    "bias": _of_type(str),
    "init_lora_weights": _of_type(bool, str, type(None)),
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision", "peft_version", "megatron_core"), _maybe_str),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), check_names),
    "layers_to_transform": _indices,
    **dict.fromkeys(("inference_mode", "ensure_weight_tying"), _bool),
    "lora_dropout": lambda name, value: check_real(name, value, 0.0, 1.0),
    # of initial values and of training, which are over
    **dict.fromkeys(("auto_mapping", "runtime_config", "loftq_config", "eva_config", "corda_config"), _maybe_dict),
    "lora_ga_config": _maybe_dict,
    "qalora_group_size": lambda name, value: check_whole(name, value, 0),
}


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a plain LoRA adapter.

    Raises:
        ValueError: if the file is damaged, a field has a wrong type or is out of range, or a field asks for what
            low-rank factors alone do not express. The error names the field.
        OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        text = file.read(_FILE_BYTES + 1)
    damaged = f"{path} is damaged or of no LoRA adapter:"
    config = parse_json(text, f"{damaged} it", _FILE_BYTES)
    if not isinstance(config, dict):
        raise ValueError(f"{damaged} it must be a dict, got {config!r:.80}")
    for key in ("peft_type", "r", "lora_alpha"):
        if key not in config:
            raise ValueError(f"{damaged} {key} is missing")
    for key, value in config.items():
        if key in _FIELDS:
            try:
                _FIELDS[key](key, value)
            except ValueError as error:
                raise ValueError(f"{damaged} {error}") from None
    if config["peft_type"] != "LORA":
        raise ValueError(f"{path}: peft_type must be 'LORA', got {config['peft_type']!r:.80}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias must be 'none', got {config['bias']!r:.80}: low-rank factors hold no bias")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _HARMLESS_STARTS:
        raise ValueError(
            f"{path}: init_lora_weights = {start!r:.80} may have changed the base weights, too; save the adapter with "
            "path_initial_model_for_weight_conversion"
        )
    for key, value in config.items():
        if key not in _FIELDS and value:
            raise ValueError(
                f"{path}: {key!s:.80} = {value!r:.200} is not supported; only plain LoRA on linear layers is"
            )
    return config


def by_pattern(path: Path, field: str, patterns: dict[str, Any] | None, names: Iterable[str], default: Any) -> list:
    """The value of each of ``names``: that of the first pattern which matches the end of the name, or ``default``.

    As in PEFT the pattern is a regular expression for the whole name, or for all of it after one of its dots; of the
    subset of `ttt.adapt.patterns`.

    Raises:
        ValueError: for a pattern outside of that subset, or if matching takes too long.
    """
    budget = Budget()
    try:
        compiled = [(Pattern(key), value) for key, value in (patterns or {}).items()]
        return [next((v for p, v in compiled if p.matches_end(name, budget)), default) for name in names]
    except ValueError as error:
        raise ValueError(f"{path}: {field}: {error}") from None
