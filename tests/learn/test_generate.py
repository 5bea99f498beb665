"""`Learner.generate`: what is written, scored and learnt, against Hugging Face's generate and explicit gradients."""

import copy

import pytest
import torch
from helpers import plain_config
from tiny_models import TARGETS, VOCAB, adapted, assert_same, ids_of, state_of, tiny
from transformers import MistralConfig, MistralForCausalLM

import ttt
from ttt.adapt.convert import learning_layers
from ttt.learn.huggingface import cache_of, cached
from ttt.ops import backends


def ways():
    return {(b, why): n for (op, b, why), n in backends.calls.items() if op == "generate"}


def plain_copy(model, family="llama"):
    other = tiny(family)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_without_learning_it_writes_what_generate_writes_and_scores_it(family):
    model, learner = adapted(family)
    plain, before = plain_copy(model, family), state_of(model)
    ids = ids_of(3, 11)
    made = learner.generate(ids, max_new_tokens=13, learn_prompt=False)
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=13, do_sample=False)
    assert torch.equal(made.sequences, expected)
    with torch.no_grad():
        logp = plain(expected).logits.log_softmax(-1)
    nll = -logp[:, :-1].gather(-1, expected[:, 1:, None])[..., 0]
    torch.testing.assert_close(made.nll, nll, rtol=1e-4, atol=1e-4)
    assert bool(made.mask.all())
    assert (made.learned, made.rejected) == (0, 0)
    assert_same(before, state_of(model))


def test_the_prompt_is_learnt_as_observe_learns_it():
    model, learner = adapted(window=5)
    twin = ttt.fork(model)
    ids = ids_of(2, 30)
    made = learner.generate(ids, max_new_tokens=4)
    output = ttt.Learner(twin).observe(ids)
    assert torch.equal(made.nll[:, :29], output.nll)
    assert (made.learned, made.rejected) == (output.learned, 0) == (4, 0)
    assert_same(state_of(twin), state_of(model))


@pytest.mark.parametrize("layers", ["all", [1], [0, 3]])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("prompt", [1, 7])
def test_a_span_teaches_an_explicit_gradient_step(family, layers, prompt):
    """The top blocks alone, against autograd's weight gradient of the whole model on the whole text."""
    model, learner = adapted(family, layers=layers, lr=0.01, window=1, ewc_lambda=0.0, replay_rows=0)
    plain, ids = plain_copy(model, family), ids_of(2, prompt)
    before = ways()
    made = learner.generate(ids, max_new_tokens=9, learn_prompt=False, learn_output=True, learn_every=9)
    assert {key for key, n in ways().items() if n != before.get(key, 0)} == {("top blocks again", "")}
    assert made.learned == 1
    # The cached prompt is context, as its keys and values stand: no gradient reaches the layers through them.
    out = plain(ids[:, :-1], use_cache=True) if prompt > 1 else None
    cache = cache_of(out) if out is not None else None
    for layer in cache.layers if cache is not None else []:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    text = made.sequences
    logits = plain(text[:, prompt - 1 : -1], **cached(plain, cache)).logits
    targets = text[:, prompt:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    assert float(made.nll[:, prompt - 1 :].sum()) == pytest.approx(loss.item(), rel=1e-4)
    for name, layer in learning_layers(model):
        other = plain.get_submodule(name)
        step = -0.01 * other.weight.grad
        step = step.T if family == "gpt2" else step
        torch.testing.assert_close(layer.weight - layer.anchor, step, rtol=1e-3, atol=3e-5)
        assert int(layer.tokens) == 2 * 9


def spans(model, learner, ids, count, every, **options):
    made = learner.generate(ids, max_new_tokens=count, learn_output=True, learn_every=every, **options)
    return made, state_of(model)


def same_up_to_rounding(a, b):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=2e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("padded", [False, True])
def test_running_the_top_blocks_again_equals_running_all_of_them(padded, monkeypatch):
    model, learner = adapted(window=3, lr=0.005)
    twin = ttt.fork(model)
    ids = ids_of(2, 8)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    options = {"attention_mask": mask if padded else None}
    made, state = spans(model, learner, ids, 14, 4, **options)
    assert made.learned == 1 + 4  # the prompt, three spans of four and one of two
    monkeypatch.setattr("ttt.learn.output_learning.blocks_of", lambda *args: (None, 0, "for the test"))
    before = ways()
    again, other = spans(twin, ttt.Learner(twin), ids, 14, 4, **options)
    assert ways()["whole model again", "for the test"] == before.get(("whole model again", "for the test"), 0) + 4
    assert torch.equal(made.sequences, again.sequences)
    torch.testing.assert_close(made.nll, again.nll, rtol=1e-3, atol=1e-4)
    same_up_to_rounding(state, other)


def test_tokens_are_scored_before_they_are_learnt_and_the_next_span_has_learnt():
    model, learner = adapted(lr=0.05, clip=1.0)
    plain, ids = plain_copy(model), ids_of(1, 5)
    made = learner.generate(ids, max_new_tokens=12, learn_prompt=False, learn_output=True, learn_every=6)
    with torch.no_grad():
        logp = plain(made.sequences).logits.log_softmax(-1)
    frozen = -logp[:, :-1].gather(-1, made.sequences[:, 1:, None])[..., 0]
    torch.testing.assert_close(made.nll[:, :10], frozen[:, :10], rtol=1e-4, atol=1e-4)
    assert float((made.nll[:, 10:] - frozen[:, 10:]).abs().max()) > 1e-3


def test_left_padding_is_no_part_of_the_text():
    _, learner = adapted()
    ids = ids_of(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    both = torch.cat([padded, ids_of(1, 13)])
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    alone = learner.generate(ids, max_new_tokens=8, learn_prompt=False)
    made = learner.generate(both, max_new_tokens=8, attention_mask=mask, learn_prompt=False)
    assert torch.equal(made.sequences[:1, 4:], alone.sequences)
    torch.testing.assert_close(made.nll[:1, 4:], alone.nll, rtol=1e-4, atol=1e-4)
    assert made.mask[0].tolist() == [False] * 4 + [True] * 16
    assert float(made.nll[0, :4].abs().sum()) == 0


def test_finished_sequences_are_filled_and_teach_no_more():
    model, learner = adapted(lr=0.01, ewc_lambda=0.0, replay_rows=0)
    twin = ttt.fork(model)
    ids = ids_of(2, 6)
    free = learner.generate(ids, max_new_tokens=10, learn_prompt=False)
    first = free.sequences[0, 6:].tolist()
    eos = next(t for t in first if t not in free.sequences[1, 6:].tolist())
    end = first.index(eos)
    options = {"learn_prompt": False, "learn_output": True, "learn_every": 10}
    made = learner.generate(ids, max_new_tokens=10, eos_token_id=eos, **options)
    assert made.sequences[0, 6:].tolist() == first[: end + 1] + [eos] * (9 - end)
    assert torch.equal(made.sequences[1], free.sequences[1])
    assert made.mask[0].tolist() == [True] * (5 + end + 1) + [False] * (9 - end)
    assert float(made.nll[~made.mask].abs().sum()) == 0
    assert {int(layer.tokens) + layer.pending for layer in learner.layers} == {end + 1 + 10}
    # The two sequences alone, one after the other from the same weights, make the same change in sum.
    changes = []
    for row, count in ((0, end + 1), (1, 10)):
        other = ttt.fork(twin)
        ttt.Learner(other).generate(ids[row : row + 1], max_new_tokens=count, **options)
        changes.append([layer.effective_weight() - layer.anchor for _, layer in learning_layers(other)])
    for layer, a, b in zip(learner.layers, *changes, strict=True):
        torch.testing.assert_close(layer.effective_weight() - layer.anchor, a + b, rtol=1e-3, atol=2e-6)
    short = ttt.Learner(twin).generate(ids[:1], max_new_tokens=10, eos_token_id=eos, learn_prompt=False)
    assert short.sequences.shape == (1, 6 + end + 1)


def test_sampling_follows_its_generator_and_top_k():
    _, learner = adapted()
    ids = ids_of(2, 5)

    def draw(seed, **options):
        g = torch.Generator().manual_seed(seed)
        return learner.generate(ids, max_new_tokens=12, learn_prompt=False, do_sample=True, generator=g, **options)

    assert torch.equal(draw(1).sequences, draw(1).sequences)
    assert not torch.equal(draw(1).sequences, draw(2).sequences)
    greedy = learner.generate(ids, max_new_tokens=12, learn_prompt=False)
    assert torch.equal(draw(3, top_k=1).sequences, greedy.sequences)
    assert torch.equal(draw(3, temperature=1e-4).sequences, greedy.sequences)
    wide, narrow = draw(4, temperature=100.0).sequences, draw(4, temperature=100.0, top_k=3).sequences
    with torch.no_grad():
        logits = learner.model(narrow).logits
    rank = (logits[:, 4:-1] > logits[:, 4:-1].gather(-1, narrow[:, 5:, None])).sum(-1)
    assert int(rank.max()) == 2
    assert len(set(wide[:, 5:].flatten().tolist())) > 12


@pytest.mark.parametrize("importance", ["mas", "si"])
def test_other_importances_and_an_adapted_head(importance):
    model, learner = adapted(target_modules=["down_proj"], importance=importance, lr=0.01)
    learner.calibrate([ids_of(2, 16)])
    made = learner.generate(ids_of(2, 9), max_new_tokens=9, learn_output=True, learn_every=4)
    assert (made.learned, made.rejected) == (1 + 3, 0)
    model = ttt.adapt_(tiny(), plain_config(target_modules=["down_proj", "lm_head"], lr=0.01, replay_capacity=32))
    made = ttt.Learner(model).generate(ids_of(2, 9), max_new_tokens=9, learn_output=True, learn_every=4)
    assert (made.learned, made.rejected) == (1 + 3, 0)
    assert {int(layer.tokens) + layer.pending for _, layer in learning_layers(model)} == {2 * (8 + 9)}


def test_models_whose_cache_cannot_be_cropped_run_whole_again():
    config = MistralConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                           num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, sliding_window=6,
                           bos_token_id=0, eos_token_id=None, pad_token_id=0)  # fmt: skip
    model = ttt.adapt_(MistralForCausalLM(config).eval(), plain_config(target_modules=["down_proj"], lr=0.01))
    before = ways()
    made = ttt.Learner(model).generate(ids_of(1, 9), max_new_tokens=12, learn_output=True, learn_every=5)
    assert (made.learned, made.rejected) == (1 + 3, 0)
    ((way, why),) = {key for key, n in ways().items() if n != before.get(key, 0)}
    assert way == "whole model again"
    assert "DynamicSlidingWindowLayer" in why
    assert any(why in line for line in ttt.info(file=None)["slow_calls"])


def test_a_span_with_a_gradient_that_is_not_finite_changes_nothing():
    model, learner = adapted()
    pristine, before = copy.deepcopy(model), state_of(model)

    class Blowup(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    handle = model.model.norm.register_forward_hook(lambda m, a, out: Blowup.apply(out) if out.requires_grad else out)
    ids = ids_of(1, 12)
    made = learner.generate(ids, max_new_tokens=10, learn_output=True, learn_every=5)
    handle.remove()
    assert (made.learned, made.rejected) == (0, 2 + 2)
    assert_same(before, state_of(model))
    frozen = ttt.Learner(pristine).generate(ids, max_new_tokens=10, learn_prompt=False)
    assert torch.equal(made.sequences, frozen.sequences)  # the whole prompt is its context all the same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": 4, "learn_every": 0}, "learn_every must be"),
        ({"max_new_tokens": 4, "top_k": 0}, "top_k must be"),
        ({"max_new_tokens": 4, "temperature": 0.0}, "temperature must be"),
        ({"max_new_tokens": 57}, "must fit the context of 64"),
        ({"max_new_tokens": 4, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])}, "on the left only"),
        ({"max_new_tokens": 4, "attention_mask": torch.ones(1, 3)}, "attention_mask must have the shape"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(options, message):
    model, learner = adapted()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        learner.generate(ids_of(1, 8), learn_output=True, **options)
    assert_same(before, state_of(model))
    assert TARGETS["llama"] == ["down_proj"]
