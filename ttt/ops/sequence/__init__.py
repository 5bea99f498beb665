"""Ops of sequence layers whose state is a model that learns the tokens it reads.

All take tensors (B, T, H, D), batch first, with the options ``initial_state``, ``output_final_state``, ``cu_seqlens``
and ``scale``, and have three forms: token by token (the definition), in chunks (which can be differentiated), and a
step for one token, which changes its state in place.

======================  ====================================================================================
`gated_delta_rule`      DeltaNet and Gated DeltaNet; the state is a tensor (B, H, K, V)
`ttt_linear`            a linear layer with an inner norm, learnt in mini-batches
`ttt_mlp`               the same with two layers
`titans`                layers with momentum and a forget gate; `memory` is what these three have in common
`lact`                  a SwiGLU that is updated at the ends of large chunks
`in_place_ttt`          a weight of the model itself that is updated at the ends of large chunks
======================  ====================================================================================
"""

from ttt.ops.sequence.dual_form import Norm
from ttt.ops.sequence.gated_delta import gated_delta_rule, gated_delta_rule_step
from ttt.ops.sequence.large_chunk_ops import (
    in_place_ttt,
    in_place_ttt_step,
    lact,
    lact_step,
    new_large_chunk_state,
)
from ttt.ops.sequence.learning_memory import memory, memory_step, new_memory_state, titans, ttt_linear, ttt_mlp
from ttt.ops.sequence.states import LargeChunkState, MemoryState, state_bytes

__all__ = [
    "LargeChunkState",
    "MemoryState",
    "Norm",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "in_place_ttt",
    "in_place_ttt_step",
    "lact",
    "lact_step",
    "memory",
    "memory_step",
    "new_large_chunk_state",
    "new_memory_state",
    "state_bytes",
    "titans",
    "ttt_linear",
    "ttt_mlp",
]
