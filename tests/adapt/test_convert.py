import copy
import functools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import ttt
from ttt.adapt import convert
from ttt.adapt.convert import learning_layers
from ttt.per_user.pool import has_pool


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)


class Model(nn.Module):
    def __init__(self, blocks=8):
        super().__init__()
        self.embed = nn.Embedding(16, 4)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(4, 16, bias=False)


def adapted(**options):
    model = ttt.adapt_(Model(), ttt.TTTConfig(**options))
    return [name for name, _ in learning_layers(model)]


def test_targets_are_chosen_as_in_peft():
    every = [f"layers.{i}.down_proj" for i in range(8)]
    assert adapted(target_modules=["down_proj"]) == every
    assert adapted(target_modules=["layers.3.down_proj", "head"]) == ["layers.3.down_proj", "head"]
    assert adapted(target_modules=r"layers\.[01]\..*") == [
        f"layers.{i}.{p}_proj" for i in (0, 1) for p in ("up", "down")
    ]
    assert len(adapted(target_modules="all-linear")) == 17


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [("last:0.25", [6, 7]), ("last:0.3", [5, 6, 7]), ("last:1", [7]), ("last:1.0", list(range(8))), ([0, -1], [0, 7]),
     ("all", list(range(8))), ("last:99", list(range(8)))],
)  # fmt: skip
def test_layers(layers, wanted):
    assert adapted(target_modules=["down_proj"], layers=layers) == [f"layers.{i}.down_proj" for i in wanted]


def test_the_model_itself_is_returned():
    model = Model()
    assert ttt.adapt_(model, ttt.TTTConfig(target_modules=["head"])) is model
    assert ttt.restore_(model) is model


def test_filter_fn():
    model = ttt.adapt_(Model(), filter_fn=lambda module, name: module.out_features == 16)
    assert [name for name, _ in learning_layers(model)] == ["head"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["down_prj"]}, "nearest names are .*down_proj"),
        ({"target_modules": None}, "target_modules must name the layers"),
        ({"target_modules": ["down_proj"], "layers": "first:2"}, 'layers must be "all"'),
        ({"target_modules": ["down_proj"], "layers": "last:x"}, 'layers must be "all"'),
        ({"target_modules": ["down_proj"], "layers": [8]}, r"layers holds 8; the model has 8 blocks"),
        ({"target_modules": ["head"], "layers": "last:1"}, "needs numbered modules"),
        ({"target_modules": ["embed"]}, "embed is torch.nn.modules.sparse.Embedding"),
        ({"target_modules": ["down_proj"], "layers": ["first"]}, 'layers must be "all".* got .*first'),
        ({"target_modules": ["down_proj"], "layers": [1.5]}, 'layers must be "all".* got .*1.5'),
        ({"target_modules": ["down_proj"], "layers": [True]}, 'layers must be "all".* got .*True'),
        ({"target_modules": [5]}, "target_modules must be a string, a list of strings or None, got .*5"),
        ({"target_modules": "("}, r"target_modules = '\(' is no regular expression"),
    ],
)
def test_refusals_name_what_is_wrong_and_change_nothing(options, message):
    model = Model()
    before = [(n, id(m)) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        ttt.adapt_(model, ttt.TTTConfig(**options))
    assert [(n, id(m)) for n, m in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_tied_weights_and_experts_are_refused_by_name():
    model = Model()
    model.head.weight = model.embed.weight
    with pytest.raises(ValueError, match=r"head\.weight is tied to \['embed\.weight'\]"):
        ttt.adapt_(model, ttt.TTTConfig(target_modules=["head"]))

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 16))

    model = nn.ModuleDict({"experts": Experts(), "router": nn.Linear(8, 4)})
    with pytest.raises(ValueError, match=r"experts holds 3-D expert parameters"):
        ttt.adapt_(model, ttt.TTTConfig(target_modules=["experts"]))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj is a stack of experts of shape \(4, 8, 16\)"):
        ttt.adapt_(model, ttt.TTTConfig(target_modules=["gate_up_proj"]))


def test_unfit_types_are_refused():
    class Quantized(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"is .*Quantized; only"):
        ttt.adapt_(nn.Sequential(Quantized(3, 3)), ttt.TTTConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="meta device"):
        ttt.adapt_(nn.Sequential(nn.Linear(3, 3, device="meta")), ttt.TTTConfig(target_modules=["0"]))
    model = ttt.adapt_(Model(), ttt.TTTConfig(target_modules=["head"]))
    with pytest.raises(ValueError, match="adapted already"):
        ttt.adapt_(model, ttt.TTTConfig(target_modules=["head"]))
    with pytest.raises(ValueError, match="is not adapted"):
        ttt.restore_(Model())
    with pytest.raises(ValueError, match="no learning layer"):
        ttt.Learner(Model())


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("keep_learned", [False, True])
def test_restore(keep_learned, consolidated):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].bias.requires_grad_(False)
    originals = list(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    ttt.adapt_(model, ttt.TTTConfig(target_modules="all-linear", lr=0.1, window=4))
    assert not any(p.requires_grad for p in model.parameters())
    for _ in range(3):
        with ttt.learning(model):
            model(torch.randn(3, 6)).square().sum().backward()
        if consolidated:
            ttt.Learner(model).consolidate()
    x = torch.randn(5, 6)
    with torch.no_grad():
        learned = model(x)
    ttt.restore_(model, keep_learned=keep_learned)
    assert list(model) == originals
    assert [p.requires_grad for p in model.parameters()] == flags
    same = [torch.equal(v, before[k]) for k, v in model.state_dict().items() if k.endswith("weight")]
    if keep_learned:
        assert not any(same)
        # The last flush replays and pulls, so only the window's rows are alike to rounding.
        assert float((model(x) - learned).detach().norm() / learned.norm()) < 0.05
    else:
        assert all(same)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Mixed(nn.Module):
    """Layers of both kinds, in training, some parameters of which are frozen."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Linear(6, 8), Conv1D(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.first.bias.requires_grad_(False)
        self.blocks[0].down_proj.weight.requires_grad_(False)
        self.blocks[1].eval()
        self.name = "mixed"


def parts(model):
    """All that `adapt_` could leave changed: modules, parameters, flags, attributes, and every bit."""
    found = {n: (id(m), m.training, list(m._modules), sorted(m.__dict__)) for n, m in model.named_modules()}
    return found | {n: (id(p), p.data_ptr(), p.requires_grad, p.tolist()) for n, p in model.named_parameters()}


def failing(function, at, error):
    """``function``, which raises ``error`` in its call number ``at``."""
    calls = []

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise error
        return function(*args, **kwargs)

    wrapped.calls = calls
    return wrapped


@pytest.mark.parametrize("users", [None, ttt.LowRank(slots=2, rank=2, window=4)])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory left"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("where", "at"),
    [("torch.zeros", 1), ("torch.zeros", 40), ("_set_module", 1), ("_set_module", 4), ("train", 3), ("attach", 1)],
)
def test_adapting_that_fails_half_way_leaves_the_model_as_it_was(users, error, where, at, monkeypatch):
    if where == "attach" and users is None:
        users = ttt.LowRank(slots=1, rank=1, window=1)  # only models for users have a pool
    model = Mixed()
    config = ttt.TTTConfig(target_modules="all-linear", per_user=users)
    before = parts(model)
    with monkeypatch.context() as patch:
        kind = ttt.nn.Linear if users is None else ttt.nn.LowRankLinear
        owner = {"torch.zeros": torch, "train": kind}.get(where, convert)  # a layer makes several tensors of zeros
        name = where.rpartition(".")[2]
        fails = failing(getattr(owner, name), at, error)
        patch.setattr(owner, name, fails)
        with pytest.raises(type(error)):
            ttt.adapt_(model, config)
    assert len(fails.calls) >= at
    assert parts(model) == before
    assert not has_pool(model)
    ttt.adapt_(model, config)  # nothing stands in the way of another try
    ttt.restore_(model)
    assert parts(model) == before


def test_layers_taken_out_are_marked_as_released():
    for users in (None, ttt.LowRank(slots=2, rank=2, window=4)):
        model = ttt.adapt_(Mixed(), ttt.TTTConfig(target_modules="all-linear", per_user=users))
        layers = [m for m in model.modules() if isinstance(m, (ttt.nn.Linear, ttt.nn.LowRankLinear))]
        assert len(layers) == 6
        assert not any(layer.released for layer in layers)
        other = copy.deepcopy(model)
        ttt.restore_(model)
        assert all(layer.released for layer in layers)
        assert not any(getattr(m, "released", False) for m in other.modules())
