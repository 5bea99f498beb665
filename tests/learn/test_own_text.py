"""Calibration on text that the model writes itself."""

import copy
import types

import pytest
import torch
from tiny_models import VOCAB, adapted, assert_same, state_of, tiny

import ttt
from ttt.learn.own_text import LENGTH, SEQUENCES, TOPICS, own_text, written_text


class Words:
    """A tokenizer with a chat template: one token for each letter of the topic."""

    chat_template = "{{ messages }}"

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return "user: " + messages[0]["content"]

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return types.SimpleNamespace(input_ids=[1 + ord(letter) % (VOCAB - 1) for letter in text])


def continued(model, ids, length, seed):
    """``ids`` continued to ``length`` tokens, by hand: a forward pass over everything for each token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        while ids.shape[1] < length:
            sums = model(input_ids=ids).logits[:, -1].double().softmax(-1).cumsum(-1)
            drawn = torch.rand((len(ids), 1), dtype=torch.float64, generator=generator)
            ids = torch.cat([ids, (sums <= drawn * sums[:, -1:]).sum(1, keepdim=True)], 1)
    return ids


def test_text_is_drawn_from_the_models_own_distribution():
    """Given a seed, the tokens are those of a loop without a cache that draws from softmax of the logits."""
    model = tiny().eval()
    batches = list(own_text(model, context=40, seed=3))
    assert sum(len(ids) for ids in batches) == SEQUENCES
    assert {tuple(ids.shape) for ids in batches} == {(4, 40)}
    ids = continued(model, torch.full((SEQUENCES, 1), model.config.bos_token_id), 40, seed=3)
    assert torch.equal(torch.cat(batches), ids)
    assert not torch.equal(batches[1], batches[0])
    assert next(own_text(model, context=1000, seed=3)).shape == (4, LENGTH)


def test_a_chat_template_asks_for_every_topic():
    tokenizer, asked = Words(), []
    every = [tokenizer(f"user: Write about {t}.", False).input_ids for t in TOPICS]
    shortest = min(map(len, every))
    for at, ids in enumerate(own_text(tiny().eval(), tokenizer, context=200, seed=0)):
        prompts = every[4 * at : 4 * at + 4]
        assert torch.equal(ids[:, :shortest], torch.tensor([p[-shortest:] for p in prompts]))
        asked += prompts
    assert len(asked) == len(TOPICS) == SEQUENCES


@pytest.mark.parametrize("prompt", [100, 128, 129, 300])
def test_behind_a_long_template_there_is_text_of_the_models_own(monkeypatch, prompt):
    """As behind a system prompt of 300 tokens: what is measured must not be that prompt."""
    long = torch.arange(SEQUENCES * prompt).view(SEQUENCES, prompt) % VOCAB
    monkeypatch.setattr("ttt.learn.own_text._beginnings", lambda model, tokenizer: long)
    found = torch.cat(list(own_text(tiny().eval(), context=1000, seed=1)))
    assert torch.equal(found[:, :prompt], long)
    assert found.shape[1] == (LENGTH if prompt <= 128 else prompt + LENGTH // 2)
    assert len(found[:, prompt:].unique(dim=0)) == SEQUENCES


@pytest.mark.parametrize("context", [12, 30, 200])
def test_what_is_written_is_counted_and_given_without_the_prompts(context):
    model, tokenizer = tiny().eval(), Words()
    prompts = [tokenizer(f"user: Write about {topic}.", False).input_ids for topic in TOPICS]
    kept = min(min(map(len, prompts)), context - 9)
    wanted = continued(model, torch.tensor([prompt[-kept:] for prompt in prompts]), kept + 9, seed=5)[:, kept:]
    assert wanted.shape == (SEQUENCES, 9)
    assert torch.equal(written_text(model, tokenizer, context=context, seed=5, length=9), wanted)
    bare = continued(model, torch.full((SEQUENCES, 1), model.config.bos_token_id), 10, seed=6)[:, 1:]
    assert torch.equal(written_text(model, context=context, seed=6, length=9), bare)
    for length in (0, context):
        with pytest.raises(ValueError, match=rf"length must be .*{context - 1}.*got {length}"):
            written_text(model, tokenizer, context=context, seed=5, length=length)


@pytest.mark.parametrize("per_user", [None, ttt.LowRank(slots=2, rank=2, window=8)])
def test_calibrating_without_data_is_calibrating_on_that_text(per_user):
    base = tiny()
    config = ttt.TTTConfig(target_modules=["down_proj"], layers="last:0.5", per_user=per_user, seed=5)
    found = []
    for batches in (None, list(own_text(copy.deepcopy(base).eval(), context=30, seed=5))):
        learner = ttt.Learner(ttt.adapt_(copy.deepcopy(base), config), context=30)
        learner.calibrate(batches)
        layers = learner.layers or list(learner.pool.layers.values())
        assert all(bool(layer.basis.any()) for layer in layers)
        found.append({f"{la.name}.{k}": t.clone() for la in layers for k, t in la.named_buffers()})
    assert_same(*found)


def test_a_model_that_cannot_begin_a_text_is_refused_and_does_not_change():
    model, learner = adapted()
    model.config.bos_token_id = model.config.eos_token_id = None
    before = state_of(model)
    with pytest.raises(ValueError, match="batches must be given for a model whose config names no bos_token_id"):
        learner.calibrate()
    assert_same(before, state_of(model))
    with pytest.raises(TypeError, match="batches must be an iterable of batches, got None"):
        learner.calibrate(loss=lambda model, batch: model(batch).logits.sum())
