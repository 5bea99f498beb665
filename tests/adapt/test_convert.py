import pytest
import torch
from torch import nn

import ttt
from ttt.adapt.convert import learning_layers


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
