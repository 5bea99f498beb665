import copy
import functools

import pytest
import torch
from tiny_models import assert_same, state_of
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
     ("all", list(range(8))), ("last:8", list(range(8))), ("last:.25", [6, 7])],
)  # fmt: skip
def test_layers(layers, wanted):
    assert adapted(target_modules=["down_proj"], layers=layers) == [f"layers.{i}.down_proj" for i in wanted]


@pytest.mark.parametrize(
    "layers",
    ["first", "last", "last:", "last:0", "last:0.0", "last:2.5", "last:1.01", "last:-1", "last:nan", "last:1e0",
     "last: 2", "last:1_0", "LAST:2", "", b"ab", [True], [0.5], None, 3],
)  # fmt: skip
def test_layers_that_name_no_blocks_are_refused(layers):
    with pytest.raises(ValueError, match=r'layers must be "all", "last:F" with a share F in .* indices, got'):
        ttt.TTTConfig(layers=layers)


def test_more_blocks_than_there_are_cannot_be_chosen():
    model = Model()
    before = list(model.modules())
    with pytest.raises(
        ValueError, match="'last:99' asks for more than there are: the model has 8 blocks in layers; last:8 is all"
    ):
        ttt.adapt_(model, ttt.TTTConfig(target_modules=["down_proj"], layers="last:99"))
    assert list(model.modules()) == before


@pytest.mark.parametrize(
    ("options", "filter_fn"),
    [({"target_modules": "all-linear"}, None), ({"target_modules": ["x"]}, None), ({}, lambda module, name: True)],
)
def test_a_bare_linear_layer_is_refused_by_name(options, filter_fn):
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"model must hold the linear layers .* it is one itself \(Linear\).*wrap it"):
        ttt.adapt_(model, ttt.TTTConfig(**options), filter_fn=filter_fn)
    assert model.weight.requires_grad
    assert not any(name.startswith("_ttt") for name in vars(model))


def test_wrong_types_are_refused_by_name(tmp_path):
    model = Model()
    config = ttt.TTTConfig(target_modules=["head"])
    for call, match in (
        (lambda: ttt.adapt_(None, config), "model must be a torch.nn.Module, got None"),
        (lambda: ttt.adapt_("x", config), "model must be a torch.nn.Module, got str 'x'"),
        (lambda: ttt.adapt_(model, {"lr": 1}), "config must be a ttt.TTTConfig or None, got dict"),
        (lambda: ttt.adapt_(model, ["head"]), "config must be a ttt.TTTConfig or None, got list"),
        (lambda: ttt.adapt_(model, config, "head"), "filter_fn must be a function of .* got str"),
        (lambda: ttt.restore_(3), "model must be a torch.nn.Module, got int 3"),
        (lambda: ttt.learning_layers(3), "model must be a torch.nn.Module, got int 3"),
        (lambda: ttt.fork("x"), "model must be a torch.nn.Module"),
        (lambda: ttt.memory_usage("x"), "model must be a torch.nn.Module"),
        (lambda: ttt.save("x", tmp_path / "x"), "model must be a torch.nn.Module"),
        (lambda: ttt.load("x", tmp_path / "x"), "model must be a torch.nn.Module"),
        (lambda: ttt.pool_of(3), "model must be a torch.nn.Module"),
        (lambda: ttt.capturable_(3, 8), "model must be a torch.nn.Module"),
        (lambda: ttt.learning("x").__enter__(), "model must be a torch.nn.Module, got str 'x'"),
        (lambda: ttt.export_peft(3, tmp_path / "x"), "source must be a model or a user's state"),
        (lambda: ttt.export_peft({1: 2}, tmp_path / "x"), "a name in source must be a string, got int 1"),
        (lambda: ttt.export_peft({"0.a": 2, "0.b": 3}, tmp_path / "x"), "0.a must be a dense tensor"),
        (lambda: ttt.export_peft({}, None), "folder must be a path"),
        (lambda: ttt.import_peft(None), "folder must be a path .*, got None"),
    ):
        with pytest.raises(TypeError, match=match):
            call()
    assert list(tmp_path.iterdir()) == []
    ttt.adapt_(model, config)
    before = state_of(model)
    for call, match in (
        (lambda: ttt.restore_(model, "yes"), "keep_learned must be True or False, got str 'yes'"),
        (lambda: ttt.save(model, None), "path must be a path .*, got None"),
        (lambda: ttt.save(model, 3), "path must be a path .*, got int 3"),
        (lambda: ttt.load(model, None), "path must be a path .*, got None"),
    ):
        with pytest.raises(TypeError, match=match):
            call()
    with pytest.raises(ValueError, match="path must be a path of at least one character, got ''"):
        ttt.save(model, "")
    assert_same(before, state_of(model))


@pytest.mark.parametrize("field", ["window", "replay_capacity"])
def test_sizes_that_cannot_be_held_are_refused_by_name(field):
    with pytest.raises(ValueError, match=rf"{field} must be a whole number in \[1, 16777216\], got 1000000000000"):
        ttt.TTTConfig(**{field: 10**12})
    for name in ("slots", "rank", "window"):
        with pytest.raises(ValueError, match=rf"{name} must be a whole number in \[1, 16777216\], got 1000000000000"):
            ttt.LowRank(**{name: 10**12})
    with pytest.raises(ValueError, match=r"LayerGenerativeReplay.rank must be a whole number in"):
        ttt.LayerGenerativeReplay(rank=10**12)


def test_too_little_memory_names_what_takes_it(monkeypatch):
    model = Model()
    before = list(model.modules())

    def full(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(ttt.nn.Linear, "_build", full)
    with pytest.raises(MemoryError, match="too little memory for the state of layer head with window = 64, replay_cap"):
        ttt.adapt_(model, ttt.TTTConfig(target_modules=["head"]))
    monkeypatch.undo()
    assert list(model.modules()) == before


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("per_user", [None, ttt.LowRank(slots=1)])
def test_a_weight_that_is_not_finite_is_refused_by_name(value, per_user):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[1, 2] = value
        model[2].weight.fill_(3e38)  # finite, and its sum is not
    config = ttt.TTTConfig(target_modules=["0", "2"], per_user=per_user)
    before, kinds = [p.clone() for p in model.parameters()], [type(each) for each in model]
    with pytest.raises(ValueError, match=r"1.weight must be finite to learn, but 1 of its 6 numbers are NaN or inf"):
        ttt.adapt_(model, ttt.TTTConfig(target_modules=["0", "1"], per_user=per_user))
    assert [type(each) for each in model] == kinds
    for p, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, kept) or not kept.isfinite().all()
        assert p.requires_grad
    ttt.adapt_(model, config)  # what does not learn may hold anything
