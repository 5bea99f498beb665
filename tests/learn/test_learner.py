"""The learner on tiny random Hugging Face models."""

import copy
import functools
import math

import pytest
import torch
from helpers import plain_config
from tiny_models import TARGETS, VOCAB, adapted, assert_same, ids_of, state_of, tiny

import ttt
import ttt.rules
from ttt.adapt.convert import learning_layers

ONES = torch.ones(1, 5, dtype=torch.long)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_adapt_observe_generate_save_load_restore(family, tmp_path):
    base = tiny(family)
    pristine = copy.deepcopy(base)
    options = {"target_modules": TARGETS[family], "layers": "last:0.5", "lr": 0.02, "chunk": 8, "window": 5}
    model = ttt.adapt_(base, plain_config(**options, replay_capacity=32))
    learner = ttt.Learner(model)
    learner.calibrate([ids_of(2, 20), ids_of(3, 9)])
    ids = ids_of(2, 50)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, pristine(ids).logits, rtol=1e-4, atol=1e-4)
    first = learner.observe(ids)
    for _ in range(5):
        last = learner.observe(ids)
    assert first.nll.shape == (2, 49)
    assert last.bits < first.bits - 0.05  # what was read is remembered
    assert first.rejected == 0
    assert first.learned == 7
    prompt = {"input_ids": ids[:1, :6], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    text = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert text.shape == (1, 18)

    path = tmp_path / "user.safetensors"
    ttt.save(model, path)
    fresh = ttt.load(copy.deepcopy(pristine), path)
    assert_same(state_of(model), state_of(fresh))
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model(ids).logits)
    assert torch.equal(fresh.generate(**prompt, max_new_tokens=12, do_sample=False), text)

    model.save_pretrained(tmp_path / "hf")
    again = type(pristine).from_pretrained(tmp_path / "hf")
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in pristine.state_dict().items()}

    ttt.restore_(model)
    for (name, p), (other, q) in zip(model.named_parameters(), pristine.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, pristine(ids).logits)
    assert [type(m) for m in model.modules()] == [type(m) for m in pristine.modules()]


def test_scores_are_those_of_the_frozen_model_before_learning():
    model, learner = adapted(lr=0.05)
    pristine = tiny()
    pristine.load_state_dict(model.state_dict())
    ids = ids_of(2, 30)
    with torch.no_grad():
        logp = pristine(ids).logits.log_softmax(-1)
    expected = -logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    output = learner.observe(ids)
    # The first chunk is scored before anything is learnt; later ones by a model that has learnt.
    torch.testing.assert_close(output.nll[:, :8], expected[:, :8], rtol=1e-4, atol=1e-4)
    assert float((output.nll[:, 8:] - expected[:, 8:]).abs().max()) > 1e-2
    learner.reset()
    scored = learner.observe(ids, learn=False)
    torch.testing.assert_close(scored.nll, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_chunk_equals_one_explicit_gradient_step(family):
    """Against autograd's own weight gradient, with everything else off."""
    model, learner = adapted(family, lr=0.01, chunk=64, window=1, ewc_lambda=0.0, replay_rows=0)
    plain = tiny(family)
    plain.load_state_dict(model.state_dict())
    ids = ids_of(3, 20)
    loss = torch.nn.functional.cross_entropy(
        plain(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    learner.observe(ids)
    for name, layer in learning_layers(model):
        other = plain.get_submodule(name)
        expected = (other.weight - 0.01 * other.weight.grad).detach()
        expected = expected.T if family == "gpt2" else expected
        change = layer.weight - layer.anchor
        torch.testing.assert_close(change, expected - layer.anchor, rtol=1e-3, atol=2e-5)


def test_lr_zero_leaves_logits_bit_identical():
    model, learner = adapted(lr=0.0)
    learner.calibrate([ids_of(2, 16)])
    ids = ids_of(2, 40)
    with torch.no_grad():
        before = model(ids).logits
    state = state_of(model)
    learner.observe(ids)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert_same(state, state_of(model))


def test_graph_begins_at_the_lowest_adapted_layer():
    model, learner = adapted(layers=[2])
    needs = {}
    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda m, a, out, i=i: needs.update({i: out.requires_grad}))
    learner.observe(ids_of(1, 9))
    assert needs == {0: False, 1: False, 2: True, 3: True}
    assert all(p.grad is None for p in model.parameters())


def test_tokens_that_may_not_teach_change_no_bit():
    model, learner = adapted()
    learner.calibrate([ids_of(2, 16)])
    learner.observe(ids_of(1, 20))
    before, ids = state_of(model), ids_of(2, 30)
    output = learner.observe(ids, learn_mask=torch.zeros(2, 30))
    assert_same(before, state_of(model))
    assert float(output.nll.min()) > 0  # read and scored all the same
    assert (output.learned, output.rejected) == (0, 0)


def test_masked_tokens_do_not_matter_to_what_is_learnt():
    """Sequences that may not teach leave exactly what the others alone would have left."""
    model, learner = adapted(ewc_lambda=0.0)
    start = learner.snapshot()
    ids = ids_of(3, 24)
    mask = torch.ones(3, 24)
    mask[1] = 0
    learner.observe(ids, learn_mask=mask)
    masked = state_of(model)
    learner.rollback(start)
    learner.observe(ids[[0, 2]])
    alone = state_of(model)
    for key in masked:
        torch.testing.assert_close(masked[key], alone[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_scored_nor_learnt(side, family):
    model, learner = adapted(family, replay_rows=0, ewc_lambda=0.0)
    start = learner.snapshot()
    ids = ids_of(1, 20)
    plain = learner.observe(ids)
    expected = state_of(model)
    learner.rollback(start)
    pad = torch.zeros(1, 8, dtype=torch.long)  # a whole chunk, so that chunks fall alike
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    mask = (torch.cat([pad, ids.clamp_min(1)] if side == "left" else [ids.clamp_min(1), pad], 1) > 0).long()
    output = learner.observe(padded, attention_mask=mask)
    assert int(output.mask.sum()) == 19
    torch.testing.assert_close(output.nll[output.mask], plain.nll.flatten(), rtol=1e-4, atol=1e-4)
    assert float(output.nll[~output.mask].abs().sum()) == 0
    after = state_of(model)
    # A padded text's last token still stands in its chunk: it adds a row with gradient 0, and no change.
    for key in expected:
        if key.endswith("weight"):
            torch.testing.assert_close(after[key], expected[key], rtol=1e-4, atol=1e-6)


def test_non_finite_chunks_are_rejected_and_change_nothing():
    model, learner = adapted()
    learner.calibrate([ids_of(2, 16)])
    learner.observe(ids_of(1, 20))
    before = state_of(model)
    broken = [True]

    def poison(module, args, output):
        return output * float("nan") if broken[0] else output

    handle = model.lm_head.register_forward_hook(poison)
    output = learner.observe(ids_of(2, 17))
    assert (output.learned, output.rejected) == (0, 2)
    assert_same(before, state_of(model))
    handle.remove()

    calls = []

    def once(module, args, output):
        calls.append(1)
        return output * float("inf") if len(calls) == 2 else output

    handle = model.model.layers[-1].register_forward_hook(once)
    output = learner.observe(ids_of(1, 33))
    handle.remove()
    assert (output.learned, output.rejected) == (3, 1)
    assert bool(torch.isfinite(output.nll[:, 16:]).all())
    assert all(bool(torch.isfinite(t).all()) for t in state_of(model).values())


def test_infinite_gradient_with_finite_loss_is_rejected():
    model, learner = adapted()
    before = state_of(model)

    class Blowup(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    handle = model.model.norm.register_forward_hook(lambda m, a, out: Blowup.apply(out) if out.requires_grad else out)
    output = learner.observe(ids_of(1, 9))
    handle.remove()
    assert output.rejected == 1
    assert bool(torch.isfinite(output.nll).all())
    assert_same(before, state_of(model))


def test_generate_uses_what_was_learnt():
    model, learner = adapted(lr=0.05, target_modules=["down_proj", "up_proj", "gate_proj"], layers="all",
                             ewc_lambda=0.0, replay_rows=0, clip=1.0)  # fmt: skip
    text = torch.tensor([[5, 9, 13, 17, 21, 25, 29, 33] * 6])
    for _ in range(30):
        learner.observe(text)
    out = model.generate(
        text[:, :12], attention_mask=torch.ones(1, 12, dtype=torch.long), max_new_tokens=20, do_sample=False
    )
    assert out[0, 12:].tolist() == text[0, 12:32].tolist()


def test_long_texts_are_read_in_segments():
    _model, learner = adapted(lr=0.0)
    ids = ids_of(1, 150)  # the model has 64 positions
    output = learner.observe(ids)
    parts = [learner.observe(ids[:, s : s + 65]).nll for s in (0, 64, 128)]
    torch.testing.assert_close(output.nll, torch.cat(parts, 1), rtol=1e-4, atol=1e-4)


def test_calibration_is_the_fisher_normalised_by_its_mean():
    model, learner = adapted(fisher="empirical", chunk=64)
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    batches = [ids_of(2, 12), ids_of(1, 7)]
    learner.calibrate(batches)
    layers = learning_layers(model)
    sums = {name: torch.zeros_like(layer.weight) for name, layer in layers}
    captured = {}
    for name, _ in layers:
        module = plain.get_submodule(name)
        module.register_forward_hook(lambda m, a, out, n=name: captured.update({n: (a[0], out.requires_grad_())}))
    for ids in batches:
        loss = torch.nn.functional.cross_entropy(
            plain(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        deltas = torch.autograd.grad(loss, [captured[n][1] for n, _ in layers])
        for (name, _), delta in zip(layers, deltas, strict=True):
            for x, d in zip(captured[name][0].flatten(0, 1), delta.flatten(0, 1), strict=True):
                sums[name] += torch.outer(d, x).square()  # one token at a time
    mean = sum(s.sum() for s in sums.values()) / sum(s.numel() for s in sums.values())
    for name, layer in layers:
        torch.testing.assert_close(layer.importance, sums[name] / mean, rtol=1e-3, atol=1e-5)
        assert int(layer.seen) == 2 * 12 + 7
        assert torch.equal(layer.weight, layer.anchor)
    with pytest.raises(ValueError, match="got none"):
        learner.calibrate([])


@pytest.mark.parametrize("importance", ["fisher", "si", "mas"])
def test_consolidate_protects_and_reset_forgets(importance):
    model, learner = adapted(importance=importance, ewc_lambda=1.0)
    learner.calibrate([ids_of(2, 16)])
    calibrated = state_of(model)
    learner.observe(ids_of(2, 40))
    _name, layer = learning_layers(model)[0]
    learner.flush()
    trace, old = layer.trace.clone(), layer.importance.clone()
    moved = (layer.weight - layer.anchor).square()
    tokens = int(layer.tokens)
    assert tokens == 78
    scale = float(layer.importance_scale)
    learner.consolidate()
    if importance == "si":
        expected = torch.relu(trace / (moved + learner.config.si_xi))
        grown = layer.importance - old
        ratio = grown[expected > 0] / expected[expected > 0]
        torch.testing.assert_close(ratio, ratio.median().expand_as(ratio), rtol=1e-2, atol=1e-3)
    else:
        torch.testing.assert_close(layer.importance, old + trace / tokens / scale, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.anchor, layer.weight)
    assert float(layer.trace.abs().sum()) == 0
    assert int(layer.tokens) == 0
    assert int(layer.seen) == 32 + 78
    assert float(layer.recent.abs().sum()) == 0
    learner.observe(ids_of(2, 40))
    learner.reset()
    assert_same(calibrated, state_of(model))


def test_snapshot_and_rollback_are_bit_exact():
    model, learner = adapted(window=64)
    learner.calibrate([ids_of(2, 16)])
    learner.observe(ids_of(1, 30))
    snapshot, before = learner.snapshot(), state_of(model)
    ids = ids_of(2, 25)
    learner.consolidate()
    first = learner.observe(ids)
    learner.rollback(snapshot)
    assert_same(before, state_of(model))
    learner.observe(ids)
    learner.rollback(snapshot)
    learner.consolidate()
    assert torch.equal(learner.observe(ids).nll, first.nll)
    _, other = adapted(layers="all")
    with pytest.raises(ValueError, match="snapshot does not fit"):
        other.rollback(snapshot)


@pytest.mark.parametrize("importance", ["si", "mas"])
def test_other_importances_learn_too(importance):
    _, learner = adapted(importance=importance)
    learner.calibrate([ids_of(2, 16)])
    ids = ids_of(1, 40)
    bits = [learner.observe(ids).bits for _ in range(5)]
    assert bits[-1] < bits[0]


def test_16_bit_models_learn():
    model = tiny().to(torch.bfloat16)
    ttt.adapt_(model, plain_config(target_modules=["down_proj"], lr=0.02, chunk=8, replay_capacity=32))
    learner = ttt.Learner(model)
    learner.calibrate([ids_of(2, 16)])
    assert model.model.layers[0].mlp.down_proj.trace.dtype == torch.bfloat16
    ids = ids_of(1, 40)
    bits = [learner.observe(ids).bits for _ in range(6)]
    assert bits[-1] < bits[0] - 0.05


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        (torch.zeros(2, 5), {}, TypeError, "input_ids must be int64"),
        (torch.zeros(5, dtype=torch.long), {}, ValueError, r"shape \(B, T\)"),
        (torch.full((1, 5), VOCAB), {}, ValueError, rf"input_ids must be in \[0, {VOCAB}\)"),
        (torch.zeros(1, 5, dtype=torch.long), {"learn_mask": torch.ones(1, 4)}, ValueError, "learn_mask must have"),
        (torch.zeros(1, 5, dtype=torch.long), {"attention_mask": torch.ones(5)}, ValueError, "attention_mask must"),
        ("text", {}, TypeError, "input_ids must be a dense tensor with data, got str"),
        (None, {}, TypeError, "input_ids must be a dense tensor with data, got NoneType"),
        ([[1, 2]], {}, TypeError, "input_ids must be a dense tensor with data, got list"),
        (torch.zeros(1, 5, dtype=torch.long, device="meta"), {}, TypeError, "input_ids must .* the meta device"),
        (torch.zeros(1, 5, dtype=torch.long).to_sparse(), {}, TypeError, "input_ids must .* a torch.sparse_coo"),
        (torch.ones(1, 3, dtype=torch.bool), {}, TypeError, "input_ids must be int64, got torch.bool"),
        (ONES, {"attention_mask": [[1] * 5]}, TypeError, "attention_mask must be a dense tensor with data, got list"),
        (ONES, {"learn_mask": True}, TypeError, "learn_mask must be a dense tensor with data, got bool"),
        (ONES, {"learn_mask": ONES.to("meta")}, TypeError, "learn_mask must be a dense tensor with data"),
        (ONES, {"learn_mask": 2 * ONES}, ValueError, "learn_mask must hold True and False, or 0 and 1, got 2"),
        (ONES, {"attention_mask": -ONES}, ValueError, "attention_mask must hold True and False, or 0 and 1, got -1"),
        (ONES, {"attention_mask": 0.5 * ONES}, ValueError, "attention_mask must hold .* got 0.5"),
        (ONES, {"learn_mask": torch.nan * ONES}, ValueError, "learn_mask must hold .* got nan"),
        (ONES, {"learn": "no"}, TypeError, "learn must be True or False, got str 'no'"),
        (ONES, {"learn": None}, TypeError, "learn must be True or False, got None"),
        (ONES, {"learn": 1}, TypeError, "learn must be True or False, got int 1"),
        (ONES, {"users": ["a"]}, ValueError, r"users must be None: this model has one set of weights, .* got \['a'\]"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(ids, options, error, message):
    model, learner = adapted()
    before = state_of(model)
    with pytest.raises(error, match=message):
        learner.observe(ids, **options)
    assert_same(before, state_of(model))


def test_wrong_types_are_refused_by_name_and_change_nothing():
    model, learner = adapted()
    learner.observe(ids_of(1, 20))
    fresh, before = adapted()[1], state_of(model)
    generate = functools.partial(learner.generate, ids_of(1, 3))
    for call, match in (
        (lambda: ttt.Learner(3), "model must be a torch.nn.Module, got int 3"),
        (lambda: ttt.Learner(None), "model must be a torch.nn.Module, got None"),
        (lambda: ttt.Learner(model, guard="x"), "guard must be a ttt.Guard or None, got str 'x'"),
        (lambda: ttt.Learner(model, rules=3), "rules must be a list of ttt.rules.StreamRule, got int 3"),
        (lambda: ttt.Learner(model, rules=["x"]), "rules must be ttt.rules.StreamRule"),
        (lambda: ttt.Guard(None), "batches must be a list of .* got None"),
        (lambda: ttt.Learner(model, guard=ttt.Guard("x")), "each of batches must be a dense tensor with data, got str"),
        (lambda: learner.rollback(None), "snapshot must be what Learner.snapshot returns, got None"),
        (lambda: learner.rollback([{}]), "snapshot must be what Learner.snapshot returns, got list"),
        (lambda: fresh.calibrate(3), "batches must be an iterable of batches, got int 3"),
        (lambda: fresh.calibrate("x"), "each of batches must be a dense tensor with data, got str"),
        (lambda: fresh.calibrate([ids_of(1, 9).float()]), "each of batches must be int64"),
        (lambda: fresh.calibrate([ids_of(1, 9)], loss=3), "loss must be a function of .* got int"),
        (lambda: fresh.calibrate([1], loss=lambda model, batch: 3.0), "loss must return a scalar tensor .* got float"),
        (lambda: fresh.calibrate([1], loss=lambda model, batch: torch.ones(())), "loss must return .* without a graph"),
        (lambda: learner.generate("x", max_new_tokens=2), "input_ids must be a dense tensor with data, got str"),
        (
            lambda: learner.generate(ids_of(1, 3), max_new_tokens=2, learn_prompt=2),
            "learn_prompt must be True or False",
        ),
        (lambda: generate(max_new_tokens=2, generator=2), "generator must be a torch.Generator"),
        (lambda: ttt.GraphedLearner(model), "learner must be a ttt.Learner, got LlamaForCausalLM"),
        (lambda: ttt.GraphedLearner(learner, graph=0), "graph must be True or False"),
        (lambda: ttt.GrowingLearner(model), "learner must be a ttt.Learner, got LlamaForCausalLM"),
        (lambda: ttt.GrowingLearner(learner).observe(ids_of(1, 3), learn=0), "learn must be True or False"),
        (lambda: ttt.GrowingLearner(learner).load(None), "path must be a path .*, got None"),
        (lambda: ttt.GrowingLearner(learner).save(3), "path must be a path .*, got int 3"),
        (lambda: learner.layers[0].load_state(None), "state must be a dict of tensors by name, got None"),
        (lambda: learner.layers[0].load_state({"trace": 1, "step": 3}), "trace of .* must be a dense tensor with data"),
        (lambda: ttt.nn.Linear(4, 4, config="x"), "config must be a ttt.TTTConfig or None, got str 'x'"),
        (lambda: ttt.rules.SequenceReplay(4, base=[1]), "base must be a dense tensor with data, got list"),
        (lambda: ttt.rules.Trainer(model, 3), "rules must be a list of ttt.rules.Rule or defences, got int 3"),
        (lambda: ttt.Pool(3), "layers must be a dict of ttt.nn.LowRankLinear by name, got int 3"),
        (lambda: ttt.info("x"), "file must be a text file to write to, or None, got str"),
    ):
        with pytest.raises(TypeError, match=match):
            call()
    for call, match in (
        (lambda: ttt.Learner(model, context="x"), "context must be a whole number of at least 2, got 'x'"),
        (lambda: ttt.Learner(model, context=1), "context must be a whole number of at least 2, got 1"),
        (lambda: fresh.calibrate(ids_of(2, 9)), r"each of batches must have shape \(B, T\)"),
        (lambda: generate(max_new_tokens=None), "max_new_tokens must be a whole number"),
        (
            lambda: learner.generate(ids_of(1, 3), max_new_tokens=2, learn_every=None),
            "learn_every must be a whole number",
        ),
        (lambda: generate(max_new_tokens=2, temperature="x"), "temperature must be a number in"),
        (lambda: generate(max_new_tokens=2, eos_token_id=[1]), "eos_token_id must be a whole"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert_same(before, state_of(model))
    assert not any(bool(layer.seen) for layer in fresh.layers)


def test_a_model_that_reads_no_tokens_is_refused_by_name():
    model = ttt.adapt_(torch.nn.Sequential(torch.nn.Linear(4, 4)), plain_config(), filter_fn=lambda *_: True)
    with pytest.raises(TypeError, match="model must be a transformers causal language model to read tokens, got Seq"):
        ttt.Learner(model).observe(ids_of(1, 9))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_between_tokens_is_not_seen_either(family):
    """As where texts were joined: only the token after it is not scored."""
    model, learner = adapted(family)
    ids = ids_of(1, 20)
    plain = learner.observe(ids, learn=False).nll[0]
    holed = torch.cat([ids[:, :7], ids_of(1, 4), ids[:, 7:]], 1)
    mask = torch.ones_like(holed)
    mask[:, 7:11] = 0
    output = learner.observe(holed, attention_mask=mask, learn=False)
    torch.testing.assert_close(output.nll[output.mask], torch.cat([plain[:6], plain[7:]]), rtol=1e-4, atol=1e-4)
    learner.observe(holed, attention_mask=mask)
    found = state_of(model)
    learner.reset()
    learner.observe(torch.where(mask == 1, holed, 0), attention_mask=mask)
    assert_same(found, state_of(model))


def test_a_text_of_which_nothing_is_scored_has_no_mean():
    _, learner = adapted()
    for ids, mask in ((ids_of(2, 1), None), (ids_of(2, 9), torch.zeros(2, 9))):
        output = learner.observe(ids, attention_mask=mask)
        assert not output.mask.any()
        assert math.isnan(output.bits)
        assert (output.learned, output.rejected) == (0, 0)
    assert learner.observe(ids_of(2, 1)).nll.shape == (2, 0)


def test_compiled_adapted_model_equals_eager():
    model, learner = adapted("gpt2")
    learner.observe(ids_of(1, 20))
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True)
    ids = ids_of(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_consolidated_memory_holds_only_rows_that_passed_through_the_layer():
    model, learner = adapted(replay_capacity=2000)  # more than calibration and the sample of recent rows can fill
    learner.calibrate([ids_of(2, 16)])
    for _ in range(30):
        learner.observe(ids_of(2, 40))
    layer = learning_layers(model)[0][1]
    assert int(layer.recent_seen) == 30 * 78
    learner.consolidate()
    assert int(layer.seen) == 32 + 1024
    assert bool((layer.memory[: 32 + 1024].abs().sum(1) > 0).all())
    assert float(layer.memory[32 + 1024 :].abs().sum()) == 0
