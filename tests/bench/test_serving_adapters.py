"""Adapters that stock vLLM serves in the benchmark of the plugin, to be compared with the plugin's users."""

import json

from safetensors.torch import load_file

from bench.serving.vllm import STREAMS, adapters
from ttt.serve.vllm.options import Options


def test_adapters_have_the_rank_and_the_blocks_of_the_plugins_users(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 9, "hidden_size": 6, "intermediate_size": 10})
    )
    arguments = adapters(str(tmp_path), tmp_path)
    plugin = Options("users", identity="header")
    assert arguments[arguments.index("--max-lora-rank") + 1] == str(plugin.adapter_rank)
    assert sum(each.startswith("user") for each in arguments) == STREAMS
    found = load_file(tmp_path / "user0" / "adapter_model.safetensors")
    assert {name.split(".layers.")[1].split(".")[0] for name in found} == {str(block) for block in plugin.blocks(9)}
    sides = {name.split("lora_")[1][0]: tuple(t.shape) for name, t in found.items()}
    assert sides == {"A": (plugin.adapter_rank, 10), "B": (6, plugin.adapter_rank)}
