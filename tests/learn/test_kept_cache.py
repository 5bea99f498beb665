"""`Learner.generate` goes on from a cache that it returned, and refuses one of other weights."""

import copy

import pytest
import torch
from tiny_models import adapted, assert_same, ids_of, state_of

import ttt


def first_turn(learner, ids, **options):
    return learner.generate(ids, max_new_tokens=5, keep_cache=True, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("learn", [False, True])
def test_it_goes_on_as_if_it_had_read_all_again_but_reads_only_what_is_new(family, learn):
    model, learner = adapted(family)
    made = first_turn(learner, ids_of(2, 7), learn_prompt=False)
    turn = torch.cat([made.sequences, ids_of(2, 9)], 1)
    twin = ttt.fork(model)
    seen = []
    handle = model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["input_ids"].shape[1]), with_kwargs=True)
    found = learner.generate(turn, max_new_tokens=4, cache=made.cache, learn_prompt=learn)
    handle.remove()
    assert sum(seen) == 9 + 4  # of 21 tokens 11 are in the cache; the last is read with the output
    again = ttt.Learner(twin).generate(turn, max_new_tokens=4, learn_prompt=False)
    if not learn:
        assert torch.equal(found.sequences, again.sequences)
        torch.testing.assert_close(found.nll[:, 11:], again.nll[:, 11:], rtol=1e-4, atol=1e-4)
        assert_same(state_of(twin), state_of(model))
    else:
        torch.testing.assert_close(found.nll[:, 11:19], again.nll[:, 11:19], rtol=1e-4, atol=1e-4)
        assert (found.learned, found.rejected) == (2, 0)
        assert ttt.version(model) != made.cache.version
    assert not found.mask[:, :11].any()
    assert found.mask[:, 11:].all()
    assert not found.nll[:, :11].any()


def test_padding_is_remembered():
    _, learner = adapted()
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    made = first_turn(learner, ids_of(2, 7), learn_prompt=False, attention_mask=mask)
    turn = torch.cat([made.sequences, ids_of(2, 3)], 1)
    whole = torch.cat([mask, torch.ones(2, 8, dtype=torch.int64)], 1)
    with pytest.raises(ValueError, match="attention_mask must be the one"):
        learner.generate(turn, max_new_tokens=4, cache=made.cache)
    wanted = learner.generate(turn, max_new_tokens=4, attention_mask=whole, learn_prompt=False)
    found = learner.generate(turn, max_new_tokens=4, attention_mask=whole, learn_prompt=False, cache=made.cache)
    assert torch.equal(found.sequences, wanted.sequences)


@pytest.mark.parametrize("change", ["observe", "rollback", "consolidated load"])
def test_a_cache_of_other_weights_is_refused(change, tmp_path):
    model, learner = adapted(window=5)
    learner.observe(ids_of(1, 20))
    snapshot = learner.snapshot()
    ttt.save(model, tmp_path / "x")
    made = first_turn(learner, ids_of(2, 7))
    if change == "observe":
        learner.observe(ids_of(1, 12))
    elif change == "rollback":
        learner.rollback(snapshot)
    else:
        ttt.load(model, tmp_path / "x")
    before = state_of(model)
    turn = torch.cat([made.sequences, ids_of(2, 9)], 1)
    with pytest.raises(ValueError, match=r"computed with version [0-9]+ of the model's weights.*allow_stale_cache"):
        learner.generate(turn, max_new_tokens=4, cache=made.cache)
    assert_same(before, state_of(model))
    kept = copy.deepcopy(made.cache.take())
    assert kept is not None, "a refusal uses nothing up"


def test_a_stale_cache_is_taken_where_that_is_asked_for():
    _, learner = adapted()
    made = first_turn(learner, ids_of(1, 7))
    learner.observe(ids_of(1, 12))
    turn = torch.cat([made.sequences, ids_of(1, 9)], 1)
    found = learner.generate(turn, max_new_tokens=4, cache=made.cache, allow_stale_cache=True, keep_cache=True)
    assert found.sequences.shape == (1, 25)
    # What it learnt itself since then is its own: the cache that it returns is up to date.
    turn = torch.cat([found.sequences, ids_of(1, 2)], 1)
    assert learner.generate(turn, max_new_tokens=1, cache=found.cache).sequences.shape == (1, 28)


def test_a_cache_that_does_not_fit_is_refused():
    model, learner = adapted()
    made = first_turn(learner, ids_of(1, 7), learn_prompt=False)
    turn, before = made.sequences, state_of(model)
    other = turn.clone()
    other[0, 3] = turn[0, 3] % 7 + 1 + 7 * (turn[0, 3] < 8)
    stranger = ttt.Learner(ttt.fork(model))
    for who, ids, cache, message in (
        (learner, other, made.cache, "that begin otherwise"),
        (learner, turn[:, :-1], made.cache, "at least one must follow"),
        (learner, turn.repeat(2, 1), made.cache, "of 1 sequences"),
        (stranger, turn, made.cache, "another model"),
    ):
        with pytest.raises(ValueError, match=message):
            who.generate(ids, max_new_tokens=1, cache=cache)
    with pytest.raises(TypeError, match="cache must be the cache of a GenerateOutput"):
        learner.generate(turn, max_new_tokens=1, cache=made)
    with pytest.raises(TypeError, match="keep_cache must be True or False"):
        learner.generate(turn, max_new_tokens=1, keep_cache=1)
    assert_same(before, state_of(model))
    learner.generate(turn, max_new_tokens=1, cache=made.cache)
    with pytest.raises(ValueError, match="used up"):
        learner.generate(turn, max_new_tokens=1, cache=made.cache)
    assert learner.generate(turn, max_new_tokens=1).cache is None
