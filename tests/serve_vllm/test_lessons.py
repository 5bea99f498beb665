"""Lessons from captured hidden states, against a `ttt.Learner` of the whole model."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ttt
from ttt.conversation import Telling
from ttt.serve.vllm.blocks import Block, TopBlocks
from ttt.serve.vllm.lessons import learn_in_slices
from ttt.serve.vllm.top_blocks import top_blocks

FIRST, BLOCKS = 2, 4
NORMS = {"rtol": 1e-5, "atol": 1e-6}
"""transformers computes the norms of double precision in single precision."""


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


def settings(layers, chunk, slots=1, lr=0.02):
    return ttt.TTTConfig(
        ["down_proj"], layers=layers, lr=lr, chunk=chunk, head_mass=0.0, protect=[ttt.KroneckerFisher(directions=3)],
        per_user=ttt.LowRank(slots=slots, rank=8, window=16),
    )  # fmt: skip


def top_of(whole, chunk, slots=1, lr=0.02):
    """A learner of the blocks from `FIRST` on."""
    top = copy.deepcopy(whole)
    top.model.layers = top.model.layers[FIRST:]
    for index, layer in enumerate(top.model.layers):
        layer.self_attn.layer_idx = index
    top.config.num_hidden_layers = BLOCKS - FIRST
    top.model.embed_tokens = torch.nn.Identity()
    return ttt.Learner(ttt.adapt_(top, settings("all", chunk, slots, lr)))


def captured(whole, ids):
    """The input of block `FIRST`."""
    seen = []
    hook = whole.model.layers[FIRST].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        whole(ids)
    hook.remove()
    return seen[0]


class Lesson:
    """A lesson of ``user`` with a learner of the top blocks, which takes a number of slices."""

    def __init__(self, top, user, hidden, ids, teaches, telling, *, chunk=8, budget=1e9):
        top.pool.open(user)
        blocks = TopBlocks(top.model)
        self.steps = learn_in_slices(top, blocks, user, hidden, ids, teaches, chunk, telling, lambda: budget)
        self.learnt = None

    def take(self):
        """One slice; whether there are more."""
        try:
            next(self.steps)
        except StopIteration as done:
            self.learnt = done.value
        return self.learnt is None

    def finish(self):
        while self.take():
            pass
        return self.learnt


@pytest.mark.parametrize("telling", [Telling(1, 1.0), Telling(3, 5.0)])
@pytest.mark.parametrize("start", [16, 40])
def test_a_lesson_is_learnt_as_by_a_learner_of_the_whole_model(whole, telling, start):
    size = 8  # a learner's chunks begin at multiples of their size, a lesson's before the first token that teaches
    ids = torch.randint(97, (1, 29 + start))
    teaches = [at > start and at != start + 12 for at in range(ids.shape[1])]
    learner = ttt.Learner(ttt.adapt_(copy.deepcopy(whole), settings(f"last:{BLOCKS - FIRST}", size)))
    output = learner.observe(ids, learn_mask=torch.tensor([teaches]), users=["ada"], **telling.options)

    top = top_of(whole, size)
    learnt = Lesson(top, "ada", captured(whole, ids), ids[0].tolist(), teaches, telling).finish()
    assert (learnt.tokens, learnt.passes, learnt.slices) == (sum(teaches), telling.passes, 1)
    scored = [at - 1 for at, each in enumerate(teaches) if each]
    assert learnt.nll == pytest.approx(float(output.nll[0, scored].double().mean()), rel=1e-5)
    found, wanted = top.pool.export("ada"), learner.pool.export("ada")
    moved = 0
    for name, t in found.items():
        other = wanted[shifted(name)]
        torch.testing.assert_close(t, other, rtol=1e-4, atol=1e-6)
        moved += int(t.is_floating_point() and bool(t.count_nonzero()))
    assert moved
    assert len(found) == len(wanted)


def test_what_is_learnt_does_not_depend_on_pauses_or_on_lessons_of_others_in_them(whole):
    texts = {user: torch.randint(97, (1, 40)) for user in ("ada", "bob")}
    teaches, telling = [at >= 10 for at in range(40)], Telling(2, 5.0)

    def lesson(top, user, **options):
        return Lesson(top, user, captured(whole, texts[user]), texts[user][0].tolist(), teaches, telling, **options)

    alone = {}
    for user in texts:
        top = top_of(whole, 8)
        lesson(top, user).finish()
        alone[user] = top.pool.export(user)
    top = top_of(whole, 8, slots=2)
    both = [lesson(top, user, budget=0.0) for user in texts]
    while running := [each for each in both if each.learnt is None]:
        for each in running:
            each.take()
    pieces = 2 * (BLOCKS - FIRST) + 2  # of a chunk that teaches: forward, backward, the head, and writing
    assert [each.learnt.slices for each in both] == 2 * [2 * (BLOCKS - FIRST + 4 * pieces) + 1]
    for user, state in alone.items():
        found = top.pool.export(user)
        assert all(torch.equal(found[name], t) for name, t in state.items())
        assert any(bool(t.count_nonzero()) for t in found.values())


def test_a_lesson_makes_every_tensor_on_the_device_of_the_hidden_states(whole):
    ids, teaches, telling = torch.randint(97, (1, 60)), [at >= 45 for at in range(60)], Telling(2, 5.0)
    given = captured(whole, ids), ids[0].tolist(), teaches, telling
    usual, other = top_of(whole, 8), top_of(whole, 8)
    Lesson(usual, "ada", *given).finish()
    lesson = Lesson(other, "ada", *given)
    with torch.device("meta"):  # what is made without a device is there, and cannot be computed with the others
        lesson.finish()
    found = other.pool.export("ada")
    assert any(bool(t.count_nonzero()) for t in found.values())
    assert all(torch.equal(found[name], t) for name, t in usual.pool.export("ada").items())


def test_without_a_step_size_nothing_is_kept_and_the_scores_are_found(whole):
    ids, teaches = torch.randint(97, (1, 30)), [at >= 10 for at in range(30)]
    given = captured(whole, ids), ids[0].tolist(), teaches, Telling(2, 5.0)
    top = top_of(whole, 8, lr=0.0)
    top.pool.open("ada")
    before = top.pool.export("ada")
    learnt = Lesson(top, "ada", *given).finish()
    with torch.no_grad():
        scores = torch.nn.functional.cross_entropy(whole(ids).logits[0, 9:-1], ids[0, 10:])
    assert learnt.nll == pytest.approx(float(scores), rel=1e-5)
    after = top.pool.export("ada")
    assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in before.items()}
    assert all(torch.equal(after[name], t) for name, t in before.items())


@pytest.mark.parametrize("budget", [0.0, 1e9])
def test_a_chunk_that_is_not_finite_is_an_error_and_nothing_of_it_is_learnt(whole, budget):
    ids, teaches, telling = torch.randint(97, (1, 40)), [at >= 10 for at in range(40)], Telling(1, 5.0)
    hidden = captured(whole, ids)
    first = top_of(whole, 8)
    Lesson(first, "ada", hidden[:, :26], ids[0, :26].tolist(), teaches[:26], telling).finish()  # two chunks
    hidden[0, 30, 3] = torch.nan  # in the third
    top = top_of(whole, 8)
    with pytest.raises(FloatingPointError, match="a loss or gradient is not finite; the lesson was not learnt"):
        Lesson(top, "ada", hidden, ids[0].tolist(), teaches, telling, budget=budget).finish()
    found, wanted = top.pool.export("ada"), first.pool.export("ada")
    assert any(bool(t.count_nonzero()) for t in wanted.values())
    assert all(torch.equal(found[name], t) for name, t in wanted.items())


@pytest.mark.parametrize("bias", [False, True])
def test_a_block_computes_what_transformers_does_and_its_gradient(bias):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=6, attention_bias=bias, mlp_bias=bias, vocab_size=7,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    ttt.adapt_(model, settings("all", 8))
    pool = ttt.pool_of(model)
    module, past, count = model.model.layers[0], 5, 9
    x = torch.randn(1, past + count, 32, dtype=torch.float64)
    own = x[:, past:].clone().requires_grad_()
    rotary = model.model.rotary_emb(x, torch.arange(past + count).unsqueeze(0))
    mask = torch.ones(past + count, past + count, dtype=torch.bool).tril()[None, None]
    blocks = TopBlocks(model)
    block, memory = blocks.blocks[0], blocks.blocks[0].memory(past + count)
    with pool.using(["ada"]) as slots:
        block.down.learn(
            torch.randn(4, 48).double(),
            torch.randn(4, 32).double(),
            torch.ones(4).double(),
            slots.expand(4).contiguous(),
        )
        # What earlier tokens' keys and values would get is left out: they are constants.
        with torch.no_grad():
            block.inner(x[0, :past], 0, blocks.rotation(0, past), memory, keep=False)
            inner = block.inner(x[0, past:], past, blocks.rotation(past, past + count), memory, keep=True)
            found = block.outer(inner)
        wanted = module(torch.cat([x[:, :past], own], 1), attention_mask=mask, position_embeddings=rotary)
        wanted = wanted[0, past:]
        torch.testing.assert_close(found, wanted, **NORMS)
        gradient = torch.randn_like(found)
        (exact,) = torch.autograd.grad(wanted, own, gradient)
        with torch.no_grad():
            mine = block.backward(inner, gradient, slots.repeat_interleave(count))
    torch.testing.assert_close(mine, exact[0], **NORMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_block_is_as_exact_as_that_of_transformers(dtype):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=7,
    )  # fmt: skip
    exact = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, p in exact.named_parameters():  # numbers that are the same in both dtypes
            size = 4.0 if "q_proj" in name or "k_proj" in name else 1.5  # so that scores are about 16
            p.copy_((size * torch.randn_like(p) / p.shape[-1] ** 0.5).to(dtype) if p.ndim > 1 else torch.ones_like(p))
    plain, adapted = (copy.deepcopy(exact).to(dtype) for _ in range(2))
    ttt.adapt_(adapted, settings("all", 8))
    count = 60
    x, gradient = (torch.randn(count, 64).to(dtype) for _ in range(2))

    def by_transformers(model):
        own = x.to(model.dtype, copy=True).requires_grad_()
        rotary = model.model.rotary_emb(own, torch.arange(count).unsqueeze(0))
        mask = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
        y = model.model.layers[0](own.unsqueeze(0), attention_mask=mask, position_embeddings=rotary)[0]
        return y.detach(), torch.autograd.grad(y, own, gradient.to(y.dtype))[0]

    blocks = TopBlocks(adapted)
    block = blocks.blocks[0]
    with ttt.pool_of(adapted).using(["ada"]) as slots, torch.no_grad():
        inner = block.inner(x, 0, blocks.rotation(0, count), block.memory(count), keep=True)
        mine = block.outer(inner), block.backward(inner, gradient, slots.repeat_interleave(count))
    for found, theirs, wanted in zip(mine, by_transformers(plain), by_transformers(exact), strict=True):
        assert found.dtype == dtype
        error, bound = (float((each.double() - wanted).norm()) for each in (found, theirs))
        assert error < 1.1 * bound


def test_weights_that_lie_one_after_the_other_are_not_copied():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=7,
    )  # fmt: skip
    module = LlamaForCausalLM(config).model.layers[0]
    apart = Block(module)
    fused = torch.cat([module.mlp.gate_proj.weight, module.mlp.up_proj.weight]).detach()
    module.mlp.gate_proj.weight, module.mlp.up_proj.weight = (
        torch.nn.Parameter(each, requires_grad=False) for each in fused.split(24)
    )
    together = Block(module)
    assert together.gate_up.data_ptr() == fused.data_ptr()
    assert torch.equal(together.gate_up, fused)
    assert torch.equal(apart.gate_up, fused)
    assert apart.gate_up.data_ptr() != module.mlp.gate_proj.weight.data_ptr()


def as_in_vllm(whole):
    """The modules of ``whole`` where vLLM has them: those of queries, keys and values are one, and of gate and up."""
    for block in whole.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for parent, fused, names in (
            (attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")), (mlp, "gate_up_proj", ("gate_proj", "up_proj")),
        ):  # fmt: skip
            weight = torch.cat([getattr(parent, name).weight.detach() for name in names])
            for name in names:
                delattr(parent, name)
            setattr(parent, fused, torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
            getattr(parent, fused).weight = torch.nn.Parameter(weight, requires_grad=False)
    return whole


def test_top_blocks_share_the_weights_of_vllm_under_the_names_that_they_have_there(whole):
    ids = torch.randint(97, (1, 12))
    with torch.no_grad():
        wanted = whole.model(ids, output_hidden_states=True).hidden_states
    other = as_in_vllm(copy.deepcopy(whole))
    top = top_blocks(other, whole.config, FIRST)
    shared = top.model.layers["3"].mlp.down_proj.weight, other.model.layers[3].mlp.down_proj.weight
    assert shared[0].data_ptr() == shared[1].data_ptr()
    ttt.adapt_(top, settings("all", 8))
    pool, names = ttt.pool_of(top), [f"model.layers.{index}.mlp.down_proj" for index in range(FIRST, BLOCKS)]
    assert list(pool.layers) == names
    pool.open("ada")
    assert [f"{name}.a" for name in names] == [name for name in pool.export("ada") if name.endswith(".a")]
    blocks, x = TopBlocks(top), wanted[FIRST][0]
    with pool.using(["ada"]), torch.no_grad():
        for block in blocks.blocks:
            x = block.outer(block.inner(x, 0, blocks.rotation(0, 12), block.memory(12), keep=False))
    torch.testing.assert_close(blocks.norm.forward(x)[0], wanted[-1][0], **NORMS)


def test_a_weight_that_is_not_finite_is_named_as_in_the_whole_model(whole):
    other = as_in_vllm(copy.deepcopy(whole))
    other.model.layers[3].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^model\.layers\.3\.mlp\.down_proj\.weight must be finite to learn"):
        ttt.adapt_(top_blocks(other, whole.config, FIRST), settings("all", 8))


def test_another_activation_is_refused(whole):
    whole.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="must have the activation 'silu', got 'gelu'"):
        TopBlocks(whole)


def shifted(name):
    """The name in the whole model of a tensor of the top blocks."""
    head, dot, rest = name.partition("layers.")
    index, _, after = rest.partition(".")
    return f"{head}{dot}{int(index) + FIRST}.{after}" if dot else name
