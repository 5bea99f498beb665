"""`ttt.GrowingLearner` on a tiny random Llama that reads domains of different alphabets."""

import copy
import gc
import math
import signal

import pytest
import torch
from tiny_models import adapted, assert_same, ids_of, state_of

import ttt
from ttt.experts import learner as experts

OPTIONS = {"target_modules": ["gate_proj", "up_proj", "down_proj"], "lr": 0.03, "clip": 3.0, "chunk": 8, "window": 8}
ALPHABETS = {"a": 1, "b": 13, "c": 25}


def text(domain, length):
    """Round an alphabet of 12 tokens, from anywhere, with a slip now and then."""
    steps = torch.where(torch.rand(length + 1) < 0.03, torch.randint(12, (length + 1,)), 1)
    return (ALPHABETS[domain] + steps.cumsum(0) % 12).view(1, -1)


def growing(learner_options=None, **options):
    model, learner = adapted(**{**OPTIONS, **(learner_options or {})})
    learner.calibrate([ids_of(2, 20)])
    return model, ttt.GrowingLearner(learner, **{"recent": 64, "evidence": 8.0, "rank": 16, **options})


def kinds(learner, since=0):
    return [switch.kind for switch in learner.history[since:] if switch.kind in ("new", "reopen")]


def factors(column):
    return [t.clone() for t in column.a + column.b + column.signature.counts]


def test_without_a_change_it_is_the_learner_to_the_bit():
    model, learner = growing(evidence=1e9)
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
    assert 560 <= learner.columns[0].tokens <= 640  # as it was before the first sign of change
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
    _, learner = growing(budget=2, evidence=1e9)
    for domain in "aba":
        learner.observe(text(domain, 640))
        learner.close()
    assert [c.tokens for c in learner.columns] == [1280, 640]  # the two of one domain became one
    active = learner._active
    held = active.calm_weights + list(active.signature.counts + active.latest.counts)
    assert learner.bytes() == sum(c.bytes for c in learner.columns) + sum(t.numel() * t.element_size() for t in held)


def test_what_comes_later_changes_no_score_and_a_switch_keeps_the_context():
    """The domain changes within a piece, and so does the column: at a chunk's end, for the tokens after it."""
    scores, switched = [], []
    for change in (0, 1):
        torch.manual_seed(7)
        _, learner = growing()
        for domain in "ab":
            learner.observe(text(domain, 640))
        back = torch.cat([text("b", 23), text("a", 39)], 1)
        tokens = learner.read
        other = back.clone()
        other[:, 56:] = (other[:, 56:] + change * 5) % 60
        scores.append(learner.observe(other).nll)
        assert kinds(learner)[:2] == ["new", "reopen"]
        switched.append(next(s.tokens for s in learner.history if s.kind == "reopen") - tokens)
    assert torch.equal(scores[0][:, :55], scores[1][:, :55])
    assert not torch.equal(scores[0][:, 55:], scores[1][:, 55:])
    assert switched[0] == switched[1]
    assert 24 < switched[0] <= 48


def test_what_is_stored_is_the_column_before_the_first_sign_of_change():
    torch.manual_seed(3)
    model, learner = growing(rank=64)
    _, plain = adapted(**OPTIONS)
    plain.rollback(learner.learner.snapshot())
    plain.model.load_state_dict(model.state_dict())
    ids = torch.cat([text("a", 639), text("b", 200)], 1)
    for start in range(0, 832, 64):
        learner.observe(ids[:, start : start + 65])
    assert kinds(learner) == ["new"]
    (column,) = learner.columns
    for start in range(0, column.tokens, 64):
        plain.observe(ids[:, start : min(start + 64, column.tokens) + 1])
    for i, layer in enumerate(plain.layers):
        expected = layer.effective_weight() - layer.anchor
        torch.testing.assert_close(column.delta(i), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert float(column.signature.first.sum()) == column.tokens


def test_a_column_opened_by_mistake_stays_as_it_was():
    _, learner = growing()
    learner.observe(text("a", 640))
    learner.close()
    kept = factors(learner.columns[0])
    learner._open(0, 0)
    learner.observe(torch.cat([text("a", 71), text("c", 63)], 1))
    assert kinds(learner) == ["new"]
    assert (len(learner.columns), learner.active) == (1, None)
    assert all(torch.equal(x, y) for x, y in zip(kept, factors(learner.columns[0]), strict=True))


def test_text_that_is_not_learnt_is_scored_by_the_mixture(monkeypatch):
    """Against the weights of every token, one after the other, in float64."""
    monkeypatch.setattr("ttt.experts.scoring.PREFIX", 20)
    model, learner = growing()
    for domain in "ab":
        learner.observe(text(domain, 640))
        learner.close()
    learner.observe(text("c", 320))
    before = state_of(model)
    ids = torch.cat([text("a", 50), text("c", 50), ids_of(1, 51)])
    ways = [learner.learner.observe(ids, learn=False).nll, *(math.log(2) * b for b in learner.bits(ids, _all(learner)))]
    found = learner.score(ids)
    assert found.shape == (3, 50)
    chosen = set()
    for row in range(3):
        p = torch.stack(ways)[:, row].double().neg().exp()
        weights = torch.full((4,), 0.25, dtype=torch.float64)
        for t in range(20):
            expected = float(weights @ p[:, t])
            assert float(found[row, t]) == pytest.approx(-math.log(expected), rel=1e-3, abs=1e-4)
            weights = weights * p[:, t] / expected
        best = int(weights.argmax())
        chosen.add(best)
        torch.testing.assert_close(found[row, 20:].double(), -p[best, 20:].log(), rtol=1e-3, atol=1e-4)
    assert {0, 2} <= chosen  # the active column's own text, and the first one's
    assert_same(before, state_of(model))


def _all(learner):
    return [None, *learner.columns]


def test_long_text_is_scored_piece_by_piece_and_one_token_not_at_all():
    _, learner = growing()
    learner.observe(text("a", 640))
    ids = text("a", 2 * learner.context + 5)
    parts = [learner.score(ids[:, i : i + learner.context + 1]) for i in range(0, ids.shape[1] - 1, learner.context)]
    assert torch.equal(learner.score(ids), torch.cat(parts, 1))
    assert learner.score(ids[:, :1]).shape == (1, 0)


def test_text_that_the_anchor_knows_leaves_no_column():
    _, learner = growing({"lr": 1e-6})
    learner.observe(text("a", 640))
    learner.close()
    assert learner.columns == []


def test_scoring_and_routing_change_no_bit():
    model, learner = growing(evidence=1e9)
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
    known = model.generate(torch.randint(49, 60, (4, 1)), max_new_tokens=50, do_sample=True, pad_token_id=0)
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


def test_one_learner_serves_one_growing_learner_whose_anchor_stays():
    model, learner = growing()
    plain = learner.learner
    learner.observe(text("a", 100))
    before = state_of(model)
    with pytest.raises(ValueError, match="learner serves a GrowingLearner already"):
        ttt.GrowingLearner(plain)
    with pytest.raises(RuntimeError, match=r"Learner\.consolidate would move the anchor, and the columns of a Growing"):
        plain.consolidate()
    assert_same(before, state_of(model))
    copied = copy.deepcopy(plain)
    copied.consolidate()  # no columns are relative to the anchor of the copy
    del learner
    gc.collect()
    ttt.GrowingLearner(plain).observe(text("a", 20))
    gc.collect()
    plain.consolidate()
    assert all(torch.equal(layer.weight, layer.anchor) for layer in plain.layers)


def test_the_history_is_bounded(monkeypatch):
    made, switch = [], experts.Switch
    monkeypatch.setattr(experts, "HISTORY", 2)
    monkeypatch.setattr(experts, "Switch", lambda *given: made.append(switch(*given)) or made[-1])
    _, learner = growing()
    for domain in "abcab":
        learner.observe(text(domain, 400))
    assert len(made) > 2
    assert learner.history == made[-2:]


def test_reset_forgets_everything():
    model, learner = growing()
    start = state_of(model)
    for domain in "ab":
        learner.observe(text(domain, 640))
    learner.reset()
    assert_same(start, state_of(model))
    assert (learner.columns, learner.active, learner.tokens, learner.worth) == ([], None, 0, 0.0)


def test_wrong_arguments_are_refused():
    model, learner = adapted()
    for options in ({"rank": 0}, {"budget": 0}, {"margin": -1.0}, {"evidence": 0.0}, {"recent": 0}):
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


@pytest.mark.parametrize("index", range(6))
def test_a_change_of_column_that_fails_can_only_be_reset(index, monkeypatch):
    model, learner = growing()
    start = state_of(model)
    learner.observe(text("a", 320))
    calls, real = [], experts.set_weight

    def put(layer, delta):
        calls.append(1)
        if len(calls) == index + 1:
            raise MemoryError("for the test")
        real(layer, delta)

    with monkeypatch.context() as patch:
        patch.setattr(experts, "set_weight", put)
        with pytest.raises(MemoryError):
            learner.close()
    for call in (lambda: learner.observe(text("a", 9)), learner.close, lambda: learner.score(text("a", 9))):
        with pytest.raises(RuntimeError, match="changing the column of a GrowingLearner ended half-way"):
            call()
    learner.reset()
    assert_same(start, state_of(model))
    assert (learner.columns, learner.tokens) == ([], 0)
    assert learner.observe(text("a", 64)).rejected == 0


@pytest.mark.parametrize("call", range(8))
def test_scores_that_are_interrupted_leave_the_active_column_in_place(call):
    """Ctrl-C in one forward pass after the other, under the anchor and under stored columns."""
    model, learner = growing(evidence=1e9)
    learner.observe(text("a", 320))
    learner.close()
    learner.observe(text("b", 320))
    before, calls = state_of(model), []

    def interrupt(module, args, kwargs):
        calls.append(1)
        if len(calls) == call + 1:
            signal.raise_signal(signal.SIGINT)

    handle = model.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        list(map(learner.score, [text("a", 200)] * 8))
    handle.remove()
    assert_same(before, state_of(model))
    assert learner.observe(text("b", 64)).rejected == 0
