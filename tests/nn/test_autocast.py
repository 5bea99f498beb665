"""Inside of torch.autocast the layers give the dtype that nn.Linear gives, and learn as outside of it."""

import contextlib

import pytest
import torch
from helpers import plain_config
from tiny_models import adapted, ids_of, tiny

import ttt

LOW = {"ewc_lambda": 0.0, "replay_rows": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("users", [None, ttt.LowRank(slots=2)])
@pytest.mark.parametrize("grad", [False, True])
def test_outputs_have_the_dtype_of_a_linear_layer(dtype, users, grad):
    plain = torch.nn.Sequential(torch.nn.Linear(13, 11)).to(dtype)
    model = torch.nn.Sequential(torch.nn.Linear(13, 11)).to(dtype)
    model.load_state_dict(plain.state_dict())
    ttt.adapt_(model, plain_config(target_modules=["0"], per_user=users, **LOW))
    wide = dtype == torch.float64
    for given in {dtype, torch.float64 if wide else torch.float32}:
        x = torch.randn(5, 3, 13, dtype=given, requires_grad=grad)
        block = contextlib.nullcontext() if users is None else ttt.users(model, ["a", None, "a", "b", "b"])
        with torch.autocast("cpu", torch.bfloat16), block, torch.set_grad_enabled(grad):
            found, want = model(x), plain(x)
            assert found.dtype == want.dtype
            torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)
            if grad:
                (one,) = torch.autograd.grad(found.float().square().sum(), x)
                (two,) = torch.autograd.grad(want.float().square().sum(), x)
                assert one.dtype == two.dtype == given
                torch.testing.assert_close(one, two, rtol=3e-2, atol=6e-2)


@pytest.mark.parametrize("tokens", [3, 40])
def test_what_is_learnt_is_as_outside_for_the_same_rows(tokens):
    """Rows, steps and commits are computed in the dtype of the weight."""
    found, x = [], torch.randn(tokens, 13)
    weights = torch.randn(tokens, 11)
    weight = torch.randn(11, 13)
    for inside in (False, True):
        model = torch.nn.Sequential(torch.nn.Linear(13, 11, bias=False))
        model[0].weight.data.copy_(weight)
        ttt.adapt_(model, plain_config(target_modules=["0"], window=16, ewc_lambda=0.01, replay_rows=2, lr=1e-3))
        for _ in range(3):
            with ttt.learning(model):
                y = model[0](x)
                with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                    (y * weights).sum().backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            model[0].flush()
        found.append({key: t.clone() for key, t in model[0].state().items()})
    assert all(torch.equal(t, found[1][key]) for key, t in found[0].items())


@pytest.mark.parametrize("users", [None, ttt.LowRank(slots=2, window=64)])
def test_a_learner_works_inside_of_autocast(users):
    model, ids = tiny(), ids_of(2, 40)
    config = plain_config(target_modules=["down_proj"], layers="last:2", lr=0.01, chunk=8, per_user=users, **LOW)
    learner = ttt.Learner(ttt.adapt_(model, config))
    named = {} if users is None else {"users": ["a", "b"]}
    outside = learner.observe(ids, learn=False, **named).nll
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(learner.observe(ids, learn=False, **named).nll, outside, rtol=0.1, atol=0.2)
        for _ in range(3):
            seen = learner.observe(ids, **named)
        assert (seen.learned, seen.rejected) == (5 if users is None else 10, 0)
        assert float(seen.nll.mean()) < float(outside.mean())
        if users is None:
            learner.generate(ids[:, :5], max_new_tokens=4, learn_output=True)


def test_models_prepared_by_accelerate_learn():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test may have prepared with another precision
    model, learner = adapted(**LOW)
    ids = ids_of(2, 24)
    before = learner.observe(ids, learn=False).nll
    try:
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    seen = ttt.Learner(prepared).observe(ids)
    assert seen.rejected == 0
    torch.testing.assert_close(seen.nll[:, :8], before[:, :8], rtol=0.1, atol=0.2)
