"""`GraphedLearner`, run step by step on CPU, against `Learner.observe`."""

import copy

import pytest
import torch
from tiny_models import adapted, assert_same, ids_of, state_of

import ttt
from ttt.adapt.convert import learning_layers


def pair(family="llama", batch=1, chunk=8, **options):
    """(an ordinary learner, a graphed one without a graph), of equal models."""
    model, learner = adapted(family, chunk=chunk, **options)
    learner.calibrate([ids_of(2, 16)])
    other = copy.deepcopy(model)
    return learner, ttt.GraphedLearner(ttt.Learner(other), batch=batch, chunk=chunk, graph=False)


def assert_learnt_alike(one, other, rtol=1e-3, atol=1e-5):
    for (_, a), (_, b) in zip(learning_layers(one), learning_layers(other), strict=True):
        a.flush()
        b.flush()
        torch.testing.assert_close(b.weight - b.anchor, a.weight - a.anchor, rtol=rtol, atol=atol)
        for name in ("step", "tokens", "recent_seen"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("batch", "window"), [(1, 8), (2, 8), (3, 5)])
def test_it_reads_and_learns_as_observe_does(family, batch, window):
    """Windows no larger than a chunk's rows: both commit after every chunk."""
    learner, graphed = pair(family, batch, window=window)
    ids = ids_of(batch, 41)
    plain, output = learner.observe(ids), graphed.observe(ids)
    torch.testing.assert_close(output.nll, plain.nll, rtol=1e-4, atol=1e-4)
    assert (output.learned, output.rejected) == (plain.learned, plain.rejected) == (5, 0)
    assert torch.equal(output.mask, plain.mask)
    assert_learnt_alike(learner.model, graphed.learner.model)
    again = graphed.observe(ids)
    assert again.bits < output.bits
    assert again.learned == 5


def test_with_a_window_of_several_chunks_effective_weights_are_the_same():
    """Without replay and penalty it does not matter when a window is committed."""
    learner, graphed = pair(window=20, ewc_lambda=0.0, replay_rows=0)
    ids = ids_of(1, 49)
    plain, output = learner.observe(ids), graphed.observe(ids)
    torch.testing.assert_close(output.nll, plain.nll, rtol=1e-4, atol=1e-4)
    for layer, other in zip(learner.layers, graphed.learner.layers, strict=True):
        torch.testing.assert_close(layer.effective_weight(), other.effective_weight(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"importance": "mas"}, {"importance": "si"}, {"clip": 0.1, "head_mass": 0.0}])
def test_other_importances_and_an_exact_head_learn_as_observe_does(options):
    learner, graphed = pair(window=8, **options)
    ids = ids_of(1, 33)
    plain, output = learner.observe(ids), graphed.observe(ids)
    torch.testing.assert_close(output.nll, plain.nll, rtol=1e-4, atol=1e-4)
    assert_learnt_alike(learner.model, graphed.learner.model)
    for layer, other in zip(learner.layers, graphed.learner.layers, strict=True):
        torch.testing.assert_close(layer.trace, other.trace, rtol=1e-3, atol=1e-5)


def test_eager_attention_has_the_same_cache():
    learner, graphed = pair(window=8)
    for each in (learner, graphed.learner):
        each.model.set_attn_implementation("eager")
    ids = ids_of(1, 33)
    torch.testing.assert_close(graphed.observe(ids).nll, learner.observe(ids).nll, rtol=1e-4, atol=1e-4)


def test_long_texts_are_read_in_segments():
    learner, graphed = pair(window=8, lr=0.0)
    ids = ids_of(1, 161)  # the model has 64 positions
    plain, output = learner.observe(ids), graphed.observe(ids)
    torch.testing.assert_close(output.nll, plain.nll, rtol=1e-4, atol=1e-4)
    assert (output.learned, output.rejected) == (0, 0)


@pytest.mark.parametrize("window", [8, 16])
def test_a_chunk_that_is_not_finite_changes_no_bit(window):
    _, graphed = pair(window=window)
    model = graphed.learner.model
    graphed.observe(ids_of(1, 25))
    graphed.restart()
    broken = [False]

    def poison(module, args, output):
        return output * float("nan") if broken[0] else output

    handle = model.model.layers[0].register_forward_hook(poison)  # keys and values above it are not finite, either
    ids = ids_of(1, 33)
    graphed.step(ids[:, :9])
    broken[0], before, counts = True, state_of(model), (int(graphed.learned), int(graphed.rejected))
    graphed.step(ids[:, 8:17])
    assert_same(before, state_of(model))
    assert (int(graphed.learned), int(graphed.rejected)) == (counts[0], counts[1] + 1)
    assert bool(torch.isnan(graphed.nll).all())
    # It goes on with an empty context, as if nothing had been there.
    broken[0] = False
    other = copy.deepcopy(model)
    graphed.step(ids[:, 16:25])
    assert int(graphed.learned) == counts[0] + 1
    with torch.no_grad():
        logits = other(ids[:, 16:24]).logits
    expected = torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 17:25], reduction="none")
    torch.testing.assert_close(graphed.nll[0], expected, rtol=1e-4, atol=1e-4)
    graphed.step(ids[:, 24:33])
    assert bool(torch.isfinite(graphed.nll).all())
    handle.remove()


def test_learning_switched_off_only_scores():
    _, graphed = pair(window=16)
    graphed.learning.zero_()
    before, ids = state_of(graphed.learner.model), ids_of(1, 25)
    output = graphed.observe(ids)
    assert_same(before, state_of(graphed.learner.model))
    assert (output.learned, output.rejected) == (0, 0)
    torch.testing.assert_close(output.nll, graphed.learner.observe(ids, learn=False).nll, rtol=1e-4, atol=1e-4)


def test_tensors_keep_their_addresses():
    _, graphed = pair(window=16)

    def addresses():
        held = {f"{i}.{k}": t for i, la in enumerate(graphed.learner.layers) for k, t in la.state().items()}
        held |= {k: t for k, t in vars(graphed).items() if isinstance(t, torch.Tensor)}
        return {k: t.data_ptr() for k, t in held.items() if not k.endswith("pending")}

    graphed.observe(ids_of(1, 25))
    before, cache = addresses(), graphed._cache.held.data_ptr()
    graphed.observe(ids_of(1, 41))
    assert addresses() == before
    assert graphed._cache.held.data_ptr() == cache
    assert not graphed._cache.held.requires_grad


def test_release_gives_the_layers_back():
    learner, graphed = pair(window=8)
    with pytest.raises(ValueError, match="capturable for steps of 8 rows, got 16"):
        graphed.learner.observe(ids_of(2, 9))
    graphed.release()
    ids = ids_of(2, 30)
    assert torch.equal(graphed.learner.observe(ids).nll, learner.observe(ids).nll)
    with pytest.raises(RuntimeError, match="was released"):
        graphed.observe(ids_of(1, 9))


def test_unsupported_arguments_and_models_are_refused():
    _, learner = adapted(chunk=8)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="needs the model on a CUDA device, got cpu; graph=False"):
            ttt.GraphedLearner(learner)
    for options, message in (
        ({"batch": 0}, "batch must be a whole number"),
        ({"chunk": 2.5}, "chunk must be a whole number"),
        ({"chunk": 65}, "chunk must be at most the learner's context of 64 tokens, got 65"),
    ):
        with pytest.raises(ValueError, match=message):
            ttt.GraphedLearner(learner, graph=False, **options)
    assert [layer.capturable for layer in learner.layers] == [None, None]
    graphed = ttt.GraphedLearner(learner, graph=False)
    for shape in ((1, 8), (2, 9), (1, 1), (1, 18)):
        with pytest.raises(ValueError, match=r"input_ids must have shape \(1, 1 \+ a multiple of 8\)"):
            graphed.observe(ids_of(*shape))
    with pytest.raises(ValueError, match=r"ids must be int64 of shape \(1, 9\)"):
        graphed.step(ids_of(1, 8))
    graphed.release()
    learner.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention by 'sdpa' or 'eager', got 'flash_attention_2'"):
        ttt.GraphedLearner(learner, graph=False)
