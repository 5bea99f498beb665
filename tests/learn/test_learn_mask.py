"""Which rows of a text are written where only some of its tokens teach."""

import pytest
import torch
from helpers import plain_config
from tiny_models import TARGETS, ids_of, tiny

import ttt

LR = 0.01
LENGTH = 20


def learner_of(base, users):
    model = tiny().double()
    model.load_state_dict(base.state_dict())
    own = {"per_user": ttt.LowRank(slots=1, rank=4, window=64)} if users else {}
    config = plain_config(
        target_modules=TARGETS["llama"], layers="last:0.5", lr=LR, chunk=64, window=64, ewc_lambda=0.0, replay_rows=0,
        head_mass=0.0, **own,
    )  # fmt: skip
    return ttt.Learner(ttt.adapt_(model, config))


def rows_of(base, name, ids, mask):
    """The inputs (T, n) of a layer and the gradients (T, m) of the losses of the tokens in ``mask`` (1, T)."""
    found = {}
    layer = base.get_submodule(name)

    def keep(_, given, out):
        found["x"] = given[0].detach()[0]
        out.register_hook(lambda gradient: found.update(delta=gradient[0]))

    hook = layer.register_forward_hook(keep)
    logp = base(ids).logits.log_softmax(-1)[0, :-1]
    (-logp[torch.arange(LENGTH - 1), ids[0, 1:]] * mask[0, 1:]).sum().backward()
    hook.remove()
    return found["x"], found["delta"]


def change_of(learner, name):
    if learner.pool is None:
        layer = learner.model.get_submodule(name)
        return layer.effective_weight() - layer.anchor
    layer = learner.pool.layers[name]
    return layer.effective_weight(learner.pool.slot("ada")) - layer.weight


SPANS = {"one token": [(9, 10)], "two spans": [(4, 7), (12, 15)], "to the end": [(13, LENGTH)], "all": [(0, LENGTH)]}


@pytest.mark.parametrize("users", [False, True])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_a_token_that_teaches_is_learnt_where_it_is_predicted(spans, users):
    """Against autograd: rows are written of the tokens before those that teach, and of no others."""
    base = tiny().double()
    mask, written = torch.zeros(1, LENGTH), torch.zeros(LENGTH, 1)
    for start, end in spans:
        mask[0, start:end] = 1
        written[max(start - 1, 0) : end - 1] = 1
    learner, ids = learner_of(base, users), ids_of(1, LENGTH)
    learner.observe(ids, learn_mask=mask, users=["ada"] if users else None)
    for name in ("model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj"):
        x, delta = rows_of(base, name, ids, mask)
        expected = -LR * (delta * written)[:-1].T @ x[:-1]
        assert float(expected.abs().max()) > 1e-6
        torch.testing.assert_close(change_of(learner, name), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("users", [False, True])
def test_a_span_of_one_token_becomes_more_probable(users):
    learner, ids = learner_of(tiny().double(), users), ids_of(1, LENGTH)
    mask = torch.zeros(1, LENGTH)
    mask[0, 9] = 1
    options = {"users": ["ada"] if users else None}
    before = learner.observe(ids, learn_mask=mask, **options).nll[0, 8]
    assert float(learner.observe(ids, learn=False, **options).nll[0, 8]) < float(before)


@pytest.mark.parametrize("users", [False, True])
def test_where_nothing_is_predicted_no_row_is_written(users):
    """The first token of a text that alone teaches changes no bit, and a last token teaches as a text's end does."""
    base, ids, options = tiny().double(), ids_of(1, LENGTH), {"users": ["ada"] if users else None}
    mask = torch.zeros(1, LENGTH)
    mask[0, 0] = 1
    learner = learner_of(base, users)
    if users:
        learner.pool.open("ada")
    before = state_of(learner)
    assert learner.observe(ids, learn_mask=mask, **options).learned == 0
    assert all(torch.equal(t, before[name]) for name, t in state_of(learner).items())
    states = []
    for text, ones in ((ids, slice(9, 10)), (ids[:, :10], slice(9, 10))):
        learner, mask = learner_of(base, users), torch.zeros_like(text)
        mask[0, ones] = 1
        learner.observe(text, learn_mask=mask, **options)
        states.append(state_of(learner))
    for name, t in states[0].items():
        assert t.shape == states[1][name].shape
        torch.testing.assert_close(t, states[1][name], rtol=1e-6, atol=1e-12)


def state_of(learner):
    """What has been learnt: of the user, or of the layers."""
    if learner.pool is not None:
        return {name: t.clone() for name, t in learner.pool.export("ada").items()}
    layers = learner.layers
    return {f"{i}.{name}": t.clone() for i, layer in enumerate(layers) for name, t in layer.state().items()}


def test_other_tokens_have_gradients_that_are_not_written_where_later_tokens_read_them():
    """As docs/guide.md says: the top block's q, o and MLP get all of the masked loss's gradient, k and v a part."""
    base = tiny().double()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = tiny().double()
    model.load_state_dict(base.state_dict())
    config = plain_config(
        target_modules=targets,
        layers="last:2",
        lr=LR,
        chunk=64,
        window=64,
        ewc_lambda=0.0,
        replay_rows=0,
        head_mass=0.0,
    )
    ids, mask = ids_of(1, LENGTH), torch.zeros(1, LENGTH)
    mask[0, 9:14] = 1
    ttt.Learner(ttt.adapt_(model, config)).observe(ids, learn_mask=mask)
    logp = base(ids).logits.log_softmax(-1)[0, :-1]
    (-logp[torch.arange(LENGTH - 1), ids[0, 1:]] * mask[0, 1:]).sum().backward()
    layers = ttt.learning_layers(model)
    top = max(int(name.split(".")[2]) for name, _ in layers)
    for name, layer in layers:
        full = -LR * base.get_submodule(name).weight.grad
        missing = float((layer.effective_weight() - layer.anchor - full).norm() / full.norm())
        whole = f".{top}." in name and name.rpartition(".")[2] not in ("k_proj", "v_proj")
        assert missing < 1e-10 if whole else missing > 0.01, name
