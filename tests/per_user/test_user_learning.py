"""Batches in which each row belongs to a user, on tiny random Hugging Face models."""

import pytest
import torch
from helpers import plain_config
from tiny_models import TARGETS, VOCAB, ids_of, tiny

import ttt

HUGE = 1e25


def adapted(family="llama", slots=4, rank=3, window=16, model=None, **options):
    low_rank = ttt.LowRank(slots=slots, rank=rank, window=window)
    options = {"ewc_lambda": 0.0, "replay_rows": 0, "lr": 0.01, "chunk": 8, "replay_capacity": 32, **options}
    config = plain_config(target_modules=TARGETS[family], layers="last:0.5", per_user=low_rank, **options)
    model = ttt.adapt_(tiny(family) if model is None else model, config)
    return model, ttt.Learner(model)


def exports(pool, *users):
    return {f"{user}.{key}": t for user in users for key, t in pool.export(user).items()}


def assert_same(before, after):
    assert before.keys() == after.keys()
    assert [k for k in before if not torch.equal(before[k], after[k])] == []


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_each_user_learns_as_alone_with_weights_of_their_own(family):
    """Against `ttt.Learner` on a model for each user, before anything is compressed."""
    ids = ids_of(3, 30)
    plain = {"target_modules": TARGETS[family], "layers": "last:0.5", "lr": 0.02, "chunk": 8, "window": 8,
             "ewc_lambda": 0.0, "replay_rows": 0, "clip": 2.0, "head_mass": 0.0}  # fmt: skip
    model, learner = adapted(family, lr=0.02, clip=2.0, window=60)
    base = tiny(family)
    base.load_state_dict(model.state_dict())
    for _ in range(2):
        seen = learner.observe(ids, users=["a", None, "b"])
    assert (seen.learned, seen.rejected, seen.rejected_users) == (8, 0, {})
    for row, user in ((0, "a"), (2, "b")):
        alone = tiny(family)
        alone.load_state_dict(base.state_dict())
        other = ttt.Learner(ttt.adapt_(alone, plain_config(**plain)))
        for _ in range(2):
            want = other.observe(ids[row : row + 1])
        torch.testing.assert_close(seen.nll[row : row + 1], want.nll, rtol=1e-3, atol=1e-3)
        for name, layer in learner.pool.layers.items():
            reference = alone.get_submodule(name)
            change = layer.effective_weight(learner.pool.slot(user)) - layer.weight
            expected = reference.effective_weight() - reference.anchor
            assert float((change - expected).norm()) < 1e-2 * float(expected.norm())
    frozen = ttt.Learner(ttt.adapt_(base, plain_config(**plain))).observe(ids, learn=False)
    torch.testing.assert_close(seen.nll[1], frozen.nll[1], rtol=1e-4, atol=1e-4)


def test_what_was_read_is_remembered_by_rank_three():
    model, learner = adapted(lr=0.02)
    ids, users = ids_of(2, 50), ["a", "b"]
    first = learner.observe(ids, users=users)
    for _ in range(6):
        last = learner.observe(ids, users=users)
    assert last.bits < first.bits - 0.1
    swapped = learner.observe(ids, users=users[::-1], learn=False)
    assert last.bits < swapped.bits - 0.1  # each their own
    assert all(v > 0 for v in learner.pool.lost("a").values())
    with torch.no_grad():
        base = model(ids).logits
        learner.reset()
        with ttt.users(model, [None, None]):
            assert torch.equal(model(ids).logits, base)
        with ttt.users(model, users):  # a new "a" and "b"
            assert torch.equal(model(ids).logits, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_no_user_have_the_base_models_bits(dtype):
    model, learner = adapted(model=tiny().to(dtype))
    base = tiny().to(dtype)
    base.load_state_dict(model.state_dict())
    ids = ids_of(3, 20)
    learner.observe(ids, users=["a", "a", "b"])
    with torch.no_grad(), ttt.users(model, ["a", None, "b"]):
        got = model(ids).logits
    want = base(ids).logits
    assert torch.equal(got[1], want[1])
    assert not torch.equal(got[0], want[0])


def test_another_users_tokens_change_no_bit():
    """Two rows of one user, compression included; the other's texts differ."""
    texts, other = ids_of(4, 45), ids_of(4, 45)
    users, found = ["a", "b", None, "a"], []
    base = tiny().state_dict()
    for ids in (texts, torch.where(torch.tensor([[True], [False], [False], [True]]), texts, other)):
        model, learner = adapted()
        model.load_state_dict(base)
        nll = torch.cat([learner.observe(ids, users=users).nll for _ in range(2)])
        with ttt.users(model, users):
            written = model.generate(ids, max_new_tokens=5, do_sample=False)
        found.append((nll, written, exports(learner.pool, "a"), exports(learner.pool, "b")))
    (nll, written, mine, theirs), (nll2, written2, mine2, theirs2) = found
    mine_rows = [0, 3, 4, 7]
    assert torch.equal(nll[mine_rows], nll2[mine_rows])
    assert torch.equal(written[[0, 3]], written2[[0, 3]])
    assert_same(mine, mine2)
    assert not torch.equal(theirs["b.model.layers.2.mlp.down_proj.a"], theirs2["b.model.layers.2.mlp.down_proj.a"])


def test_a_users_chunk_that_is_not_finite_is_rejected_alone():
    ids, users = ids_of(3, 40), ["a", "bad", "b"]
    base, found = tiny().state_dict(), []
    for spoilt in (False, True):
        model, learner = adapted()
        model.load_state_dict(base)
        learner.observe(ids[:, :10], users=users)
        state = learner.pool.export("bad")
        if spoilt:
            state = {k: t * HUGE if k.endswith((".a", ".b")) else t for k, t in state.items()}
        learner.pool.load("bad", state)
        seen = learner.observe(ids, users=users)
        found.append((seen, exports(learner.pool, "a", "b")))
        if spoilt:
            assert_same(learner.pool.export("bad"), state)
            assert seen.rejected_users == {"bad": 5}
            assert (seen.learned, seen.rejected) == (10, 5)
    assert_same(found[0][1], found[1][1])
    assert torch.equal(found[0][0].nll[::2], found[1][0].nll[::2])


def test_a_user_reads_on_after_a_rejected_chunk(monkeypatch):
    """With a cache of zeros: what was not finite is not read again."""
    from ttt.learn.per_user import PerUserWeights

    _, learner = adapted(window=64)
    ids, real, calls = ids_of(2, 33), PerUserWeights._learn, []

    def once(self, captured, columns, nll):
        calls.append(1)
        if len(calls) == 2:
            nll = nll.clone()
            nll[0, 3] = torch.inf
        return real(self, captured, columns, nll)

    monkeypatch.setattr(PerUserWeights, "_learn", once)
    seen = learner.observe(ids, users=["a", "b"])
    assert seen.rejected_users == {"a": 1}
    assert seen.learned == 7
    assert torch.isfinite(seen.nll).all()
    rows = {user: learner.pool.export(user)["model.layers.2.mlp.down_proj.a"].shape[0] for user in "ab"}
    assert rows == {"a": 24, "b": 32}


def test_padding_and_masks_teach_nobody():
    model, learner = adapted(window=64)
    ids = ids_of(2, 24)
    attend = torch.ones_like(ids)
    attend[0, :8] = 0  # a chunk
    teach = torch.ones_like(ids)
    teach[1, 10:] = 0
    seen = learner.observe(ids, attention_mask=attend, learn_mask=teach, users=["a", "b"])
    assert int(seen.mask.sum()) == 15 + 23
    held = {user: learner.pool.export(user)["model.layers.3.mlp.down_proj.a"].shape[0] for user in "ab"}
    assert held == {"a": 15, "b": 9}
    alone, other = adapted(window=64)
    alone.load_state_dict(model.state_dict())
    want = other.observe(ids[:1, 8:], users=["a"])
    torch.testing.assert_close(seen.nll[:1, 8:], want.nll, rtol=2e-3, atol=2e-3)


def test_generating_writes_with_each_users_weights():
    model, learner = adapted(lr=0.05)
    ids = ids_of(3, 20)
    learner.observe(ids, users=["a", "b", None])
    prompt = ids[:, :6]
    with ttt.users(model, ["a", "b", None]):
        got = model.generate(prompt, max_new_tokens=8, do_sample=False)
    for row, user in enumerate(["a", "b", None]):
        dense = tiny()
        dense.load_state_dict(model.state_dict())
        for name, layer in learner.pool.layers.items():
            if user is not None:
                weight = layer.effective_weight(learner.pool.slot(user))
                dense.get_submodule(name).weight.data.copy_(weight)
        with torch.no_grad():  # by teacher forcing: a tie may be broken either way
            logits = dense(got[row : row + 1]).logits[0, 5:-1]
        assert float((logits.amax(1) - logits.gather(1, got[row, 6:, None])[:, 0]).max()) < 1e-3


@pytest.mark.parametrize("importance", ["fisher", "mas"])
def test_calibration_measures_the_means_of_the_dense_importance(importance):
    options = {"ewc_lambda": 0.1, "replay_rows": 2, "importance": importance}
    model, learner = adapted(**options)
    dense = tiny()
    dense.load_state_dict(model.state_dict())
    other = ttt.Learner(ttt.adapt_(dense, plain_config(
        target_modules=["down_proj"], layers="last:0.5", replay_capacity=32, **options)))  # fmt: skip
    batches = [ids_of(2, 20), ids_of(3, 9)]
    for each in (learner, other):
        each.calibrate(batches)
    for name, layer in learner.pool.layers.items():
        omega, want = torch.outer(layer.importance_m, layer.importance_n), dense.get_submodule(name)
        torch.testing.assert_close(omega.mean(1), want.importance.mean(1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(omega.mean(0), want.importance.mean(0), rtol=1e-4, atol=1e-6)
        assert torch.equal(layer.memory, want.memory)
        assert torch.equal(layer.seen, want.seen)


def test_protection_keeps_users_nearer_to_the_base_model():
    ids, batches, drift = ids_of(1, 60), [ids_of(4, 30)], {}
    base = tiny().state_dict()
    for name, options in {
        "none": {},
        "pull": {"ewc_lambda": 1.0},
        "replay": {"replay_rows": 8, "replay_beta": 1.0},
    }.items():
        model, learner = adapted(lr=0.02, **options)
        model.load_state_dict(base)
        learner.calibrate(batches)
        for _ in range(4):
            seen = learner.observe(ids, users=["a"])
        with torch.no_grad(), ttt.users(model, ["a"] * 4):
            changed = model(batches[0]).logits
        drift[name] = float((changed - model(batches[0]).logits).square().mean())
        assert seen.rejected == 0
    assert drift["pull"] < 0.9 * drift["none"]
    assert drift["replay"] < 0.9 * drift["none"]


def test_refusals_change_nothing():
    _, learner = adapted(slots=2)
    ids = ids_of(2, 12)
    learner.observe(ids, users=["a", "b"])
    before = exports(learner.pool, "a", "b")
    for users, message in (
        (None, "users must name whose each row of input_ids is, .*got None"),
        (["a"], "an entry for each of the 2 rows, got 1"), ([], "a list with a user"),
        ("ab", "a list with a user"), (3, "a list with a user"), ({"a", "b"}, "a list with a user"),
        ([["a"], "b"], "user must be a string, got list"),
        (["a", "b\0"], "without NUL, got 'b.x00'"), (["a", "b" * 513], r"1 to 512 bytes .*\(513 bytes\)"),
        (["a", "\ud800"], "text that UTF-8 can hold"), (["a", ""], r"1 to 512 bytes without NUL, got '' \(0 bytes\)"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            learner.observe(ids, users=users)
    pool = learner.pool
    for call in (pool.open, pool.slot, pool.evict, pool.forget, pool.export, lambda user: pool.load(user, {})):
        with pytest.raises(TypeError, match=r"user must be a string, got dict {}"):
            call({})
    for users in (3, None, [["a"], "b"]):
        with pytest.raises(TypeError, match=r"users? must be"), ttt.users(learner.model, users):
            pass
    with pytest.raises(ValueError, match="names 3 users"):
        learner.observe(ids_of(3, 12), users=["c", "d", "e"])
    with pytest.raises(ValueError, match=r"input_ids must be in \[0"):
        learner.observe(ids + VOCAB, users=["a", "b"])
    graphed = (lambda: ttt.GraphedLearner(learner, graph=False), lambda: learner.generate(ids, max_new_tokens=2))
    for what in (learner.snapshot, learner.consolidate, *graphed):
        with pytest.raises(ValueError, match="every user has their own"):
            what()
    with pytest.raises(ValueError, match="have slots already"):
        learner.calibrate([ids])
    assert_same(before, exports(learner.pool, "a", "b"))
    plain = ttt.Learner(ttt.adapt_(tiny(), plain_config(target_modules=["down_proj"])))
    with pytest.raises(ValueError, match="users must be None: this model has one set of weights"):
        plain.observe(ids, users=["a", "b"])


def test_save_pretrained_and_restore_know_nothing_of_users(tmp_path):
    for family in ("llama", "gpt2"):
        model, learner = adapted(family)
        pristine = tiny(family)
        pristine.load_state_dict(model.state_dict())
        ids = ids_of(2, 20)
        learner.observe(ids, users=["a", "b"])
        model.save_pretrained(tmp_path / family)
        again = type(model).from_pretrained(tmp_path / family)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, pristine(ids).logits)
        ttt.restore_(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in pristine.modules()]
        for p, q in zip(model.parameters(), pristine.parameters(), strict=True):
            assert torch.equal(p, q)
