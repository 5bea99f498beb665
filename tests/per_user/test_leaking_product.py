"""Isolation of users where torch's own product lets rows that are not finite reach other rows (as on Intel AMX)."""

import io

import pytest
import torch
from test_low_rank_layer import layer_of, taught
from test_user_learning import HUGE, adapted, assert_same, exports
from tiny_models import ids_of, tiny

import ttt
from ttt.defences import LowRank
from ttt.ops import cpu

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def leaks(monkeypatch):
    """Replaces torch's product by one in which a row that is not finite spoils all, as oneDNN's does on AMX.

    Yields a function that says how often that happened since the last call.
    """
    real, count = torch.nn.functional.linear, [0]

    def leaking(x, weight, bias=None):
        y = real(x, weight, bias)
        if x.shape[-1] % 32 and not bool(torch.isfinite(x).all()):
            count[0] += 1
            y.fill_(torch.nan)
        return y

    def since():
        found, count[0] = count[0], 0
        return found

    monkeypatch.setattr(torch.nn.functional, "linear", leaking)
    return since


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [65, 96])
def test_forward_gives_each_row_its_own_bits(leaks, monkeypatch, dtype, n, bound):
    layer = taught(layer_of(n, 40, dtype))
    if not bound:
        monkeypatch.setattr("ttt.nn.low_rank.binding_of", lambda layer: None)
    layer.routing.set(torch.tensor([1, -1, 0, 1, -1], dtype=torch.int32))
    x = torch.randn(5, 6, n).to(dtype)
    spoilt = x.clone()
    spoilt[1, 3, 7], spoilt[2, 0, n - 1], spoilt[4, 5] = torch.inf, torch.nan, -torch.inf
    with torch.no_grad():
        y, found = layer(x), layer(spoilt)
    bad = ~torch.isfinite(spoilt).all(-1)
    assert int(bad.sum()) == 3
    assert torch.equal(found[~bad], y[~bad])
    assert bool(found[bad].isnan().all())
    assert torch.isfinite(y).all()
    assert leaks() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_gives_each_row_its_own_bits(leaks, dtype):
    layer = taught(layer_of(64, 40, dtype))
    layer.routing.set(torch.tensor([1, -1, 0], dtype=torch.int32))
    x, delta = torch.randn(3, 6, 64).to(dtype).requires_grad_(), torch.randn(3, 6, 40).to(dtype)
    spoilt = delta.clone()
    spoilt[1, 2, 3], spoilt[2, 5, 39] = torch.nan, torch.inf
    want, found = (torch.autograd.grad(layer(x), x, grad)[0] for grad in (delta, spoilt))
    bad = ~torch.isfinite(spoilt).all(-1)
    assert torch.equal(found[~bad], want[~bad])
    assert bool(found[bad].isnan().all())
    assert leaks() == 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("directions", [0, 4])
def test_observe_rejects_only_the_user_whose_numbers_are_not_finite(leaks, family, directions):
    """The adapted layers' inputs (down_proj) or gradients (up_proj) have 48 entries, all other products' inputs 32."""
    ids, users = ids_of(3, 40), ["a", "bad", "b"]
    base, found = tiny(family).state_dict(), []
    for spoilt in (False, True):
        model, learner = adapted(family, orthogonal=directions)
        model.load_state_dict(base)
        if directions:
            learner.calibrate([torch.arange(1, 61).view(2, 30)])
        learner.observe(ids[:, :10], users=users)
        if spoilt:
            state = learner.pool.export("bad")
            learner.pool.load("bad", {k: t * HUGE if k.endswith((".a", ".b")) else t for k, t in state.items()})
        seen = learner.observe(ids, users=users)
        assert seen.rejected_users == ({"bad": 5} if spoilt else {})
        found.append(exports(learner.pool, "a", "b") | {"nll": seen.nll[::2]})
        with torch.no_grad(), ttt.users(model, users):
            found[-1]["logits"] = model(ids).logits[::2]
    assert_same(*found)
    assert leaks() == 0


def test_steps_outside_the_basis_are_each_rows_own(monkeypatch):
    """Where the projection of the inputs is a torch product, too."""
    layer = layer_of(33, 20, torch.float16, orthogonal=4, low_rank=LowRank(slots=2, rank=2, window=8))
    layer.basis.copy_(torch.linalg.qr(torch.randn(33, 4)).Q.T)
    x, delta = torch.randn(6, 33).half(), torch.randn(6, 20).half()
    users = torch.tensor([0, 1, 0, 1, -1, 0], dtype=torch.int32)

    def leaking(rows, basis, side):
        if basis is None:
            return rows
        return project_rows(rows, basis, side) if torch.isfinite(rows).all() else torch.full_like(rows, torch.nan)

    from ttt.nn.directions import project_rows

    monkeypatch.setattr("ttt.nn.base.project_rows", leaking)
    spoilt = x.clone()
    spoilt[1, 5], spoilt[4, 32] = torch.inf, torch.nan
    (want, _, rates), (found, _, others) = layer.steps(x, delta, users), layer.steps(spoilt, delta, users)
    bad = torch.tensor([False, True, False, False, True, False])
    assert torch.equal(found[~bad], want[~bad])
    assert torch.equal(others.eta[~bad], rates.eta[~bad])
    assert others.finite.tolist() == (~bad).tolist()


def test_info_says_whether_this_machines_product_leaks(leaks):
    file = io.StringIO()
    found, printed = ttt.info(file)["isolation"], file.getvalue()
    assert found.keys() == {"float32", "bfloat16", "float16"}
    for text in found.values():
        assert "turns rows into NaN beside a row that holds an infinity or NaN" in text
        assert "(inputs of 65, 80, 100, 500 features" in text
        assert "ONEDNN_MAX_CPU_ISA" in text
        assert text in printed


def test_info_says_that_rows_stay_apart(monkeypatch):
    def row_by_row(x, weight, bias=None):
        return (x.double().unsqueeze(1) * weight.double()).sum(2).to(x.dtype)

    monkeypatch.setattr(torch.nn.functional, "linear", row_by_row)
    texts = set(ttt.info(file=None)["isolation"].values())
    assert texts == {"torch.nn.functional.linear keeps the rows of a batch apart"}


@pytest.mark.skipif(cpu._C is None, reason="there is no kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", [] if cpu._C is None else cpu._C.available_isas())
def test_all_finite_finds_a_single_number(isa, dtype):
    before, largest = cpu._C.active_isa(), torch.finfo(dtype).max
    cpu._C.set_isa(isa)
    try:
        for count in (0, 1, 7, 64, 333):
            x = torch.randn(count + 1).to(dtype)[1:]  # at an odd address
            x[: count // 2] = -largest
            assert cpu._C.all_finite(x.data_ptr(), count, cpu.DTYPE_CODES[dtype])
            for at in range(count):
                for bad in (torch.inf, -torch.inf, torch.nan, -torch.nan):
                    held, x[at] = x[at].clone(), bad
                    assert not cpu._C.all_finite(x.data_ptr(), count, cpu.DTYPE_CODES[dtype])
                    x[at] = held
    finally:
        cpu._C.set_isa(before)
