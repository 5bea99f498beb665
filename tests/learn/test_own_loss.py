"""Emphasised steps are bounded by the loss of their text: against the gradient that autograd finds for the weights."""

import copy

import pytest
import torch
from tiny_models import ids_of, tiny
from torch.nn import functional

import ttt
from ttt.nn import own_loss
from ttt.nn.rates import rates

CHUNK = 32
NAMES = [f"model.layers.{block}.mlp.down_proj" for block in (0, 1)]


def learner_of(base, known, *, users: bool, soft: bool) -> ttt.Learner:
    config = ttt.TTTConfig(
        target_modules=["down_proj"], window=CHUNK, chunk=CHUNK, feedback=0.0,
        protect=[ttt.KroneckerFisher(directions=5)] if soft else [],
        per_user=ttt.LowRank(slots=2, rank=CHUNK, window=CHUNK) if users else None,
    )  # fmt: skip
    learner = ttt.Learner(ttt.adapt_(copy.deepcopy(base), config))
    learner.calibrate(known)
    return learner


def changes(learner: ttt.Learner, user: str | None) -> list[torch.Tensor]:
    """By how much each layer's effective weight has changed, in the order of `NAMES`."""
    slot = () if user is None else (learner.pool.slot(user),)
    layers = [learner.model.get_submodule(name) for name in NAMES]
    return [layer.effective_weight(*slot) - layer.weight for layer in layers]


def loss_and_gradients(base, ids, mask) -> tuple[float, list[torch.Tensor]]:
    """From plain autograd: the summed loss of the tokens in ``mask``, and its gradients at the weights of `NAMES`.

    Of the gradients only what comes from the rows at which they are predicted, as only these are written.
    """
    model, held = copy.deepcopy(base).requires_grad_(False), []

    def keep(module, args, output):
        output.requires_grad_().retain_grad()
        held.append((args[0].detach(), output))

    for name in NAMES:
        model.get_submodule(name).register_forward_hook(keep)
    logits = model(input_ids=ids[:, :-1]).logits
    each = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    loss = each[mask[:, 1:]].sum()
    loss.backward()
    kept = mask[0, 1:]
    return float(loss), [out.grad[0, kept].T @ x[0, kept] for x, out in held]


def text(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((1, 21), 7) if kind == "one token" else ids_of(1, 21)
    mask = torch.ones(1, 21, dtype=torch.bool)
    mask[:, :6] = False  # context, from which nothing is learnt
    return ids, mask


@pytest.mark.parametrize("users", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", ["one token", "random"])
def test_no_layer_lowers_the_loss_by_more_than_twice_its_part(users, soft, kind):
    base = tiny("llama", layers=2).double()
    learner = learner_of(base, [ids_of(2, 32) for _ in range(4)], users=users, soft=soft)
    ids, mask = text(kind)
    loss, gradients = loss_and_gradients(base, ids, mask)
    user = "ada" if users else None
    learner.observe(ids, learn_mask=mask, users=[user] if users else None, emphasis=100.0)
    found = [-float((d * g).sum()) for d, g in zip(changes(learner, user), gradients, strict=True)]
    assert found == pytest.approx([own_loss.BEYOND * loss / len(NAMES)] * len(NAMES), rel=1e-9)


@pytest.mark.parametrize("users", [False, True])
def test_a_step_within_the_bound_is_the_step_times_the_emphasis(users):
    base = tiny("llama", layers=2).double()
    known = [ids_of(2, 32) for _ in range(4)]
    one, two = (learner_of(base, known, users=users, soft=True) for _ in range(2))
    ids, mask = text("random")
    user = "ada" if users else None
    one.observe(ids, learn_mask=mask, users=[user] if users else None)
    two.observe(ids, learn_mask=mask, users=[user] if users else None, emphasis=1.25)
    for plain, larger in zip(changes(one, user), changes(two, user), strict=True):
        assert torch.allclose(1.25 * plain, larger, rtol=1e-9, atol=0)
        assert float(plain.abs().max()) > 0


@pytest.mark.parametrize("soft", [False, True])
def test_what_another_user_reads_changes_no_bit_of_a_users_bound(soft):
    base = tiny("llama", layers=2)
    states = []
    mine = torch.full((1, 21), 7)
    known = [ids_of(2, 32) for _ in range(4)]
    for others in (ids_of(1, 21), ids_of(1, 21)):
        learner = learner_of(base, known, users=True, soft=soft)
        learner.observe(torch.cat([others, mine]), users=["bob", "ada"], emphasis=100.0)
        states.append(learner.pool.export("ada"))
    one, two = states
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one if not name.startswith("episodes."))


@pytest.mark.parametrize("burst", [None, 1.5])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_the_decrease_is_that_of_a_loop(burst, tokens):
    """Also where a token's input is one that the update leaves nothing of, and where a user has a single token."""
    torch.manual_seed(5)
    config = ttt.TTTConfig(burst=burst)
    x, delta = (torch.randn(tokens, size, dtype=torch.float64) for size in (13, 6))
    x[:1, 5:] = 0.0
    kept = torch.cat([torch.zeros(5), torch.linspace(0.1, 1.0, 8)]).double()
    x2, users = x * kept, torch.tensor([0, 2, -1, 0, 2, 2, -1, 1, 0], dtype=torch.int32)[:tokens]
    before = torch.tensor([3.0, 2.0, 4.0], dtype=torch.float64)
    options = {"applied": lambda *_: (x2, delta), "gains": True}
    found = rates(x, delta, config, torch.float64, before=before.expand(3, 3), users=users, **options)
    lowered = own_loss.users_decreases(found.eta, found.gain, users)
    whole = rates(x, delta, config, torch.float64, before=before, **options)
    each = torch.tensor([[float((d @ e) * (y @ z)) for e, z in zip(delta, x2, strict=True)]
                         for d, y in zip(delta, x, strict=True)], dtype=torch.float64).view(tokens, tokens)  # fmt: skip
    for t in range(tokens):
        own = [i for i in range(tokens) if users[i] == users[t]]
        wanted = sum(float(found.eta[j] * each[i, j]) for i in own for j in own)
        assert float(lowered[t]) == pytest.approx(wanted if users[t] >= 0 else 0.0, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(whole.gain, each.sum(0), rtol=1e-12, atol=1e-13)
    for one in (found, whole):
        assert bool(torch.isfinite(one.eta).all())


def test_asking_for_gains_changes_no_step():
    torch.manual_seed(6)
    x, delta = torch.randn(30, 200), torch.randn(30, 150)  # so few rows that their pairs are compared in any case
    before = torch.tensor([3.0, 2.0, 4.0], dtype=torch.float64)
    one, two = (rates(x, delta, ttt.TTTConfig(), torch.float32, before=before, gains=each) for each in (False, True))
    assert one.gain is None
    assert torch.equal(one.eta, two.eta)
    assert two.gain.shape == (30,)


def test_a_step_whose_decrease_is_unknown_is_not_taken():
    found = own_loss.factor(torch.tensor([float("nan"), 3.0, float("nan")]), torch.tensor(3.0), 0.5)
    assert found.tolist() == [0.0, 1.0, 0.0]
    assert float(own_loss.factor(torch.tensor(0.0), torch.tensor(0.0), 0.5)) == 1.0


@pytest.mark.parametrize("lowered", [float("inf"), 1e30, -1.0, 0.0, float("nan")])
def test_the_factor_never_grows_a_step(lowered):
    found = own_loss.factor(torch.tensor(lowered), torch.tensor(3.0), 0.5)
    assert 0.0 <= float(found) <= 1.0
    assert float(own_loss.factor(torch.tensor(6.0), torch.tensor(3.0), 0.5)) == pytest.approx(0.5)
