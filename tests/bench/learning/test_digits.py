"""The suite "digits": the content of its tasks, and that its methods behave as in the literature, on one seed."""

import pytest
import torch

from bench.learning import metrics, tuning
from bench.learning.digits.methods import METHODS, fits
from bench.learning.digits.run import network, run
from bench.learning.digits.suite import DigitsSuite
from bench.learning.digits.tasks import SCENARIOS, scenario
from ttt.rules import LwF, Progressive


def rows_of(found, part):
    return {tuple(sorted(x.tolist())) for task in found.tasks for x in getattr(task, part).x}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_test_set_is_the_same_for_all_seeds_and_not_used_by_tuning(name):
    first, other = scenario(name, 0), scenario(name, 1)
    assert len(first.tasks) == (10 if name == "permuted" else 5)
    held = rows_of(first, "test")  # sorted pixels: a permutation does not hide an image
    assert held == rows_of(other, "test")
    assert len(held & rows_of(first, "train")) <= 1  # one image is in the data twice
    tuned = scenario(name, 1000, tuning=True)
    assert len(held & (rows_of(tuned, "train") | rows_of(tuned, "test"))) <= 1
    count = sum(len(t.train) + len(t.test) for t in first.tasks)
    assert count == 1797 * (10 if name == "permuted" else 1)
    assert any(not torch.equal(a.train.x, b.train.x) for a, b in zip(first.tasks, other.tasks, strict=True))


def test_split_tasks_have_two_classes_each_and_ten_together():
    all_classes = []
    by_class, by_domain, by_task = (scenario(f"split-{kind}", 3) for kind in ("class", "domain", "task"))
    for a, b, c in zip(by_class.tasks, by_domain.tasks, by_task.tasks, strict=True):
        classes = a.train.y.unique().tolist()
        assert len(classes) == 2
        all_classes += classes
        assert set(a.test.y.tolist()) == set(classes)
        assert set(b.train.y.tolist()) == {0, 1}
        assert len(a.train.y[b.train.y == 0].unique()) == 1
        assert torch.equal(c.train.y, a.train.y)
        assert c.train.allowed.nonzero()[:, 1].unique().tolist() == classes
        assert bool((c.train.allowed.sum(1) == 2).all())
        assert torch.equal(a.train.x, b.train.x)
    assert sorted(all_classes) == list(range(10))
    assert (by_class.outputs, by_domain.outputs, by_task.outputs) == (10, 2, 10)
    assert by_task.tasks[2].test.task.unique().tolist() == [2]


def test_permuted_tasks_hold_the_same_images_with_their_pixels_moved():
    found = scenario("permuted", 0)
    first, second = found.tasks[0].train, found.tasks[1].train
    assert torch.equal(first.y, second.y)
    assert not torch.equal(first.x, second.x)
    moved = [int((first.x == second.x[:, j : j + 1]).all(0).nonzero()[0]) for j in range(64)]
    assert torch.equal(first.x[:, moved], second.x)


def test_the_biases_of_the_network_are_weights():
    net = network(3, 2, hidden=5)
    x = torch.zeros(4, 3)
    assert bool(net(x).abs().sum() > 0)  # an input of zeros still has the constant
    assert [tuple(p.shape) for p in net.parameters()] == [(5, 4), (2, 6)]


def test_every_method_has_tuned_options_for_each_of_its_scenarios():
    options = tuning.load(tuning.tuned_path(DigitsSuite()))
    for name, method in METHODS.items():
        for where in SCENARIOS:
            if fits(name, where):
                assert set(options[where][name]) == set(method.grid), (where, name)
    assert isinstance(METHODS["LwF"].build({"weight": 1.0}, 0)[0], LwF)
    assert isinstance(METHODS["PNN"].build({}, 0)[0], Progressive)
    with pytest.raises(ValueError, match="PNN must be told the task"):
        run("permuted", "PNN", 0, {"lr": 0.1})
    with pytest.raises(ValueError, match=r"scenario must be one of .*, got 'mnist'"):
        scenario("mnist", 0)


@pytest.fixture(scope="module")
def measured():
    """Figures of one seed with the tuned options, from one run each with fewer epochs."""
    suite = DigitsSuite()
    options = tuning.load(tuning.tuned_path(suite))
    found = {}

    def get(where, name):
        if (where, name) not in found:
            record = run(where, name, 0, options[where][name], epochs=6)
            found[where, name] = {**record, **suite.measure(record, {})}
        return found[where, name]

    return get


def test_only_replay_learns_split_class(measured):
    assert measured("split-class", "ER 200")["acc"] >= 0.75
    assert measured("split-class", "DER++ 200")["acc"] >= 0.78
    naive = measured("split-class", "naive")["acc"]
    assert naive < 0.25
    assert measured("split-class", "EWC online")["acc"] < 0.4


def test_progressive_networks_do_not_forget(measured):
    found = measured("split-task", "PNN")
    assert found["forgetting"] == 0.0
    assert found["bwt"] == 0.0
    assert found["fwt"] is None
    assert found["acc"] > 0.95
    for i, row in enumerate(found["matrix"]):
        assert all(v is not None for v in row[: i + 1])
        assert all(v is None for v in row[i + 1 :])


def test_runs_are_reproducible(measured):
    first = measured("split-task", "PNN")
    options = tuning.load(tuning.tuned_path(DigitsSuite()))["split-task"]["PNN"]
    again = run("split-task", "PNN", 0, options, epochs=6)
    assert again["matrix"] == first["matrix"]
    assert again["state_bytes"] == first["state_bytes"]


def test_frozen_and_joint_are_references_for_naive():
    lr = {"lr": 0.01}
    frozen = run("split-task", "frozen", 0, lr, epochs=2)
    assert frozen["matrix"][0] == frozen["matrix"][-1]
    joint = run("split-task", "joint", 0, lr, epochs=2)
    naive = run("split-task", "naive", 0, lr, epochs=2)
    assert joint["matrix"][0] == naive["matrix"][0] == frozen["matrix"][0]
    assert naive["samples"] == 2 * sum(len(task.train) for task in scenario("split-task", 0).tasks)
    assert joint["samples"] > 2 * naive["samples"]  # its row i holds i + 1 tasks
    assert metrics.average_accuracy(joint["matrix"]) > metrics.average_accuracy(frozen["matrix"])
