"""`ttt.load` of files that were damaged or forged, each in one way, and `ttt.save` of state that it would refuse."""

import copy
import json
import math
import time

import pytest
import torch
from forged import OPTIONS, Case, content, everything, forge, plain, refused, teach
from torch import nn

import ttt
from ttt.adapt.convert import learning_layers


def test_a_good_file_is_loaded_and_goes_on_as_the_model_that_was_saved(case):
    for model in case.targets():
        other = ttt.load(model, case.path)
        for one in (saved := copy.deepcopy(case.model), other):
            torch.manual_seed(7)
            teach(one, 4)
        for (_, a), (_, b) in zip(learning_layers(saved), learning_layers(other), strict=True):
            assert all(torch.equal(t, b.state()[key]) for key, t in a.state().items())


def with_values(case, tmp_path, **values):
    """The good file with tensors of its first layer filled with values; ``base_`` stands for ``base.``."""
    tensors = {key: t.clone() for key, t in case.tensors.items()}
    for key, value in values.items():
        tensors[f"0:{key.replace('base_', 'base.')}"].fill_(value)
    return forge(tmp_path / "bad.safetensors", tensors, case.metadata)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"pending": -1}, r"layer 0: pending must be in \[0, 5\], got -1"),
        ({"pending": -(10**6)}, r"pending must be in \[0, 5\], got -1000000"),
        ({"pending": 6}, r"pending must be in \[0, 5\], got 6"),
        ({"recent_seen": -1}, "layer 0: recent_seen must hold numbers in"),
        ({"recent_seen": 2**63 - 1}, "recent_seen must hold numbers in"),
        ({"recent_seen": 2**31}, "recent_seen must hold numbers in"),
        ({"seen": 2**31}, "seen must hold numbers in"),
        ({"seen": -(10**6)}, "layer 0: seen must hold"),
        ({"step": -1}, "step must hold"),
        ({"step": 0}, r"tokens must be 0 before the first commit \(step 0\)"),
        ({"tokens": -1}, "tokens must hold"),
        ({"pending": 0}, "win_eta must be 0 from row pending = 0 on"),
        ({"importance": -0.5}, "importance must hold numbers in .0, 1.09951e.12., got -0.5 to -0.5"),
        ({"trace": -0.5}, "trace must hold"),
        ({"moments": -1.0}, "moments must hold"),
        ({"importance_scale": -1.0}, "importance_scale must hold"),
        ({"base_importance_scale": -1.0}, "base.importance_scale must hold"),
        ({"win_eta": -0.1}, "win_eta must hold"),
        ({"win_x": 1e11, "win_delta": 1e11}, "makes too large an update"),
        ({"basis": 1.0}, "basis must hold orthonormal rows"),
        ({"momentum": 1e30}, "momentum must hold"),
    ],
)
def test_values_out_of_range(first_case, tmp_path, values, match):
    refused(first_case, with_values(first_case, tmp_path, **values), match)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_float_of_any_tensor_may_be_infinite_or_no_number(case, tmp_path, value):
    for key, t in case.tensors.items():
        if t.is_floating_point():
            tensors = {**case.tensors, key: t.clone()}
            tensors[key].view(-1)[-1] = value
            name, _, kind = key.partition(":")
            path = forge(tmp_path / "bad.safetensors", tensors, case.metadata)
            refused(case, path, rf"bad\.safetensors: layer {name}: {kind} must hold numbers in")


def test_exponents_of_8_bit_state_that_mean_no_number(tmp_path):
    case = Case(tmp_path, OPTIONS["mas in 8 bits"])
    for key in ("importance", "trace", "base.trace"):
        full = f"2:{key}"
        if full in case.tensors:
            tensors = {**case.tensors, full: case.tensors[full].clone()}
            tensors[full][1, -1] = 255
            refused(case, forge(tmp_path / "bad.safetensors", tensors, case.metadata), "must have exponents in")


def test_state_whose_next_commit_overflows(tmp_path):
    """Every value is within its bounds; the trace that the commit makes of them is not."""
    case = Case(tmp_path, OPTIONS["rms, momentum, generated rows"])
    tensors = {key: t.clone() for key, t in case.tensors.items()}
    pending = int(tensors["0:pending"])
    for key, value in {"win_x": 2.0**29, "win_delta": 2.0**29, "win_eta": 2.0**-30}.items():
        tensors[f"0:{key}"][:pending] = value
    refused(
        case,
        forge(tmp_path / "bad.safetensors", tensors, case.metadata),
        "the next commit would leave trace, which must hold",
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"users": {"slots": 4}}, "config in its metadata is for weights of every user's own"),
        ({"per_user": {"slots": 10**7}}, "config in its metadata is for weights of every user's own"),
        ({"layers": 5}, 'config in its metadata: layers must be "all"'),
        ({"layers": [1.5]}, 'layers must be "all"'),
        ({"target_modules": 5}, "target_modules must be a string, a list of strings or None, got 5"),
        ({"target_modules": [["x"]]}, "target_modules must be a string, a list"),
        ({"lr": 1e300}, r"lr must be a number in \[-1.09951e\+12, 1.09951e\+12\]"),
        ({"lr": "fast"}, "lr must be"),
        ({"lr": None}, "lr must be"),
        ({"window": 2**70}, "window must be"),
        ({"surprise": 1}, "unknown configuration fields"),
    ],
)
def test_configurations_that_are_not_valid(first_case, tmp_path, changes, match):
    config = json.loads(first_case.metadata["config"]) | changes
    metadata = {**first_case.metadata, "config": json.dumps(config)}
    refused(first_case, forge(tmp_path / "bad.safetensors", first_case.tensors, metadata), match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "config in its metadata must be a dict"),
        ("5", "config in its metadata must be a dict"),
        ("null", "config in its metadata must be a dict"),
        ('{"lr": NaN}', "NaN is no JSON number"),
        ('{"lr": Infinity}', "Infinity is no JSON number"),
        ('{"lr": 1e999}', "lr must be a number in"),
        ("[" * 100_000 + "]" * 100_000, "must be nested at most 8 deep"),
        ('{"layers": ' + "[" * 9 + "]" * 9 + "}", "must be nested at most 8 deep"),
        ('{"lr": 1' + " " * 2_000_000 + "}", "must take at most 1048576 bytes"),
    ],
)
def test_metadata_that_is_no_configuration(first_case, tmp_path, text, match):
    path = forge(tmp_path / "bad.safetensors", first_case.tensors, {**first_case.metadata, "config": text})
    refused(first_case, path, match)


def test_sizes_that_no_memory_can_hold(tmp_path):
    """A layer of 2^22 inputs and a window of 2^40 rows: more bytes than 63 bits count, and refused before that."""
    model = nn.Sequential(nn.Linear(2**22, 1, bias=False))
    config = ttt.TTTConfig(target_modules="all-linear", window=1, protect=[])
    path = tmp_path / "bad.safetensors"
    ttt.save(ttt.adapt_(copy.deepcopy(model), config), path)
    tensors, metadata = content(path)
    values = json.loads(metadata["config"]) | {"window": 2**40}
    forge(path, tensors, {**metadata, "config": json.dumps(values)})
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"bad\.safetensors.*window must be a whole number in \[1, 16777216\]"):
        ttt.load(model, path)
    assert list(model.modules()) == before


@pytest.mark.parametrize("text", ["{}", "[]", '["0", "0"]', '["0", 2]', "[[]]", "[" * 100_000, "", '["0"]', '["1"]'])
def test_names_of_layers_that_are_not_valid(first_case, tmp_path, text):
    path = forge(tmp_path / "bad.safetensors", first_case.tensors, {**first_case.metadata, "layers": text})
    refused(first_case, path, r"bad\.safetensors")


@pytest.mark.parametrize("field", ["window", "replay_capacity", "orthogonal", "generated_rank"])
def test_sizes_are_compared_before_anything_of_that_size_is_made(first_case, tmp_path, field, monkeypatch):
    """10^7 rows are refused without a tensor of that size."""
    config = json.loads(first_case.metadata["config"]) | {field: 10**7}
    path = forge(
        tmp_path / "bad.safetensors", first_case.tensors, {**first_case.metadata, "config": json.dumps(config)}
    )
    model = copy.deepcopy(first_case.pristine)
    made, zeros = [], torch.zeros

    def watched(*args, **kwargs):
        t = zeros(*args, **kwargs)
        made.append(0 if t.is_meta else t.numel())
        return t

    monkeypatch.setattr("torch.zeros", watched)
    before, start = everything(model), time.perf_counter()
    with pytest.raises(ValueError, match="differ in presence, shape or dtype"):
        ttt.load(model, path)
    assert time.perf_counter() - start < 2
    assert max(made, default=0) < 1000
    assert everything(model) == before


def test_hundreds_of_thousands_of_tensors_are_refused_by_the_size_of_the_header(first_case, tmp_path):
    entries = ",".join(f'"0:{i:08d}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(800_000))
    header = f'{{"__metadata__":{json.dumps(first_case.metadata)},{entries}}}'.encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    start = time.perf_counter()
    refused(first_case, path, r"its header must take at most \d+ bytes, got \d+")
    assert time.perf_counter() - start < 2


def test_headers_that_are_none(first_case, tmp_path):
    path = tmp_path / "bad.safetensors"
    for data in (b"", b"\1\0\0", (2**63).to_bytes(8, "little") + b"{}", (2**64 - 1).to_bytes(8, "little"),
                 (200_000).to_bytes(8, "little") + b"[" * 200_000, (2).to_bytes(8, "little") + b"[]"):  # fmt: skip
        path.write_bytes(data)
        refused(first_case, path, r"bad\.safetensors")
    with pytest.raises(OSError, match="directory"):
        ttt.load(copy.deepcopy(first_case.pristine), tmp_path)


# -- saving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["weight", "trace", "memory", "win_x", "momentum", "base.importance"])
def test_save_refuses_state_that_is_not_finite(first_case, tmp_path, key):
    model = copy.deepcopy(first_case.model)
    layer = model[2]
    held = layer.base[key.removeprefix("base.")] if key.startswith("base.") else layer.state()[key]
    held.view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=rf"model cannot be saved: layer 2: {key} must hold numbers in"):
        ttt.save(model, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_saving_changes_nothing(case, tmp_path):
    before = everything(case.model)
    ttt.save(case.model, tmp_path / "again.safetensors")
    assert everything(case.model) == before
    tensors, metadata = content(tmp_path / "again.safetensors")
    assert metadata == case.metadata
    assert all(torch.equal(t, case.tensors[key]) for key, t in tensors.items())


def test_models_adapted_for_users_are_refused_with_the_way_out(first_case, tmp_path):
    config = ttt.TTTConfig(target_modules="all-linear", per_user=ttt.LowRank(slots=2, rank=2, window=4))
    model = ttt.adapt_(plain(), config)
    before = everything(model)
    for call in (lambda: ttt.save(model, tmp_path / "a"), lambda: ttt.load(model, first_case.path)):
        with pytest.raises(ValueError, match=r"was adapted for users.*pool_of\(model\)\.export\(user\)"):
            call()
    assert everything(model) == before
    assert list(tmp_path.iterdir()) == []


# -- loading is all or nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
def test_a_failure_while_memory_is_taken_changes_no_value(first_case, which, monkeypatch):
    """The second layer finds no memory: the first one is as it was, too."""
    model = first_case.targets()[which]
    if not which:
        teach(model, 2)
    before = everything(model)
    clone, count = torch.Tensor.to, [0]

    def failing(self, *args, **kwargs):
        if kwargs.get("copy"):
            count[0] += 1
            if count[0] == 9:
                raise torch.OutOfMemoryError("no memory left")
        return clone(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", failing)
    with pytest.raises(torch.OutOfMemoryError):
        ttt.load(model, first_case.path)
    monkeypatch.undo()
    assert count[0] == 9
    assert everything(model) == before


def test_a_capturable_layer_refuses_a_window_of_other_steps(tmp_path):
    case = Case(tmp_path, OPTIONS["mas in 8 bits"])
    model = copy.deepcopy(case.model)
    for _, layer in learning_layers(model):
        layer.capturable_(2)
    before = [layer.state()["weight"].clone() for _, layer in learning_layers(model)]
    pending = int(case.tensors["0:pending"])
    assert pending % 2
    with pytest.raises(ValueError, match=f"pending = {pending} is no whole number of the layer's steps of 2 rows"):
        ttt.load(model, case.path)
    for (_, layer), weight in zip(learning_layers(model), before, strict=True):
        assert torch.equal(layer.weight, weight)
