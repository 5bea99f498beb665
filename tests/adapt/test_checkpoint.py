import copy
import json
import threading

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from tiny_models import adapted, assert_same, ids_of, state_of, tiny

import ttt


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(pristine model, learnt model, file)."""
    torch.manual_seed(5)
    model, learner = adapted(window=7)
    pristine = copy.deepcopy(ttt.restore_(copy.deepcopy(model)))
    learner.calibrate([ids_of(2, 16)])
    learner.observe(ids_of(1, 30))
    path = tmp_path_factory.mktemp("saved") / "user.safetensors"
    ttt.save(model, path)
    return pristine, model, path


@pytest.mark.parametrize("consolidated", [False, True])
def test_round_trip_continues_to_the_bit(saved, tmp_path, consolidated):
    pristine, _, _ = saved
    model = ttt.adapt_(copy.deepcopy(pristine), ttt.TTTConfig(target_modules=["down_proj"], window=7, chunk=8))
    learner = ttt.Learner(model)
    learner.calibrate([ids_of(2, 16)])
    learner.observe(ids_of(1, 30))
    if consolidated:
        learner.consolidate()
        learner.observe(ids_of(1, 30))
    path = tmp_path / "a.safetensors"
    ttt.save(model, path)
    other = ttt.load(copy.deepcopy(pristine), path)
    assert_same(state_of(model), state_of(other))
    ids = ids_of(2, 40)
    assert torch.equal(learner.observe(ids).nll, ttt.Learner(other).observe(ids).nll)
    assert_same(state_of(model), state_of(other))
    ttt.restore_(other)
    for p, q in zip(other.parameters(), pristine.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capturable", [False, True])
def test_models_of_other_dtypes_and_capturable_layers_come_back_to_the_bit(dtype, capturable, tmp_path):
    """Also with a full window, which a capturable layer holds until its next step."""
    options = {"state_dtype": "8bit"} if dtype == torch.float16 else {}
    model, learner = adapted(window=8, rate="rms", orthogonal=3, **options)
    model.to(dtype)
    learner.calibrate([ids_of(2, 16)])
    if capturable:
        for _, layer in ttt.learning_layers(model):
            layer.capturable_(4)
        for _ in range(2):
            for _, layer in ttt.learning_layers(model):
                x, delta = (torch.randn(4, size, dtype=dtype) * 0.1 for size in (layer.in_features, layer.out_features))
                layer.learn(layer.update_from([(x, delta)]))
        assert all(layer.pending == 8 for _, layer in ttt.learning_layers(model))
    else:
        learner.observe(ids_of(1, 30))
    path = tmp_path / "a.safetensors"
    ttt.save(model, path)
    other = ttt.load(ttt.restore_(copy.deepcopy(model)), path)
    assert_same(state_of(model), state_of(other))


def test_loading_over_other_learning(saved):
    pristine, model, path = saved
    other = ttt.load(copy.deepcopy(pristine), path)
    ttt.Learner(other).observe(ids_of(2, 40))
    ttt.Learner(other).consolidate()
    ttt.load(other, path)
    assert_same(state_of(model), state_of(other))


def damaged(path, tmp_path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "header bit":
        data[40] ^= 4
    elif how.startswith("bit"):
        data[int(len(data) * float(how.split()[1]))] ^= 1
    else:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        if how == "version":
            metadata["format_version"] = "2"
        elif how == "format":
            metadata["format"] = "other"
        elif how == "config":
            metadata["config"] = "{"
        elif how == "missing":
            tensors.pop(next(k for k in tensors if k.endswith(":trace")))
        elif how == "config of another window":
            config = json.loads(metadata["config"])
            metadata["config"] = json.dumps({**config, "window": 9})
        data = safetensors.torch.save(tensors, metadata)
    target = tmp_path / "bad.safetensors"
    target.write_bytes(bytes(data))
    return target


DAMAGE = ["truncated", "empty", "header bit", "bit 0.3", "bit 0.6", "bit 0.999", "version", "format", "config",
          "missing", "config of another window"]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_are_refused_and_nothing_changes(saved, tmp_path, how):
    pristine, _, path = saved
    bad = damaged(path, tmp_path, how)
    learnt = ttt.load(copy.deepcopy(pristine), path)
    ttt.Learner(learnt).observe(ids_of(1, 20))
    before = state_of(learnt)
    if how != "config of another window":  # an adapted model keeps its own configuration
        with pytest.raises(ValueError, match=r"bad\.safetensors"):
            ttt.load(learnt, bad)
        assert_same(before, state_of(learnt))
    fresh = copy.deepcopy(pristine)
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        ttt.load(fresh, bad)
    assert [type(m) for m in fresh.modules()] == [type(m) for m in pristine.modules()]
    for p, q in zip(fresh.parameters(), pristine.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.requires_grad == q.requires_grad


def test_another_model_is_refused(saved):
    pristine, _, path = saved
    other = copy.deepcopy(pristine)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(1e-3)
    with pytest.raises(ValueError, match="another base model"):
        ttt.load(other, path)
    with pytest.raises(ValueError, match="this model has"):
        ttt.load(tiny(layers=2), path)
    with pytest.raises(FileNotFoundError):
        ttt.load(other, path.with_name("none"))


def test_layers_of_different_configurations_are_not_saved(tmp_path):
    layers = [ttt.nn.Linear(4, 4, config=ttt.TTTConfig(lr=lr), name=str(lr)) for lr in (0.1, 0.2)]
    with pytest.raises(ValueError, match=r"its layers 0 and 1 have different configurations, and a file holds one"):
        ttt.save(torch.nn.Sequential(*layers), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    _, model, path = saved
    before = path.read_bytes()

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        ttt.save(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["missing folder", "a folder", "under a file", "long name"])
def test_errors_of_writing_name_the_path_that_was_given(tmp_path, kind):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    name = {"missing folder": "none/x", "a folder": "folder", "under a file": "file/x", "long name": "x" * 300}[kind]
    before = sorted(tmp_path.rglob("*"))
    model = ttt.adapt_(torch.nn.Sequential(torch.nn.Linear(4, 4)), ttt.TTTConfig(target_modules="all-linear"))
    with pytest.raises(OSError) as refused:  # noqa: PT011 (which one depends on the kind)
        ttt.save(model, tmp_path / name)
    assert refused.value.filename == str(tmp_path / name)
    if kind == "missing folder":
        assert isinstance(refused.value, FileNotFoundError)
        assert f"the folder {str(tmp_path / 'none')!r} does not exist" in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_names_of_files_may_be_as_long_as_the_system_allows(tmp_path):
    model = ttt.adapt_(torch.nn.Sequential(torch.nn.Linear(4, 4)), ttt.TTTConfig(target_modules="all-linear"))
    ttt.save(model, tmp_path / ("x" * 255))
    ttt.load(model, tmp_path / ("x" * 255))


def test_errors_of_an_export_name_the_folder_that_was_given(tmp_path):
    (tmp_path / "file").touch()
    model = ttt.adapt_(torch.nn.Sequential(torch.nn.Linear(4, 4)), ttt.TTTConfig(target_modules="all-linear"))
    with pytest.raises(OSError) as refused:  # noqa: PT011
        ttt.export_peft(model, tmp_path / "file" / "x", base_model="base")
    assert refused.value.filename == str(tmp_path / "file" / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_while_the_file_is_written_the_model_may_be_used(saved, tmp_path, monkeypatch):
    model, learner = adapted(window=7)
    found = []

    def slow_write(*arguments, **options):
        other = threading.Thread(target=lambda: found.append(learner.observe(ids_of(1, 9)).learned))
        other.start()
        other.join()

    monkeypatch.setattr("ttt.adapt.checkpoint.write_atomically", slow_write)
    ttt.save(model, tmp_path / "a.safetensors")
    assert found
    assert found[0] > 0
