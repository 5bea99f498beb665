"""What a cache is after calls that refuse, fail or must not change it, and what a file lacks."""

import pytest
import torch

from ttt.nn.sequence import GatedDeltaNet, InPlaceMLP, WindowAttention
from ttt.ops.sequence.states import tensors_of
from ttt.sequence_models import SequenceCache, TTTSequenceConfig, TTTSequenceForCausalLM

MIXERS = ["gated-delta", "window", "ttt-linear", "titans", "lact"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "window": 8}


def model_of(mixers=MIXERS, **options):
    config = TTTSequenceConfig(num_hidden_layers=len(mixers), mixers=mixers, mini_batch=8, chunk=16, **SIZES, **options)
    return TTTSequenceForCausalLM(config).eval()


def ids_of(*shape):
    return torch.randint(1, 64, shape)


@torch.no_grad()
def read(model, tokens=21):
    """A cache after some tokens, and a copy of it."""
    cache = model.new_cache(2)
    model(ids_of(2, tokens), cache=cache)
    model(ids_of(2, 1), cache=cache)
    return cache, cache.copy()


def assert_same(cache, other):
    assert cache.seen == other.seen
    for a, b in zip(cache.layers, other.layers, strict=True):
        for x, y in zip(tensors_of(a.state), tensors_of(b.state), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_without_use_cache_the_cache_is_read_and_not_changed(tokens):
    model = model_of(in_place=[0])
    cache, before = read(model)
    ids = ids_of(2, tokens)
    with torch.no_grad():
        found = model(ids, cache=cache, use_cache=False).logits
        assert_same(cache, before)
        assert torch.equal(found, model(ids, cache=cache).logits)


def test_gradients_go_through_a_cache_that_is_only_read():
    model = model_of(in_place=[0]).train()
    first, rest = ids_of(2, 9), ids_of(2, 12)
    found = []
    for keep in (False, True):
        cache = model(first, use_cache=True).past_key_values
        model.zero_grad()
        model(rest, cache=cache, labels=rest, use_cache=keep).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name])
    own = {name: p for name, p in model.named_parameters() if name in found[0]}
    with torch.no_grad():
        cache = model(first, use_cache=True).past_key_values
    model.zero_grad()
    model(rest, cache=cache, labels=rest, use_cache=False).loss.backward()
    assert any(not torch.allclose(found[0][name], p.grad) for name, p in own.items())


def test_an_error_between_two_blocks_is_not_lost():
    model = model_of()
    cache, before = read(model)
    hook = model.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            model(ids_of(2, 7), cache=cache)  # several tokens change nothing in place
        assert_same(cache, before)
        with pytest.raises(ZeroDivisionError):
            model(ids_of(2, 1), cache=cache)
        hook.remove()
        for use in (lambda: model(ids_of(2, 1), cache=cache), cache.copy, cache.tensors):
            with pytest.raises(RuntimeError, match="cannot be used any more"):
                use()
        token = ids_of(2, 1)
        again = model(token, cache=before.copy()).logits
        assert torch.equal(again, model(token, cache=before).logits)
        cache.reset()
        model(ids_of(2, 3), cache=cache)
    assert cache.seen == 3


@pytest.mark.parametrize("shape", [(2, 2), (1, 1), (2,)])
def test_labels_that_do_not_fit_are_refused_before_the_cache_changes(shape):
    model = model_of()
    cache, before = read(model)
    with torch.no_grad(), pytest.raises(ValueError, match=r"labels must be \(2, 1\)"):
        model(ids_of(2, 1), cache=cache, labels=ids_of(*shape))
    assert_same(cache, before)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_state_does_not_keep_the_text(mixer):
    model = model_of([mixer], in_place=[0])
    cache = model.new_cache(1)
    with torch.no_grad():
        model(ids_of(1, 3000), cache=cache)
    for t in tensors_of(cache.layers[0].state):
        assert t.untyped_storage().nbytes() <= 2 * t.nbytes + 64


@pytest.mark.parametrize("layer", [GatedDeltaNet(32, 2), WindowAttention(32, 2, window=4), InPlaceMLP(32, 48, chunk=8)])
def test_gradients_go_through_a_state_that_was_copied(layer):
    x = torch.randn(1, 30, 32, requires_grad=True)
    whole, _ = layer(x)
    first, state = layer(x[:, :24])
    rest, _ = layer(x[:, 24:], state)
    (exact,) = torch.autograd.grad(whole.square().sum(), x)
    (found,) = torch.autograd.grad(torch.cat([first, rest], 1).square().sum(), x)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_file_lacks_begins_as_in_a_new_model(tmp_path, dtype):
    saved = model_of(["gated-delta", "titans"])
    saved.save_pretrained(tmp_path)
    junk = [torch.full((300, 300), float("nan")) for _ in range(50)]  # what uninitialised memory may hold
    del junk
    mixers = ["gated-delta", "titans", *MIXERS]
    options = {"num_hidden_layers": len(mixers), "mixers": mixers, "in_place": [1], "protect": 4}
    model, found = TTTSequenceForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype, **options)
    assert len(found["missing_keys"]) > 40
    kept, new = saved.state_dict(), TTTSequenceForCausalLM(model.config).state_dict()
    drawn = 0
    for name, t in model.state_dict().items():
        assert t.dtype in (dtype, torch.int64)
        assert t.isfinite().all(), name
        if name in kept:
            assert torch.equal(t, kept[name].to(dtype)), name
        elif new[name].unique().numel() == 1:  # ones, zeros, and the rate of an MLP
            assert torch.equal(t, new[name].to(dtype)), name
        else:
            drawn += 1
            assert t.abs().max() <= 2 * new[name].abs().max() + 1, name
            assert t.numel() < 64 or 0.7 < t.float().std() / new[name].std() < 1.4, name
    assert drawn > 20
    assert isinstance(model(ids_of(1, 5), use_cache=True).past_key_values, SequenceCache)
