"""Calibration on text that the model writes: measured once, shown, and not in the way where nothing can be written."""

import contextlib
import copy

import pytest
import safetensors.torch
import torch
from tiny_models import tiny

import ttt
from ttt.calibrating import calibrated, measured, telling_of_text
from ttt.conversation import CONVERSATION
from ttt.learn import own_text
from ttt.learn.own_text import written_text
from ttt.per_user import calibration_file
from ttt.per_user.calibration_file import SHARED


@pytest.fixture
def base(monkeypatch):
    monkeypatch.setattr(own_text, "LENGTH", 48)
    return tiny()


def learner_of(base):
    return ttt.Learner(ttt.adapt_(copy.deepcopy(base), CONVERSATION))


def shared(learner):
    return {
        f"{name}.{buffer}": t.clone()
        for name, layer in learner.pool.layers.items()
        for buffer in SHARED
        if (t := getattr(layer, buffer, None)) is not None
    }


class Shown:
    """A `Progress` that keeps what it is told."""

    def __init__(self):
        self.what, self.told = [], []

    @contextlib.contextmanager
    def __call__(self, what):
        self.what.append(what)
        yield lambda done, of: self.told.append((done, of))


def test_it_is_shown_how_far_the_text_is_and_what_is_measured_is_the_same(base):
    plain, watched, shown = learner_of(base), learner_of(base), Shown()
    plain.calibrate()
    measured(watched, None, shown)
    found, wanted = shared(watched), shared(plain)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert len(shown.what) == 1
    # A token begins the texts, 47 are written one by one, and four batches are read: before each call it is told.
    assert [done for done, _ in shown.told] == [0, *range(2, 48), 48, 60, 72, 84, 96]
    assert {of for _, of in shown.told[1:]} == {96}
    assert not watched.model._forward_pre_hooks


def test_text_for_guards_is_shown_too(base):
    told = []
    with telling_of_text(base, lambda done, of: told.append((done, of)), lambda prompt: prompt + 10):
        ids = written_text(base, context=64, seed=0, length=10)
    assert torch.equal(ids, written_text(base, context=64, seed=0, length=10))
    assert told[1:] == [(done, 11) for done in range(2, 12)]


def test_it_is_measured_once_and_shown_only_then(base, tmp_path):
    first, second, shown = learner_of(base), learner_of(base), Shown()
    assert calibrated(first, None, tmp_path / "c", shown) == tmp_path / "c"
    count = len(shown.told)
    assert count
    assert calibrated(second, None, tmp_path / "c", shown) == tmp_path / "c"
    assert len(shown.told) == count
    found, wanted = shared(second), shared(first)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_where_the_file_cannot_be_written_it_is_said_and_goes_on(base, tmp_path):
    (tmp_path / "file").write_text("no folder")
    learner, plain, file = learner_of(base), learner_of(base), tmp_path / "file" / "c"
    plain.calibrate()
    with pytest.warns(RuntimeWarning, match="cannot be written .*; what is in it is measured again at the next start"):
        calibrated(learner, None, file)
    found, wanted = shared(learner), shared(plain)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        texts = calibration_file.held_back_once(learner.pool, file, lambda: torch.arange(16 * 40).view(16, 40) % 7)
    assert [text.shape for text in texts] == [(4, 32)] * 2


def damaged(file, how):
    data = bytearray(file.read_bytes())
    if how == "flipped":
        data[-40] ^= 1
    elif how == "cut":
        data = data[:-40]
    else:
        tensors = safetensors.torch.load(bytes(data))
        name = next(name for name in tensors if name.endswith(".basis"))
        with safetensors.safe_open(file, "pt") as held:
            metadata = held.metadata()
        tensors[name] = tensors[name] * torch.nan if how == "not finite" else tensors[name][:, :1].contiguous()
        data = safetensors.torch.save(tensors, metadata)
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["flipped", "cut", "not finite", "another shape"])
def test_a_damaged_file_is_refused_or_written_anew_and_never_used(base, tmp_path, monkeypatch, how):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = learner_of(base), learner_of(base)
    file = calibrated(first, None)
    damaged(file, how)
    before = {name: t.clone() for name, t in shared(second).items()}
    with pytest.raises(ValueError, match=r"damaged|cannot be read"):
        calibrated(second, None, file)
    assert all(torch.equal(t, before[name]) for name, t in shared(second).items())
    with pytest.warns(RuntimeWarning, match="it is a copy that was kept, and is written anew"):
        assert calibrated(second, None) == file
    found, wanted = shared(second), shared(first)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert calibrated(learner_of(base), None, file) == file
