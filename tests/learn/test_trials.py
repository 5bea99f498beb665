"""What a model is tried for before its first text: once for a model, and anew when its structure has changed."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
import transformers
from helpers import plain_config
from tiny_models import VOCAB, ids_of, tiny

import ttt
from ttt.learn import continues


@contextlib.contextmanager
def lengths_read():
    """Inside, the number of tokens of every forward pass is added to the list. A hook would be another structure."""
    seen, original = [], torch.nn.functional.embedding

    def counting(ids, *args, **kwargs):
        seen.append(ids.shape[1])
        return original(ids, *args, **kwargs)

    torch.nn.functional.embedding = counting
    try:
        yield seen
    finally:
        torch.nn.functional.embedding = original


def adapted(**options):
    return ttt.adapt_(tiny(), plain_config(target_modules=["down_proj"], lr=0.01, chunk=8, **options))


def left_padded():
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    return mask


def test_a_second_learner_of_a_model_tries_nothing():
    model, ids = adapted(), ids_of(2, 9)
    with lengths_read() as seen:
        ttt.Learner(model).observe(ids, learn=False)
    assert len(seen) == 4  # two passes to see whether later tokens are seen, one for the cache, and the text
    with lengths_read() as seen:
        ttt.Learner(model).observe(ids, learn=False)
        ttt.Learner(model, context=8).observe(ids, learn=False)
    assert seen == [8, 8]
    padded = ids_of(2, 12)
    for expected in (2 + 2, 2):  # 17 tokens, and the same behind 3 of padding; two chunks
        with lengths_read() as seen:
            ttt.Learner(model).observe(padded, attention_mask=left_padded(), learn=False)
        assert len(seen) == expected
    with lengths_read() as seen:
        ttt.Learner(model).observe(padded, attention_mask=left_padded().flip(1), learn=False)
    assert len(seen) == 2


@pytest.mark.parametrize("change", ["copy", "module", "configuration", "hook", "adapted again"])
def test_another_structure_is_tried_again(change):
    model, ids = adapted(), ids_of(2, 9)
    ttt.Learner(model).observe(ids)
    if change == "copy":
        model = copy.deepcopy(model)
    elif change == "module":
        model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    elif change == "configuration":
        model.config.rms_norm_eps = 0.1
    elif change == "hook":
        model.model.layers[1].register_forward_hook(lambda *args: None)
    else:
        ttt.restore_(model)
        ttt.adapt_(model, plain_config(target_modules=["up_proj"], lr=0.01, chunk=8))
    with lengths_read() as seen:
        ttt.Learner(model).observe(ids, learn=False)
    assert len(seen) == 4


def test_a_refusal_is_not_remembered_as_passed():
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 0}
    config = transformers.BertConfig(**settings, intermediate_size=48, num_attention_heads=4)
    model = transformers.BertLMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    ttt.adapt_(model, ttt.TTTConfig(target_modules=["query"], protect=[], chunk=8))
    for _ in range(2):
        with pytest.raises(ValueError, match="sees later tokens"):
            ttt.Learner(model).observe(ids_of(2, 20))


def test_it_keeps_no_model_alive():
    model = adapted()
    ttt.Learner(model).observe(ids_of(1, 9))
    assert model in continues._passed
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("learn", [False, True])
def test_positions_that_count_through_padding_are_refused_and_right_padding_is_not(learn):
    config = transformers.TrOCRConfig(
        vocab_size=VOCAB, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, pad_token_id=0,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, dropout=0.0, is_encoder_decoder=False,
    )  # fmt: skip
    model = transformers.TrOCRForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    learner = ttt.Learner(ttt.adapt_(model, plain_config(target_modules=["fc1"], lr=0.01, chunk=8)))
    ids = torch.randint(3, VOCAB, (2, 12))
    alone = learner.observe(ids[:1, :8], learn=False).nll
    before = {name: t.clone() for layer in learner.layers for name, t in layer.state().items()}
    with pytest.raises(ValueError, match=r"TrOCRForCausalLM\) computes something else behind padding"):
        learner.observe(ids, attention_mask=left_padded(), learn=learn)
    with pytest.raises(ValueError, match="Put padding on the right"):
        learner.generate(ids, attention_mask=left_padded(), max_new_tokens=2, learn_prompt=learn)
    after = {name: t.clone() for layer in learner.layers for name, t in layer.state().items()}
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    seen = learner.observe(ids, attention_mask=left_padded().flip(1), learn=False)
    torch.testing.assert_close(seen.nll[:1, :7], alone, rtol=1e-4, atol=1e-4)


def latent_attention():
    """A model whose keys and values are computed from what the cache holds, of all tokens, in every chunk."""
    config = transformers.DeepseekV2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.DeepseekV2ForCausalLM(config).eval()


@pytest.mark.parametrize("users", [None, ttt.LowRank(slots=2, rank=2, window=8)])
def test_layers_that_get_tokens_of_the_cache_again_are_refused_before_a_chunk_is_learnt(users):
    targets, ids, teaches = ["kv_b_proj", "o_proj"], ids_of(2, 30), torch.ones(2, 30, dtype=torch.bool)
    named = {"learn_mask": teaches} if users is None else {"users": ["a", "b"]}
    model = latent_attention()
    config = plain_config(target_modules=targets, lr=0.01, chunk=8, per_user=users)
    learner = ttt.Learner(ttt.adapt_(copy.deepcopy(model), config))
    learner.observe(ids, learn=False, **named)
    layers = learner.access.layers
    before = [{name: t.clone() for name, t in layer.named_buffers()} for layer in layers]
    with pytest.raises(
        ValueError, match=r"kv_b_proj gets 17 rows for the 8 tokens of a chunk: .* leave it out of target"
    ):
        learner.observe(ids, **named)
    for layer, state in zip(layers, before, strict=True):
        assert all(torch.equal(t, state[name]) for name, t in layer.named_buffers())
    if users is None:
        assert learner.observe(ids).learned == 4  # whose rows they are does not matter
    config = plain_config(target_modules=targets[1:], lr=0.01, chunk=8, per_user=users)
    assert ttt.Learner(ttt.adapt_(model, config)).observe(ids, **named).rejected == 0
