"""`observe` with several passes and larger steps: one text that is to be remembered after one telling."""

import copy

import pytest
import torch
from tiny_models import tiny

import ttt

OPTIONS = {"target_modules": "all-linear", "window": 4, "chunk": 8}


def learners(users: bool, number: int = 2, **options) -> list[ttt.Learner]:
    if users:
        options = {"per_user": ttt.LowRank(slots=2, rank=3, window=4), **options}
    base = tiny("llama")
    found = []
    for _ in range(number):
        model = ttt.adapt_(copy.deepcopy(base), ttt.TTTConfig(**(OPTIONS | {"protect": []} | options)))
        found.append(ttt.Learner(model, episodes=ttt.EpisodeLog()))
    return found


def state_of(learner: ttt.Learner, users) -> list[torch.Tensor]:
    if users is None:
        return [t.clone() for layer in learner.layers for t in layer.state().values()]
    states = [learner.pool.export(user) for user in users]
    return [t for state in states for name, t in state.items() if not name.startswith("episodes.")]


def equal(one, two) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.filterwarnings("ignore:.*calibrate")
@pytest.mark.parametrize("users", [None, ["ada"]])
@pytest.mark.parametrize("length", [2, 8, 21])
def test_three_passes_are_three_readings_scored_once(users, length):
    one, two, once = learners(users is not None, number=3)
    ids = torch.randint(50, (1, length))
    mask = torch.rand(1, length) < 0.7
    mask[:, -1] = True
    seen = one.observe(ids, learn_mask=mask, users=users, passes=3)
    first, *later = [two.observe(ids, learn_mask=mask, users=users) for _ in range(3)]
    assert torch.equal(seen.nll, first.nll)
    assert seen.learned == first.learned + sum(each.learned for each in later)
    assert equal(state_of(one, users), state_of(two, users))
    once.observe(ids, learn_mask=mask, users=users)
    user = "ada" if users else None
    assert len(one.episodes.of(user)) == len(once.episodes.of(user)) > 0  # it was said once


@pytest.mark.filterwarnings("ignore:.*calibrate")
@pytest.mark.parametrize("users", [None, ["ada"]])
def test_emphasis_multiplies_the_steps(users):
    rates = {"rate": "constant", "clip": None}
    one, two = learners(users is not None, lr=1e-3, **rates)
    (three,) = learners(users is not None, number=1, lr=4e-3, **rates)
    for source, target in zip(one.access.layers, three.access.layers, strict=True):
        assert source.weight.shape == target.weight.shape
    three.model.load_state_dict(one.model.state_dict())
    ids = torch.randint(50, (1, 21))
    one.observe(ids, users=users, emphasis=4.0)
    two.observe(ids, users=users)
    three.observe(ids, users=users)
    later = torch.randint(50, (1, 13))
    first, plain, larger = (each.observe(later, users=users, learn=False).nll for each in (one, two, three))
    assert torch.allclose(first, larger, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first, plain, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*calibrate")
def test_in_steps_it_is_the_same_to_the_bit():
    one, two = learners(True)
    ids = torch.randint(50, (1, 21))
    seen = one.observe(ids, users=["ada"], passes=2, emphasis=3.0)
    taken = []

    def all_steps():
        steps = two.observe_in_steps(ids, users=["ada"], passes=2, emphasis=3.0)
        while True:
            try:
                taken.append(next(steps))
            except StopIteration as done:
                return done.value

    output = all_steps()
    assert torch.equal(output.nll, seen.nll)
    assert output.learned == seen.learned
    assert len(taken) >= 6  # three chunks in each pass
    assert equal(state_of(one, ["ada"]), state_of(two, ["ada"]))
    assert len(two.episodes.of("ada")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 0}, "passes must be"), ({"passes": 1.5}, "passes must be"), ({"emphasis": 0.0}, "emphasis must be"),
        ({"emphasis": 101.0}, "emphasis must be"), ({"passes": 2, "learn": False}, "passes must be 1"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_and_change_nothing(options, message):
    (learner,) = learners(False, number=1)
    before = state_of(learner, None)
    with pytest.raises(ValueError, match=message):
        learner.observe(torch.randint(50, (1, 9)), **options)
    assert equal(before, state_of(learner, None))
