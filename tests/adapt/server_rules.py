"""What vLLM and SGLang demand of an adapter folder, written down from their documentation and loaders.

Neither is installed where these tests run, nor can be: their own loaders are not called. Rules of vLLM: rank one of
those of ``--max-lora-rank``, no DoRA, no bias, ``modules_to_save`` null, ``r``, ``lora_alpha`` and ``target_modules``
given, every tensor named ``base_model.model.<module>.lora_A.weight`` or ``lora_B``, each module one of the model's
linear layers, the scaling ``lora_alpha / r``. Those of SGLang, read in its documentation and repository on 2026-11-30,
are in `sglang_problems`.
"""

import json
import re
import struct

RANKS = {8, 16, 32, 64, 128, 256, 320, 512}


SGLANG_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""Linear layers of a Llama for which SGLang has room."""


def sglang_problems(folder, max_lora_rank):
    """What keeps SGLang, started with ``--max-lora-rank``, from computing what PEFT does with an adapter of a Llama.

    Its ``--lora-target-modules`` are those of the adapter. It stacks q, k and v, and gate and up, in each block: k and
    up may be missing, q, v and gate not where another one of their stack is there. It takes the scaling to be
    ``lora_alpha / r`` whatever ``use_rslora`` says.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    problems = []
    if config["peft_type"].lower() != "lora" or config.get("use_dora"):
        problems.append("another method")
    if config["r"] > max_lora_rank:
        problems.append("rank")
    if config.get("use_rslora") or config.get("alpha_pattern") or config.get("rank_pattern"):
        problems.append("scaling")
    if (folder / "added_tokens.json").exists():
        problems.append("added tokens")
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        problems.append("more than factors")
    targets = config["target_modules"]
    if isinstance(targets, str):
        return [*problems, *([] if targets in ("all", "all-linear") else ["a pattern as target"])]
    last = {name.split(".")[-1] for name in targets}
    problems += [f"no room for {name}" for name in sorted(last - SGLANG_MODULES)]
    layers = {}
    for name in header_of(folder / "adapter_model.safetensors"):
        module = name.split(".")[-3]
        if module not in last:
            problems.append(f"{module} is no target")
        found = re.search(r"layers\.(\d+)\.", name)
        layers.setdefault(found and found[1], set()).add(module)
    for layer, modules in layers.items():
        if layer is None:
            problems.append("outside of the blocks")
        for others, needed in (({"k_proj", "v_proj"}, "q_proj"), ({"q_proj"}, "v_proj"), ({"up_proj"}, "gate_proj")):
            if modules & others and needed not in modules:
                problems.append(f"{needed} is missing in block {layer}")
    return problems


def header_of(path):
    """name -> (dtype, shape) of a safetensors file, read without the library."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(data) - 8 - size
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}


def check_adapter(folder, linear_shapes):
    """Assert every rule; ``linear_shapes`` are the model's: module name -> (out, in)."""
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] in RANKS
    assert config["lora_alpha"] == config["r"]
    assert config["bias"] == "none"
    assert not config.get("use_dora")
    assert not config.get("use_rslora")
    assert config["modules_to_save"] is None
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    assert isinstance(config["base_model_name_or_path"], str)
    assert config["base_model_name_or_path"]
    assert isinstance(config["target_modules"], list)
    seen = {}
    for name, (dtype, shape) in header_of(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        assert parts[:2] == ["base_model", "model"]
        assert parts[-1] == "weight"
        assert parts[-2] in ("lora_A", "lora_B")
        assert dtype in ("F32", "F16", "BF16")
        seen.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = shape
    assert set(seen) <= set(linear_shapes)
    assert {name.split(".")[-1] for name in seen} == {name.split(".")[-1] for name in config["target_modules"]}
    for name, shapes in seen.items():
        out_features, in_features = linear_shapes[name]
        assert shapes == {"lora_A": [config["r"], in_features], "lora_B": [out_features, config["r"]]}, name
