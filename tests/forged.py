"""Small models with files of `ttt.save`, files with changed content, and what a refused call must leave as it was."""

import copy

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import ttt
from ttt.adapt.checkpoint import tensor_hash
from ttt.adapt.convert import learning_layers

SHARED = {"target_modules": "all-linear", "window": 5, "replay_capacity": 12, "lr": 0.02, "rate": "rms",
          "ewc_lambda": 0.01, "replay_rows": 4}  # fmt: skip
OPTIONS = {
    "rms, momentum, generated rows": {**SHARED, "orthogonal": 2, "momentum": 0.5, "generated_rows": 2,
                                      "generated_rank": 3},
    "mas in 8 bits": {**SHARED, "importance": "mas", "state_dtype": "8bit", "orthogonal": 2, "rate": "energy"},
    "soft": {**SHARED, "kronecker": 2, "rate": "decrease"},
    "si": {**SHARED, "importance": "si", "rate": "constant", "clip": None, "orthogonal": 0},
}  # fmt: skip


def plain():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def teach(model, times=1):
    for _ in range(times):
        with ttt.learning(model):
            model(torch.randn(3, 6)).square().sum().backward()


def content(path):
    """(tensors, metadata) of a file."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def forge(path, tensors, metadata):
    """Write a file whose checksum fits: what anyone can make who knows the format."""
    metadata = {**metadata, "tensors_sha256": tensor_hash(tensors)}
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    return path


class Case:
    """A model that was never adapted, a learnt copy of it, and the file of the latter."""

    def __init__(self, folder, options, consolidated=True):
        torch.manual_seed(3)
        self.pristine = plain()
        self.model = ttt.adapt_(copy.deepcopy(self.pristine), ttt.TTTConfig().with_flat(**options))
        teach(self.model, 4)
        if consolidated:
            ttt.Learner(self.model).consolidate()
            teach(self.model, 3)
        assert all(layer.pending for _, layer in learning_layers(self.model))
        self.path = folder / "good.safetensors"
        ttt.save(self.model, self.path)
        self.tensors, self.metadata = content(self.path)

    def targets(self):
        """A model that is adapted already, and one that is not."""
        return [copy.deepcopy(self.model), copy.deepcopy(self.pristine)]


def everything(model):
    """All that a refused call could have changed."""
    found = {}
    for name, module in model.named_modules():
        found[name] = (id(module), type(module), sorted(module.__dict__), getattr(module, "pending", None),
                       getattr(module, "config", None), module.training)  # fmt: skip
        for kind, held in (("p", module._parameters), ("b", module._buffers), ("base", getattr(module, "base", {}))):
            for key, t in held.items():
                found[f"{name}.{kind}.{key}"] = None if t is None else (
                    id(t), t.data_ptr(), t.requires_grad, t.dtype, t.detach().view(torch.uint8).tolist()
                )  # fmt: skip
    return found


def refused(case, path, match=None):
    for model in case.targets():
        before = everything(model)
        with pytest.raises(ValueError, match=match):
            ttt.load(model, path)
        assert everything(model) == before


def assert_finite(model):
    with torch.no_grad():
        assert model(torch.randn(4, 6)).isfinite().all()
    for name, layer in learning_layers(model):
        for key, t in layer.state().items():
            assert not t.is_floating_point() or t.isfinite().all(), (name, key)


def refused_or_sound(case, path):
    for model in case.targets():
        before = everything(model)
        try:
            ttt.load(model, path)
        except (ValueError, OSError):
            assert everything(model) == before
        else:
            assert_finite(model)
            assert all(layer.pending + 3 >= 5 for _, layer in learning_layers(model))  # the step makes a commit
            held = everything(model)
            try:
                teach(model)
            except FloatingPointError:  # the gradient of a quadratic loss with weights up to 1e12; nothing is learnt
                assert everything(model) == held
            assert_finite(model)
