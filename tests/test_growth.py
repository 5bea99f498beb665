"""`ttt.GrowingLearner` on a tiny random Llama that reads domains of different alphabets."""

import pytest
import torch
from test_learner import adapted, assert_same, ids_of, state_of

import ttt
from ttt.change import Change

OPTIONS = {"target_modules": ["gate_proj", "up_proj", "down_proj"], "lr": 0.03, "clip": 3.0, "chunk": 8, "window": 8}
ALPHABETS = {"a": 1, "b": 13, "c": 25}


def text(domain, length):
    """Round an alphabet of 12 tokens, from anywhere, with a slip now and then."""
    steps = torch.where(torch.rand(length + 1) < 0.03, torch.randint(12, (length + 1,)), 1)
    return (ALPHABETS[domain] + steps.cumsum(0) % 12).view(1, -1)


def growing(learner_options=None, **options):
    model, learner = adapted(**{**OPTIONS, **(learner_options or {})})
    learner.calibrate([ids_of(2, 20)])
    return model, ttt.GrowingLearner(learner, **{"young": 128, "patience": 1, "rank": 16, "alarm": 1.0, **options})


def kinds(learner, since=0):
    return [switch.kind for switch in learner.history[since:] if switch.kind in ("new", "reopen")]


def factors(column):
    return [t.clone() for t in column.a + column.b]


def test_without_a_change_it_is_the_learner_to_the_bit():
    model, learner = growing(alarm=1e9)
    _, plain = adapted(**OPTIONS)
    plain.rollback(learner.learner.snapshot())
    plain.model.load_state_dict(model.state_dict())
    ids = text("a", 300)
    ours, theirs = learner.observe(ids), plain.observe(ids)
    assert torch.equal(ours.nll, theirs.nll)
    assert torch.equal(ours.mask, theirs.mask)
    assert (ours.learned, ours.rejected) == (theirs.learned, theirs.rejected)
    assert_same(state_of(model), state_of(plain.model))
    assert learner.worth > 0.5  # of the half of its pieces that were scored under the anchor, too


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_a_column_is_born_at_the_switch_and_reopened_when_the_domain_comes_back(seed):
    torch.manual_seed(seed)  # models in which the second domain unteaches the first
    _, learner = growing()
    first = {"a": learner.observe(text("a", 64)).bits}
    learner.observe(text("a", 576))
    assert (kinds(learner), learner.columns) == ([], [])
    first["b"] = learner.observe(text("b", 64)).bits
    learner.observe(text("b", 576))
    assert kinds(learner) == ["new"]
    assert len(learner.columns) == 1
    assert 640 <= learner.columns[0].tokens < 640 + 4 * 64
    kept = factors(learner.columns[0])
    for index, domain in enumerate("ab"):
        learner.observe(text(domain, 320))
        assert kinds(learner) == ["new", "reopen", "reopen"][: index + 2]
        assert (len(learner.columns), learner.active) == (2, index)
        assert learner.observe(text(domain, 64)).bits < first[domain] - 1
        if domain == "a":  # reopened, and not written
            assert all(torch.equal(x, y) for x, y in zip(kept, factors(learner.columns[0]), strict=True))
    assert not torch.equal(kept[0], learner.columns[0].a[0])  # closing replaced it


def test_frozen_columns_and_the_anchor_stay_to_the_bit():
    _, learner = growing()
    for domain in "ab":
        learner.observe(text(domain, 320))
        learner.close()
    kept = [factors(c) for c in learner.columns]
    anchors = [layer.anchor.clone() for layer in learner.layers]
    assert all(torch.equal(layer.weight, layer.anchor) for layer in learner.layers)
    learner.observe(text("c", 640))
    learner.close()
    assert len(learner.columns) > len(kept) == 2
    for before, column in zip(kept, learner.columns, strict=False):
        assert all(torch.equal(x, y) for x, y in zip(before, factors(column), strict=True))
    assert all(torch.equal(a, layer.anchor) for a, layer in zip(anchors, learner.layers, strict=True))


def test_scores_come_before_learning_and_before_routing():
    """Of every piece, the first chunk's are those of the model as the piece before left it."""
    model, learner = growing()
    for domain in ("a", "b", "a"):
        for _ in range(8):
            ids = text(domain, 64)
            with torch.no_grad():
                logp = model(input_ids=ids[:, :8]).logits.log_softmax(-1)
            expected = -logp.gather(-1, ids[:, 1:9, None])[..., 0]
            torch.testing.assert_close(learner.observe(ids).nll[:, :8], expected, rtol=1e-4, atol=1e-4)
    assert "new" in kinds(learner)


def test_beyond_the_budget_the_nearest_columns_are_merged():
    _, learner = growing(budget=2, alarm=1e9)
    for domain in "aba":
        learner.observe(text(domain, 640))
        learner.close()
    assert [c.tokens for c in learner.columns] == [1280, 640]  # the two of one domain became one
    assert learner.bytes() == sum(c.bytes for c in learner.columns)


def test_text_that_the_anchor_knows_leaves_no_column():
    _, learner = growing({"lr": 1e-6})
    learner.observe(text("a", 640))
    learner.close()
    assert learner.columns == []


def test_scoring_and_routing_change_no_bit():
    model, learner = growing(alarm=1e9)
    learner.observe(text("a", 640))
    learner.close()
    learner.observe(text("b", 640))
    before, history = state_of(model), list(learner.history)
    learner.observe(text("c", 300), learn=False)
    learner.bits(text("c", 40), [None, *learner.columns])
    expected = {"a": "0", "b": "active"}
    for domain, name in expected.items():
        with learner.routed(text(domain, 60)) as chosen:
            assert chosen == name
    assert_same(before, state_of(model))
    assert learner.history == history
    assert learner.tokens > 0


def test_routing_to_the_anchor_gives_its_scores():
    model, learner = growing()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    known = model.generate(torch.randint(49, 60, (1, 1)), max_new_tokens=50, do_sample=True, pad_token_id=0)
    with torch.no_grad():
        frozen = model(input_ids=known).logits
    for domain in "ab":
        learner.observe(text(domain, 640))
    assert not torch.equal(start["model.layers.3.mlp.down_proj.weight"], learner.layers[-1].weight)
    with learner.routed(known) as chosen, torch.no_grad():
        assert chosen == "anchor"
        assert torch.equal(model(input_ids=known).logits, frozen)


def test_columns_are_saved_and_loaded_to_the_bit(tmp_path):
    model, learner = growing()
    for domain in "ab":
        learner.observe(text(domain, 320))
        learner.close()
    path, ids = tmp_path / "columns.safetensors", text("a", 60)
    learner.save(path)
    kept, scores = learner.columns, learner.bits(ids, learner.columns)
    learner.observe(text("c", 128))
    learner.load(path)
    assert len(learner.columns) == len(kept) == 2
    for one, other in zip(kept, learner.columns, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(factors(one), factors(other), strict=True))
        assert (one.tokens, one.worth, one.error) == (other.tokens, other.worth, other.error)
    assert all(torch.equal(x, y) for x, y in zip(scores, learner.bits(ids, learner.columns), strict=True))
    before = state_of(model)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"truncated|damaged"):
        learner.load(path)
    _, stranger = growing()
    learner.save(path)
    with pytest.raises(ValueError, match="another base model"):
        stranger.load(path)
    ttt.save(model, path)
    with pytest.raises(ValueError, match="no columns"):
        learner.load(path)
    assert_same(before, state_of(model))
    assert len(learner.columns) == 2


def test_reset_forgets_everything():
    model, learner = growing()
    start = state_of(model)
    for domain in "ab":
        learner.observe(text(domain, 640))
    learner.reset()
    assert_same(start, state_of(model))
    assert (learner.columns, learner.active, learner.tokens, learner.worth) == ([], None, 0, 0.0)


def test_change_is_noticed_soon_either_way_and_rarely_without_one():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, generator=generator).tolist()
    change = Change(8.0)
    assert sum(change.update(2 + 0.3 * z) for z in noise) == 0
    for step in (1.0, -1.0):
        change.restart()
        assert not any(change.update(2 + 0.3 * z) for z in noise[:200])
        alarms = [change.update(2 + step + 0.3 * z) for z in noise[200:210]]
        assert any(alarms[:6])
        assert change.since >= 1 + alarms.index(True)


def test_change_sums_are_pages():
    """Against the recursion written out, with level and spread fixed by a long calm."""
    change = Change(5.0, slack=0.5, warm=2)
    for i in range(64 * 50):
        change.update(1.0 + (0.2 if i % 2 else -0.2))
    level, spread = change.level, change.spread
    assert level == pytest.approx(1.0, abs=0.01)
    assert spread == pytest.approx(0.25, rel=0.05)
    up = change._up[0]
    assert change.update(1.6) == (max(0.0, up + (1.6 - level) / spread - 0.5) > 5.0)
    assert change._up[0] == pytest.approx(max(0.0, up + (1.6 - level) / spread - 0.5))


def test_wrong_arguments_are_refused():
    model, learner = adapted()
    for options in ({"rank": 0}, {"budget": 0}, {"margin": -1.0}, {"alarm": 0.0}, {"young": -1}, {"patience": 0}):
        (name,) = options
        with pytest.raises(ValueError, match=name):
            ttt.GrowingLearner(learner, **options)
    with pytest.raises(ValueError, match="guard"):
        ttt.GrowingLearner(ttt.Learner(model, guard=ttt.Guard([ids_of(1, 9)])))
    before = state_of(model)
    with pytest.raises(TypeError, match="int64"):
        ttt.GrowingLearner(learner).observe(torch.ones(1, 9))
    with pytest.raises(ValueError, match="at least 2 tokens"), ttt.GrowingLearner(learner).routed(ids_of(1, 1)):
        pass
    assert_same(before, state_of(model))
