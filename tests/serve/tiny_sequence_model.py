"""A tiny language model of sequence layers, and what serves it."""

import torch
from tiny_chat_model import byte_tokenizer

import ttt
from ttt.sequence_models import TTTSequenceConfig, TTTSequenceForCausalLM
from ttt.serve.limits import Limits
from ttt.serve.service import Service
from ttt.serve.state_reader import StateReader

MIXERS = (
    ["ttt-linear", "window", "gated-delta"],
    ["titans", "lact", "delta"],
    ["ttt-mlp", "gated-delta", "ttt-linear"],
)


def tiny_sequence_model(mixers=MIXERS[0], seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = TTTSequenceConfig(
            **{
                "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
                "num_hidden_layers": 3, "mixers": mixers, "in_place": [1], "window": 8, "mini_batch": 4, "chunk": 64,
                "initializer_range": 0.2, "eos_token_id": 257, **options,
            }
        )  # fmt: skip
        model = TTTSequenceForCausalLM(config).eval()
        for block in model.model.layers:
            if block.learns:
                torch.nn.init.normal_(block.mlp.target_proj.weight)
    return model


def reader_of(model, slots=3):
    return StateReader(model, slots=slots)


def states_service(model, store, slots=3, lease_seconds=30.0, **limits):
    limits = Limits(**{"study_after": 0.0, "prefill": 16, **limits})
    store = store if isinstance(store, ttt.Store) else ttt.Store(store)
    return Service(
        reader_of(model, slots), byte_tokenizer(), store, "tiny", limits=limits, lease_seconds=lease_seconds
    )  # fmt: skip
