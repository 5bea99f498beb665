"""What is said where a model's output is not finite: which of its weights is not."""

import warnings

import pytest
import torch
from tiny_models import assert_same, ids_of, tiny

import ttt

BELOW = "model.layers.0.mlp.up_proj.weight"


def broken(value, **options):
    """A learner whose last block learns, of a model with one number of ``value`` in a layer below."""
    model = ttt.adapt_(tiny(layers=3), ttt.TTTConfig(["down_proj"], layers="last:1", **options))
    with torch.no_grad():
        model.get_parameter(BELOW)[1, 2] = value
    return ttt.Learner(model)


def state_of(learner, users):
    return learner.pool.export("ada") if users else learner.layers[0].state()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options", [{}, {"protect": [ttt.EWC(labels="empirical")]}, {"per_user": ttt.LowRank(slots=2)}]
)
def test_calibration_names_the_weight_that_is_not_finite(options, value):
    learner = broken(value, **options)
    for batches in ([ids_of(2, 20)], None):
        with pytest.raises(FloatingPointError, match=rf"logits are not finite: 1 of the \d+ numbers of {BELOW} are"):
            learner.calibrate(batches)


@pytest.mark.parametrize("users", [False, True])
def test_where_nothing_was_learnt_a_warning_names_the_weight_that_is_not_finite(users):
    learner = broken(float("nan"), **({"per_user": ttt.LowRank(slots=2)} if users else {}))
    whose = {"users": ["ada"]} if users else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.observe(ids_of(1, 20), learn=False, **whose)  # was not to learn
    before = {name: t.clone() for name, t in state_of(learner, users).items()}
    with pytest.warns(UserWarning, match=rf"nothing was learnt: of all \d chunks .* numbers of {BELOW} are NaN"):
        output = learner.observe(ids_of(1, 20), **whose)
    assert output.learned == 0 < output.rejected
    assert_same(before, state_of(learner, users))


def test_a_model_with_finite_weights_is_not_blamed_on_them():
    model = ttt.adapt_(tiny(layers=2), ttt.TTTConfig(["down_proj"], layers="last:1"))
    learner = ttt.Learner(model)
    handle = model.model.norm.register_forward_hook(lambda module, args, y: y * torch.inf)
    with pytest.raises(
        FloatingPointError, match="its parameters are finite, so look at its inputs, or for an overflow"
    ):
        learner.calibrate([ids_of(2, 20)])
    handle.remove()
    learner.calibrate([ids_of(2, 20)])
