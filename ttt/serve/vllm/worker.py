"""Where the plugin enters vLLM's worker: loading the model and adapters, and calls from the API server."""

from __future__ import annotations

import functools
from typing import Any

from ttt.serve.vllm import cpu_lora
from ttt.serve.vllm.adapters import PREFIX
from ttt.serve.vllm.options import RPC_METHODS, Options

_ATTRIBUTE = "ttt_users"


def install(options: Options) -> None:
    """Change vLLM's classes in this process, whichever of its processes it is."""
    from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA
    from vllm.lora.punica_wrapper import punica_cpu
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.model_executor.layers import utils
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
    from vllm.v1.worker.worker_base import WorkerBase

    utils.dispatch_cpu_unquantized_gemm = _keeping_top_weights(utils.dispatch_cpu_unquantized_gemm, options)
    punica_cpu.PunicaWrapperCPU.add_lora_linear = cpu_lora.add_lora_linear
    _pass_base_by(RowParallelLinearWithLoRA)
    _load_users(LoRAModelRunnerMixin, options)
    _load_adapters_from_memory(WorkerLoRAManager)
    for name in RPC_METHODS:
        setattr(WorkerBase, f"ttt_{name}", _forwarded(name))
    shutdown = Worker.shutdown

    @functools.wraps(shutdown)
    def close_and_shutdown(self: Any) -> None:
        users = getattr(self.model_runner, _ATTRIBUTE, None) if hasattr(self, "model_runner") else None
        if users is not None:
            users.close()
        shutdown(self)

    Worker.shutdown = close_and_shutdown


def _keeping_top_weights(dispatch: Any, options: Options) -> Any:
    """``dispatch_cpu_unquantized_gemm`` that leaves the weights in place, of the blocks that learn."""

    @functools.wraps(dispatch)
    def keeping(layer: Any, remove_weight: bool) -> None:
        dispatch(layer, remove_weight and not _learns(getattr(layer, "prefix", ""), options))

    return keeping


def _learns(prefix: str, options: Options) -> bool:
    """Whether the module named ``prefix`` is in a block that learns."""
    from vllm.config import get_current_vllm_config

    _, found, rest = prefix.partition("layers.")
    index = rest.partition(".")[0]
    if not found or not index.isdigit():
        return False
    blocks = get_current_vllm_config().model_config.hf_config.num_hidden_layers
    return int(index) in options.blocks(blocks)


def _pass_base_by(wrapper: Any) -> None:
    """Let the layers that vLLM has wrapped for adapters, ``down_proj``, be called directly where no token has one."""
    forward = wrapper.forward

    @functools.wraps(forward)
    def passing(self: Any, input_: Any) -> Any:
        return self.base_layer(input_) if self.punica_wrapper.no_lora else forward(self, input_)

    wrapper.forward = passing


def _load_users(mixin: Any, options: Options) -> None:
    load = mixin.load_lora_model

    @functools.wraps(load)
    def load_lora_model(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        from ttt.serve.vllm import supported
        from ttt.serve.vllm.users import Users

        supported.check_config(vllm_config, options)
        model = load(self, model, vllm_config, device)
        users = Users(self, model, vllm_config, options)
        setattr(self, _ATTRIBUTE, users)
        setattr(self.lora_manager, _ATTRIBUTE, users)
        return model

    mixin.load_lora_model = load_lora_model


def _load_adapters_from_memory(manager: Any) -> None:
    read = manager._load_adapter

    @functools.wraps(read)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        if lora_request.lora_path.startswith(PREFIX):
            return getattr(self, _ATTRIBUTE).adapters.load(lora_request)
        return read(self, lora_request)

    manager._load_adapter = _load_adapter


def _forwarded(name: str) -> Any:
    def call(self: Any, *arguments: Any) -> Any:
        return getattr(getattr(self.model_runner, _ATTRIBUTE), name)(*arguments)

    call.__name__ = f"ttt_{name}"
    return call
