"""Exported adapters: PEFT's own loader reads them, they follow the rules of servers, and come back to the bit."""

import copy
import json

import pytest
import safetensors.torch
import torch
from peft_models import TARGETS, gpt2, linear_shapes, llama, loaded, logits, random_state, with_deltas
from server_rules import check_adapter

import ttt
from ttt.adapt import RANKS


def learnt(model, targets, lr):
    """``model`` adapted and taught; a copy of it as it was."""
    before = copy.deepcopy(model)
    ttt.adapt_(
        model, ttt.TTTConfig(target_modules=targets, lr=lr, rate="rms", window=7, protect=[ttt.OrthogonalUpdates(32)])
    )
    learner = ttt.Learner(model)
    learner.observe(torch.randint(0, 40, (1, 60)))
    learner.consolidate()
    learner.observe(torch.randint(0, 40, (1, 33)))  # leaves a part in the window
    return before


# -- from a model -------------------------------------------------------------------------------------------------


def test_an_adapted_llama_in_peft(tmp_path):
    """Rank 32 holds any delta of the 24-wide model: the logits are the same."""
    model = llama()
    base = learnt(model, TARGETS, lr=0.1)
    found = ttt.export_peft(model, tmp_path / "v1", rank=32, base_model="tiny/llama")
    check_adapter(found.folder, linear_shapes(base))
    assert found.rank == 32
    assert set(found.errors) == {name for name in linear_shapes(base) if name.split(".")[-1] in TARGETS}
    assert all(error < 1e-6 for error in found.errors.values())
    assert found.error < 1e-6
    ids = torch.randint(0, 40, (2, 20))
    exact = logits(model, ids)
    assert (exact - logits(base, ids)).abs().max() > 0.05  # it learnt
    torch.testing.assert_close(logits(loaded(base, found.folder), ids), exact, rtol=0, atol=1e-5)


def test_the_error_of_truncation_is_what_is_lost(tmp_path):
    model = llama()
    learnt(model, TARGETS, lr=0.1)
    found = ttt.export_peft(model, tmp_path / "v1", rank=8, base_model="tiny/llama")
    written = safetensors.torch.load_file(found.folder / "adapter_model.safetensors")
    lost = size = 0.0
    for name, layer in ttt.learning_layers(model):
        delta = layer.effective_weight().double() - layer.base_weight.double()
        a, b = (written[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        error = (delta - b @ a).norm() / delta.norm()
        assert found.errors[name] == pytest.approx(float(error), rel=1e-9)
        # Eckart and Young: nothing of that rank is nearer, and float32 adds little.
        best = torch.linalg.svdvals(delta)[8:].norm() / delta.norm()
        assert error == pytest.approx(float(best), rel=1e-3)
        assert error > 1e-3
        lost, size = lost + float((delta - b @ a).square().sum()), size + float(delta.square().sum())
    assert found.error == pytest.approx((lost / size) ** 0.5, rel=1e-9)


def test_a_model_that_learnt_nothing(tmp_path):
    model = ttt.adapt_(llama(), ttt.TTTConfig(target_modules=TARGETS))
    found = ttt.export_peft(model, tmp_path / "v1", base_model="tiny/llama")
    assert (found.rank, found.error, set(found.errors.values())) == (8, 0.0, {0.0})
    ids = torch.randint(0, 40, (1, 9))
    assert torch.equal(logits(loaded(ttt.restore_(model), found.folder), ids), logits(model, ids))


def test_gpt2s_conv1d(tmp_path):
    model = gpt2()
    base = learnt(model, ["c_fc", "c_proj"], lr=0.05)
    found = ttt.export_peft(model, tmp_path / "v1", rank=32, base_model="tiny/gpt2")
    assert json.loads((found.folder / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    ids = torch.randint(0, 40, (2, 20))
    exact = logits(model, ids)
    assert (exact - logits(base, ids)).abs().max() > 0.05
    torch.testing.assert_close(logits(loaded(base, found.folder), ids), exact, rtol=0, atol=1e-5)
    state = ttt.import_peft(found.folder)
    for name, layer in ttt.learning_layers(model):
        delta = state[f"{name}.b"].double().T @ state[f"{name}.a"].double()
        torch.testing.assert_close(
            delta, layer.effective_weight().double() - layer.base_weight.double(), rtol=0, atol=1e-6
        )


def test_the_base_models_name(tmp_path):
    model = llama()
    model.config._name_or_path = "org/its-name"
    ttt.adapt_(model, ttt.TTTConfig(target_modules=TARGETS))
    for base, expected in ((None, "org/its-name"), ("other/name", "other/name")):
        folder = ttt.export_peft(model, tmp_path / expected, base_model=base).folder
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == expected


# -- from a user's state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "rank"), [(1, 8), (5, 8), (8, 8), (9, 16), (33, 64), (lambda number: 1 + number % 7, 8)]
)
def test_a_low_rank_state_in_peft_and_back(tmp_path, rows, rank):
    model = llama()
    state = random_state(model, rows)
    state["seen"] = torch.tensor([4])  # no layer's
    found = ttt.export_peft(state, tmp_path / "v1", base_model="tiny/llama")
    check_adapter(found.folder, linear_shapes(model))
    assert (found.rank, found.error) == (rank, 0.0)
    ids = torch.randint(0, 40, (2, 20))
    exact = logits(with_deltas(model, state), ids)
    assert (exact - logits(model, ids)).abs().max() > 0.05
    torch.testing.assert_close(logits(loaded(model, found.folder), ids), exact, rtol=0, atol=1e-5)
    back = ttt.import_peft(found.folder)
    assert set(back) == set(state) - {"seen"}
    for key, t in back.items():
        assert t.dtype == torch.float32
        assert torch.equal(t[: state[key].shape[0]], state[key])  # to the bit
        assert not t[state[key].shape[0] :].any()
    if not callable(rows):
        for key, t in ttt.import_peft(found.folder, rows=rows).items():
            assert torch.equal(t, state[key])


def test_a_state_of_more_rows_than_allowed(tmp_path):
    """Exact where the product's rank allows: 600 rows of a 24-wide layer have rank 24. Else the nearest."""
    model = llama()
    state = random_state(model, 600)
    for key in state:
        state[key] *= 0.2
    found = ttt.export_peft(state, tmp_path / "exact", base_model="tiny/llama")
    assert found.rank == 512
    assert found.error < 1e-6
    check_adapter(found.folder, linear_shapes(model))
    ids = torch.randint(0, 40, (2, 20))
    torch.testing.assert_close(
        logits(loaded(model, found.folder), ids), logits(with_deltas(model, state), ids), rtol=0, atol=1e-5
    )
    found = ttt.export_peft(state, tmp_path / "nearest", base_model="tiny/llama", rank=8)
    for name, error in found.errors.items():
        delta = state[f"{name}.b"].double().T @ state[f"{name}.a"].double()
        assert error == pytest.approx(float(torch.linalg.svdvals(delta)[8:].norm() / delta.norm()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smaller_dtypes(tmp_path, dtype):
    model = llama()
    state = random_state(model, 5, dtype)
    found = ttt.export_peft(state, tmp_path / "same", base_model="tiny/llama", dtype=dtype)
    assert found.error == 0.0
    check_adapter(found.folder, linear_shapes(model))
    for key, t in ttt.import_peft(found.folder, rows=5).items():
        assert torch.equal(t, state[key].float())
    wide = {key: torch.randn_like(t, dtype=torch.float64) for key, t in state.items()}
    found = ttt.export_peft(wide, tmp_path / "rounded", base_model="tiny/llama", dtype=dtype)
    rounded = ttt.import_peft(found.folder, rows=5)
    for name, error in found.errors.items():
        delta, written = (s[f"{name}.b"].double().T @ s[f"{name}.a"].double() for s in (wide, rounded))
        assert error == pytest.approx(float((delta - written).norm() / delta.norm()), rel=1e-9)
        assert 1e-5 < error < 1e-2


def test_a_stored_user_becomes_an_adapter_and_returns(tmp_path):
    state = random_state(llama(), 16)
    with ttt.Store(tmp_path / "store") as store:
        with store.lease("ada") as lease:
            store.put(lease, state)
        folder = ttt.export_peft(store.get("ada").tensors, tmp_path / "ada-1", base_model="tiny/llama").folder
        with store.lease("ada") as lease:
            store.put(lease, ttt.import_peft(folder))
        back = store.get("ada").tensors
    assert all(torch.equal(back[key], state[key]) for key in state)


# -- refusals of export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        ({}, {"rank": 12}, r"rank must be one of \(8, 16, .*, 512\), which vLLM serves, got 12"),
        ({}, {"dtype": torch.float64}, "dtype must be one of .*torch.float64"),
        ({}, {"base_model": None}, "base_model must name"),
        ({"x.a": torch.ones(2, 3)}, {}, "holds one of x.a and x.b only"),
        ({"x.a": torch.ones(2, 3), "x.b": torch.ones(3, 3)}, {}, r"x.a and x.b must have shapes"),
        ({"x.a": torch.ones(2, 3).int(), "x.b": torch.ones(2, 3)}, {}, "x.a must hold floats, got torch.int32"),
        ({"x.a": torch.tensor([[float("nan")]]), "x.b": torch.ones(1, 1)}, {}, "x.a holds values that are not finite"),
        ({"x.a": torch.ones(1, 1) * 1j, "x.b": torch.ones(1, 1)}, {}, "x.a must hold floats, got torch.complex64"),
        (
            {"x.a": torch.ones(1, 1), "x.b": torch.full((1, 1), 1e5)},
            {"dtype": torch.float16},
            "x: lora_B is too large for torch.float16",
        ),
        ({}, {"rank": 8.0}, "rank must be one of"),
        ({}, {"base_model": 5}, "base_model must name .* got 5"),
    ],
)
def test_exports_that_are_refused(tmp_path, change, options, match):
    state = {**random_state(llama(), 3), **change}
    with pytest.raises(ValueError, match=match):
        ttt.export_peft(state, tmp_path / "v1", **{"base_model": "tiny/llama", **options})
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_refused(tmp_path):
    model = ttt.adapt_(llama(), ttt.TTTConfig(target_modules=TARGETS))
    name, layer = ttt.learning_layers(model)[1]
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        ttt.export_peft(model, tmp_path / "v1", base_model="tiny/llama")
    config = ttt.TTTConfig(target_modules=TARGETS, per_user=ttt.LowRank(slots=1, rank=2, window=2))
    with pytest.raises(ValueError, match=r"was adapted for users.*pool_of\(model\)\.export\(user\)"):
        ttt.export_peft(ttt.adapt_(llama(), config), tmp_path / "v1", base_model="tiny/llama")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_and_unharmed(tmp_path):
    state = random_state(llama(), 3)
    (tmp_path / "empty").mkdir()
    ttt.export_peft(state, tmp_path / "empty", base_model="tiny/llama")
    before = {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()}
    with pytest.raises(ValueError, match="folder must be new or empty"):
        ttt.export_peft(random_state(llama(), 4), tmp_path / "empty", base_model="tiny/llama")
    assert {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="folder must be new or empty"):
        ttt.export_peft(state, tmp_path / "file", base_model="tiny/llama")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_sources_without_layers(tmp_path):
    with pytest.raises(ValueError, match="source holds no layer"):
        ttt.export_peft({"x": torch.ones(1)}, tmp_path / "v1", base_model="m")
    with pytest.raises(ValueError, match="no learning layer"):
        ttt.export_peft(llama(), tmp_path / "v1", base_model="m")


def test_a_write_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def cannot(*args):
        raise OSError("disk full")

    monkeypatch.setattr("ttt.adapt.peft_export.os.rename", cannot)
    with pytest.raises(OSError, match="disk full"):
        ttt.export_peft(random_state(llama(), 3), tmp_path / "v1", base_model="m")
    assert list(tmp_path.iterdir()) == []


def test_ranks_are_those_of_the_rules():
    import server_rules

    assert set(RANKS) == server_rules.RANKS
    assert list(RANKS) == sorted(RANKS)
