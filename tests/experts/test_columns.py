"""Columns against full singular value decompositions in float64."""

import pytest
import torch
from forged import content, forge
from tiny_models import VOCAB, adapted, assert_same, ids_of, state_of

import ttt
from ttt.experts.columns import compress, load, merge, save
from ttt.experts.signature import BUCKETS, Signature

SHAPES = ((33, 21), (7, 40), (5, 5))


def low_rank(rank, noise=0.0):
    return [torch.randn(m, rank) @ torch.randn(rank, n) + noise * torch.randn(m, n) for m, n in SHAPES]


def signature(length=50):
    made = Signature(30)
    made.add(torch.randint(30, (1, length)))
    return made


def column(deltas, rank=3, tokens=100, worth=1.0, seed=0):
    return compress(deltas, rank, tokens, worth, signature(), seed)


def truncated(delta, rank):
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_what_has_the_rank_is_kept():
    deltas = low_rank(3)
    found = column(deltas)
    for i, delta in enumerate(deltas):
        torch.testing.assert_close(found.delta(i), delta, rtol=1e-4, atol=1e-4)
    assert found.error < 1e-3
    assert found.bytes == 4 * (sum(3 * (m + n) for m, n in SHAPES) + BUCKETS + 2 * 30)


def test_truncation_is_the_best_one_and_says_what_it_lost():
    deltas = low_rank(2, noise=0.1)
    found = column(deltas, rank=4)
    lost = whole = 0.0
    for i, delta in enumerate(deltas):
        best = truncated(delta, 4)
        gone = float((found.delta(i).double() - delta.double()).square().sum())
        assert gone <= 1.02 * float((best - delta.double()).square().sum()) + 1e-8
        lost, whole = lost + gone, whole + float(delta.double().square().sum())
    assert found.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def test_compression_is_seeded_and_draws_from_no_other_generator():
    deltas = low_rank(2, noise=0.5)
    read, state = signature(), torch.get_rng_state()
    one, same, other = (compress(deltas, 3, 100, 1.0, read, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(one.a + one.b, same.a + same.b, strict=True))
    assert not torch.equal(one.a[0], other.a[0])


def test_zero_is_a_column():
    found = column([torch.zeros(m, n) for m, n in SHAPES])
    assert found.error == 0
    assert float(found.delta(0).abs().max()) == 0


def test_merging_is_the_truncated_mean_weighted_by_tokens():
    first, second = low_rank(3), low_rank(3)
    one, other = column(first, tokens=300, worth=1.0), column(second, tokens=100, worth=0.2)
    before = [t.clone() for t in one.a + one.b + other.a + other.b]
    merged = merge(one, other, 3)
    lost = whole = 0.0
    for i, (x, y) in enumerate(zip(first, second, strict=True)):
        mean = 0.75 * x.double() + 0.25 * y.double()
        torch.testing.assert_close(merged.delta(i).double(), truncated(mean, 3), rtol=1e-3, atol=1e-3)
        lost += float((truncated(mean, 3) - mean).square().sum())
        whole += float(mean.square().sum())
    assert merged.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert (merged.tokens, merged.worth) == (400, pytest.approx(0.8))
    for both, x, y in zip(merged.signature.counts, one.signature.counts, other.signature.counts, strict=True):
        assert torch.equal(both, x + y)
    assert all(torch.equal(x, y) for x, y in zip(before, one.a + one.b + other.a + other.b, strict=True))


@pytest.fixture
def saved(tmp_path):
    """(a model, the path of a file with two columns for it)."""
    model, _ = adapted(layers="last:2")
    layers = [layer for _, layer in ttt.learning_layers(model)]
    made = []
    for seed in (1, 2):
        signature = Signature(VOCAB)
        signature.add(ids_of(1, 30))
        deltas = [torch.randn_like(layer.weight) for layer in layers]
        made.append(compress(deltas, 3, 29, 0.5, signature, seed))
    path = tmp_path / "good.safetensors"
    save(made, model, path)
    return model, path


def test_columns_come_back_from_a_file_to_the_bit(saved):
    model, path = saved
    first, second = load(model, path)
    assert (first.tokens, first.worth, len(first.a)) == (29, 0.5, 2)
    again = path.with_name("again.safetensors")
    save([first, second], model, again)
    assert load(model, again)[1].a[0].equal(second.a[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t["0.a.0"].fill_(float("nan")), "column 0: a must hold finite floats"),
        (lambda t, m: t["1.b.1"].fill_(float("inf")), "column 1: b must hold finite floats"),
        (lambda t, m: t["0.pairs"].neg_(), "counts of the signature must be at least 0"),
        (
            lambda t, m: t.update({"0.b.0": t["0.b.0"][:2].clone()}),
            "does not fit this model's learning layers",
        ),
        (
            lambda t, m: t.update({"0.a.0": t["0.a.0"][0].clone()}),
            "does not fit this model's learning layers",
        ),
        (lambda t, m: t.pop("1.second"), "'1.second' is missing"),
        (lambda t, m: m.update(columns="[" * 3000), "columns in its metadata"),
        (lambda t, m: m.update(columns="{}"), "must be a list, got dict"),
        (lambda t, m: m.update(columns='[{"tokens": 1}]'), "must hold tokens, worth and error of every column"),
        (lambda t, m: m.update(columns='[{"tokens": -1, "worth": 0, "error": 0}]'), "tokens must be a whole number"),
        (lambda t, m: m.update(columns='[{"tokens": 1, "worth": NaN, "error": 0}]'), "columns in its metadata"),
        (lambda t, m: m.update(columns='[{"tokens": 1, "worth": "x", "error": 0}]'), "worth must be a number"),
    ],
)
def test_a_forged_file_of_columns_is_refused(saved, change, message):
    model, path = saved
    tensors, metadata = content(path)
    change(tensors, metadata)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        load(model, forge(path.with_name("bad.safetensors"), tensors, metadata))
    assert_same(before, state_of(model))
