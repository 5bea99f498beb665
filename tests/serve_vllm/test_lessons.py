"""Lessons from captured hidden states, against a `ttt.Learner` of the whole model."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ttt
from ttt.conversation import Telling
from ttt.serve.vllm.lessons import learn_in_slices
from ttt.serve.vllm.top_blocks import HiddenStates

FIRST, BLOCKS = 2, 4


@pytest.fixture
def whole():
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return model


def settings(layers, chunk):
    return ttt.TTTConfig(
        ["down_proj"], layers=layers, lr=0.02, chunk=chunk, head_mass=0.0, protect=[ttt.KroneckerFisher(directions=3)],
        per_user=ttt.LowRank(slots=1, rank=8, window=16),
    )  # fmt: skip


def top_of(whole, chunk):
    """A learner of the blocks from `FIRST` on."""
    top = copy.deepcopy(whole)
    top.model.layers = top.model.layers[FIRST:]
    for index, layer in enumerate(top.model.layers):
        layer.self_attn.layer_idx = index
    top.config.num_hidden_layers = BLOCKS - FIRST
    top.model.embed_tokens = HiddenStates(97)
    return ttt.Learner(ttt.adapt_(top, settings("all", chunk)))


def captured(whole, ids):
    """The input of block `FIRST`."""
    seen = []
    hook = whole.model.layers[FIRST].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        whole(ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("telling", [Telling(1, 1.0), Telling(3, 5.0)])
def test_a_lesson_is_learnt_as_by_a_learner_of_the_whole_model(whole, telling):
    size, start = 8, 16  # a learner's chunks begin at multiples of their size, a lesson's slices where it teaches
    ids = torch.randint(97, (1, 29 + start))
    teaches = [at >= start and at != start + 12 for at in range(ids.shape[1])]
    learner = ttt.Learner(ttt.adapt_(copy.deepcopy(whole), settings(f"last:{BLOCKS - FIRST}", size)))
    output = learner.observe(ids, learn_mask=torch.tensor([teaches]), users=["ada"], **telling.options)

    top = top_of(whole, size)
    top.pool.open("ada")
    lesson = learn_in_slices(top, "ada", captured(whole, ids), ids[0].tolist(), teaches, size, telling)
    steps = 0
    while True:
        try:
            next(lesson)
            steps += 1
        except StopIteration as done:
            learnt = done.value
            break
    slices = telling.passes * (1 + 4)  # one of context, and four that teach
    assert (learnt.tokens, learnt.slices, steps) == (sum(teaches), slices, slices - 1)
    assert learnt.passes == telling.passes
    scored = [at - 1 for at in range(start + 1, len(teaches)) if teaches[at]]
    assert learnt.nll == pytest.approx(float(output.nll[0, scored].double().mean()), rel=1e-5)
    found, wanted = top.pool.export("ada"), learner.pool.export("ada")
    moved = 0
    for name, t in found.items():
        other = wanted[shifted(name)]
        torch.testing.assert_close(t, other, rtol=1e-4, atol=1e-6)
        moved += int(t.is_floating_point() and bool(t.count_nonzero()))
    assert moved
    assert len(found) == len(wanted)


def shifted(name):
    """The name in the whole model of a tensor of the top blocks."""
    head, dot, rest = name.partition("layers.")
    index, _, after = rest.partition(".")
    return f"{head}{dot}{int(index) + FIRST}.{after}" if dot else name
