"""What two processes find that share the layers of models (tensor parallelism); `test_tensor_parallel.py` starts them.

Both hold the whole model, too, and let it learn the same in one process: in float64 the two must agree to rounding.
"""

import copy

import torch
import torch.distributed as dist
from tiny_models import ids_of, tiny
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from two_processes import (
    DEFAULT,
    LEARN,
    differences,
    error_of,
    goes_back_and_forth,
    layers_of,
    meet,
    model_of,
    reads,
    whole,
)

import ttt
from ttt.adapt.convert import learning_layers
from ttt.learn import protection
from ttt.nn import Capturing
from ttt.rules import SequenceReplay

PLAN = {"mlp.up_proj": ColwiseParallel(), "mlp.gate_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}


def sharded(model, mesh):
    """A copy of ``model`` whose MLPs are spread over the processes."""
    model = copy.deepcopy(model)
    for block in model.model.layers:
        parallelize_module(block, mesh, PLAN)
    return model


# -- bare layers --------------------------------------------------------------------------------------------------

CONFIGS = {
    "default": {},
    "plain": {"protect": [], "rate": "constant", "clip": 0.5, "lr": 0.01},
    "energy": {"protect": [], "rate": "energy", "lr": 0.1},
    "rms": {"rate": "rms", "lr": 0.02, "burst": 0.6},
    "power": {"protect": [ttt.KroneckerFisher(directions=3, power=0.5, damping=0.1)], "momentum": 0.5},
    "ewc": {"protect": [ttt.EWC(strength=0.1, trace_decay=0.99, trace_every=2), ttt.Decay(0.1)]},
    "si": {"protect": [ttt.SI(strength=0.1)]},
    "mas": {"protect": [ttt.MAS(strength=0.1)]},
    "replay": {"protect": [ttt.LayerReplay(rows=4, strength=0.5), ttt.EWC(strength=0.1)], "momentum": 0.5},
    "distillation": {"protect": [ttt.LayerDistillation(rows=3)]},
    "generated": {"protect": [ttt.LayerGenerativeReplay(rows=3, rank=4)]},
    "orthogonal": {"protect": [ttt.OrthogonalUpdates(directions=3), ttt.LayerReplay(rows=4)]},
    "float32": {"dtype": torch.float32},
}


def step(layer, x, gradient, squares=False):
    """One step from inputs ``x`` and output ``gradient``: the outputs, and the gradient at the inputs."""
    sides = layer.sharding
    part = sides.input.part(x).clone().requires_grad_(True)
    with Capturing([layer]) as capturing:
        y = layer(part)
        (y * sides.output.part(gradient)).sum().backward(retain_graph=squares)
        captured, traced = capturing.renew()[0], None
        if squares:
            y.square().sum().backward()
            traced = capturing.renew()[0]
    update = layer.update_from(captured, traced)
    layer.learn(update)
    return sides.output.gather(y.detach()), sides.input.gather(part.grad)


def calibration(layer, batches, kind):
    sides = layer.sharding

    def losses():
        for x, gradient in batches:
            y = layer(sides.input.part(x))
            yield (y * sides.output.part(gradient)).sum() if kind != "mas" else y.square().sum()

    protection.calibrate([layer], losses(), kind)


def bare(mesh, name):
    """A layer of odd sizes, row- and column-parallel, through calibration, steps of all lengths, and consolidation."""
    options = {"lr": 0.5, "window": 6, "replay_capacity": 8, **CONFIGS[name]}
    dtype = options.pop("dtype", torch.float64)
    config, found = ttt.TTTConfig(**options), []
    kind = "mas" if config.importance == "mas" and config.ewc_lambda else "fisher"
    bound = 1e-9 if dtype == torch.float64 else 1e-4
    for style in (RowwiseParallel(), ColwiseParallel()):
        torch.manual_seed(len(name))
        model = nn.Sequential(nn.Linear(13, 9, dtype=dtype))
        with torch.no_grad():
            model[0].weight.mul_(3)
        shared = parallelize_module(copy.deepcopy(model), mesh, {"0": style})
        alone, layer = (ttt.adapt_(m, config, filter_fn=lambda *_: True)[0] for m in (model, shared))
        before = layer.weight.clone()
        assert layer.weight.shape != alone.weight.shape
        rows = lambda t: (torch.randn(t, 13, dtype=dtype), torch.randn(t, 9, dtype=dtype))  # noqa: E731
        batches = [rows(20), rows(11)]
        for each in (alone, layer):
            calibration(each, batches, kind)
        where = f"{name}, {type(style).__name__}"
        found += [f"{where}, calibrated: {d}" for d in differences([alone], [layer], bound)]
        for part in range(2):
            for tokens in (1, 2, 3, 9, 1, 40, 4):
                x, gradient = rows(tokens)
                got, wanted = (step(each, x, gradient, kind == "mas") for each in (layer, alone))
                for what, a, b in zip(("output", "input gradient"), got, wanted, strict=True):
                    if not torch.allclose(a, b, rtol=bound, atol=bound * 10):
                        found.append(f"{where}: {what} by {(a - b).abs().max():.2g}")
            found += [f"{where}, part {part}: {d}" for d in differences([alone], [layer], bound)]
            for each in (alone, layer):
                protection.consolidate([each])
            found += [f"{where}, consolidated {part}: {d}" for d in differences([alone], [layer], bound)]
        assert (layer.weight - before).norm() > 1e-3 * before.norm(), where
    return found


# -- language models ----------------------------------------------------------------------------------------------


def two_learners(mesh, **options):
    """Learners of the same model: of the whole of it, and of a sharded copy."""
    model = model_of()
    config = ttt.TTTConfig(**LEARN | options)
    both = [ttt.Learner(ttt.adapt_(m, config)) for m in (copy.deepcopy(model), sharded(model, mesh))]
    torch.manual_seed(1)
    known = [ids_of(4, 40), ids_of(2, 17)]  # fewer tokens than features would leave nothing to learn
    for learner in both:
        learner.calibrate(known)
    return both


def language_model(mesh, folder):
    """The default configuration: learning, consolidating, going back, and generating."""
    one, two = two_learners(mesh)
    found = goes_back_and_forth(one, two)
    before = two.snapshot()
    torch.manual_seed(100 + torch.distributed.get_rank())  # the processes draw otherwise, but write one text
    drawn = two.generate(ids_of(2, 9) * 0 + 5, max_new_tokens=12, do_sample=True, learn_output=True, learn_prompt=False)
    two.access.require_same("the drawn text", drawn.sequences)
    two.rollback(before)
    torch.manual_seed(7)
    for learner in (one, two):
        with ttt.learning(learner.model):
            logits = learner.model(input_ids=torch.arange(1, 25).view(2, 12)).logits
            nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(24), reduction="sum").backward()
    found += differences(layers_of(one), layers_of(two))
    for learner in (one, two):
        learner.reset()
    return found + differences(layers_of(one), layers_of(two))


def guarded(mesh, folder):
    """A guard, which rolls back; its decisions are the same in all processes."""
    model, found = model_of(), []
    torch.manual_seed(2)
    held_back, text = ids_of(2, 20), ids_of(2, 60)
    both = []
    for m in (copy.deepcopy(model), sharded(model, mesh)):
        guard = ttt.Guard([held_back], every=32, threshold=1e-4)
        both.append(ttt.Learner(ttt.adapt_(m, ttt.TTTConfig(**LEARN | {"lr": 5.0})), guard=guard))
    found += reads(*both, text)
    histories = [[(c.tokens, c.rolled_back) for c in learner.guard.history] for learner in both]
    assert both[0].guard.rollbacks
    return found + ([] if histories[0] == histories[1] else ["history of the guard"])


def auto(mesh, folder):
    """transformers' ``tp_plan="auto"``, with biases, and every kind of layer that learns."""
    torch.manual_seed(3)
    model = tiny("qwen2", layers=2).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    if dist.get_rank() == 0:
        model.save_pretrained(f"{folder}/qwen2")
    dist.barrier()
    model, loaded = (
        AutoModelForCausalLM.from_pretrained(f"{folder}/qwen2", dtype=torch.float64, **options).eval()
        for options in ({}, {"tp_plan": "auto"})
    )
    before, modules = whole(loaded), dict(loaded.named_modules())
    error = error_of(lambda: ttt.adapt_(loaded, ttt.TTTConfig(**LEARN | {"target_modules": ["lm_head", "o_proj"]})))
    assert "lm_head has a forward pass wrapped by ColwiseParallel with layouts" in error, error
    assert dict(loaded.named_modules()) == modules
    assert all(torch.equal(t, before[k]) for k, t in whole(loaded).items())
    config = ttt.TTTConfig(**LEARN | {"target_modules": "all-linear", "layers": "last:1"})
    one, two = (ttt.Learner(ttt.adapt_(m, config)) for m in (model, loaded))
    kinds = {("row" if la.sharding.input.shared else "column") for la in layers_of(two) if la.sharding}
    assert kinds == {"row", "column"}
    assert len(layers_of(two)) == 7
    torch.manual_seed(4)
    known = [ids_of(4, 40)]
    for learner in (one, two):
        learner.calibrate(known)
    found = differences(layers_of(one), layers_of(two))
    # A sharded head has its gradient from autograd, and a whole one from `ttt.learn.head`, both in float32.
    found += reads(one, two, ids_of(2, 30), bound=1e-5)
    two.model.save_pretrained(f"{folder}/learnt")
    dist.barrier()
    again = AutoModelForCausalLM.from_pretrained(f"{folder}/learnt", dtype=torch.float64)
    learnt, wanted = again.state_dict(), one.model.state_dict()
    return found + [k for k, t in wanted.items() if not torch.allclose(learnt[k], t, rtol=1e-6, atol=1e-7)]


def saving(mesh, folder):
    """Files of either world size are read by the other; state_dict holds whole weights; ``restore_`` puts them back."""
    one, two = two_learners(mesh, protect=[*DEFAULT, ttt.EWC(), ttt.LayerReplay()])
    found = reads(one, two, ids_of(2, 30))
    for learner in (one, two):
        learner.consolidate()
    found += reads(one, two, ids_of(2, 13))
    ttt.save(two.model, f"{folder}/two")
    if dist.get_rank() == 0:
        ttt.save(one.model, f"{folder}/one")
    dist.barrier()
    alone, shared = (ttt.load(m, f"{folder}/two") for m in (model_of(), sharded(model_of(), mesh)))
    for (_, a), (_, b), c in zip(learning_layers(alone), learning_layers(shared), layers_of(two), strict=True):
        saved, *read = (
            layer.gathered(layer.state()) | {f"base.{k}": t for k, t in layer.gathered(layer.base).items()}
            for layer in (c, a, b)
        )
        for each in read:
            assert each.keys() == saved.keys()
            found += [f"{k} of {a.name} after load" for k, t in saved.items() if not torch.equal(t, each[k])]
    text = ids_of(2, 21)
    found += reads(ttt.Learner(alone), ttt.Learner(shared), text)
    ttt.load(two.model, f"{folder}/one")
    found += differences(layers_of(one), layers_of(two), bound=1e-15)
    # state_dict and restore_
    full = whole(two.model)
    found += [k for k, t in one.model.state_dict().items() if not torch.allclose(full[k], t, rtol=1e-9, atol=1e-12)]
    one.model.load_state_dict(other := {k: t + 1 for k, t in full.items()})
    spread = {k: t + 1 for k, t in two.model.state_dict().items()}
    learn = {k: other[k] for k in spread if "down_proj" in k}  # layers that learn take whole tensors, too
    two.model.load_state_dict(spread | learn)
    found += differences(layers_of(one), layers_of(two))
    found += [k for k, t in whole(two.model).items() if not torch.equal(t, other[k])]
    ttt.restore_(two.model)
    found += [k for k, t in whole(two.model).items() if not torch.equal(t, other[k])]
    sizes = [two.model.model.layers[0].mlp.down_proj.weight.to_local().shape[1]]
    return found + ([] if sizes == [24] else [f"restored part {sizes}"])


# -- what is refused ----------------------------------------------------------------------------------------------


def layouts(mesh, folder):
    """Inputs and outputs that torch's ``parallelize_module`` spreads in other ways: over tokens, or not at all."""
    found = []
    for style, spread in (
        (ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()), "input"),
        (RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)), "output"),
    ):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(13, 9).double())
        shared = parallelize_module(copy.deepcopy(model), mesh, {"0": style})
        config = ttt.TTTConfig(protect=[], window=6)
        one, two = (ttt.adapt_(m, config, filter_fn=lambda *_: True) for m in (model, shared))
        for _ in range(3):
            x, gradient = torch.randn(8, 13).double(), torch.randn(8, 9).double()
            rows = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
            outputs = []
            for m in (one, two):
                cut = m is two
                given = (x[rows] if cut and spread == "input" else x).clone().requires_grad_(True)
                with ttt.learning(m):
                    y = m(given)
                    wanted = gradient[rows] if cut and spread == "output" else gradient
                    (y * wanted).sum().backward()
                outputs.append((y, given.grad))
            for k, other in enumerate(("input", "output")):
                whole_ = outputs[0][1 - k]
                part = whole_[rows] if spread == other else whole_
                if not torch.allclose(outputs[1][1 - k], part, rtol=1e-9, atol=1e-9):
                    found.append(f"{type(style).__name__}: {other}")
        found += differences([one[0]], [two[0]])
    return found


def converted(mesh, folder):
    """Other dtypes: a model that is converted after it was adapted, and put back."""
    found = []
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        one, two = two_learners(mesh)
        before = whole(two.model)
        for learner in (one, two):
            learner.model.to(dtype)
        torch.manual_seed(6)
        ids = ids_of(2, 30)
        wanted, got = (learner.observe(ids) for learner in (one, two))
        error = float((wanted.nll - got.nll).abs().max())
        found += [] if got.learned == 4 and error <= bound else [f"{dtype}: nll by {error:.2g}"]
        for a, b in zip(layers_of(one), layers_of(two), strict=True):
            whole_, alone = b.sharding.gather(b.effective_weight()).double(), a.effective_weight().double()
            change = (alone - before[f"{a.name}.weight"]).norm()
            if not (whole_ - alone).norm() <= bound * change.clamp_min(1e-30):
                found.append(f"{dtype}: {a.name} by {(whole_ - alone).norm() / change:.2g}")
        found += differences(layers_of(one), layers_of(two), bound=1e300)  # of bits between processes only
        ttt.restore_(two.model)
        back = whole(two.model)
        found += [k for k, t in before.items() if back[k].dtype != dtype or not torch.equal(back[k], t.to(dtype))]
    return found


def unsupported(mesh, folder):
    """The errors of what is not supported, and whether nothing was changed."""
    model = sharded(model_of(), mesh)
    before = whole(model)
    config = ttt.TTTConfig(**LEARN)
    errors = {
        "users": error_of(lambda: ttt.adapt_(model, ttt.TTTConfig(**LEARN, per_user=ttt.LowRank(slots=2)))),
        "8bit": error_of(lambda: ttt.adapt_(model, ttt.TTTConfig(**LEARN, protect=[ttt.EWC()], state_dtype="8bit"))),
    }
    other = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    for k, placement in enumerate((Replicate(), Shard(0))):
        held = torch.distributed.tensor.distribute_tensor(other[k].weight, mesh, [placement])
        other[k].weight = nn.Parameter(held)
    every = {"filter_fn": lambda *_: True}
    errors["replicated"] = error_of(lambda: ttt.adapt_(other, ttt.TTTConfig(protect=[]), **every))
    other = nn.Sequential(nn.Linear(8, 1))
    parallelize_module(other, mesh, {"0": ColwiseParallel()})
    errors["empty part"] = error_of(lambda: ttt.adapt_(other, ttt.TTTConfig(protect=[]), **every))
    assert all(torch.equal(t, before[k]) for k, t in whole(model).items())
    learner = ttt.Learner(ttt.adapt_(model, config))
    learner.observe(ids_of(1, 20) * 0 + 3)
    kept = [{k: t.clone() for k, t in layer.state().items()} for layer in learner.layers]
    mine = torch.full((1, 9), 4 + dist.get_rank())
    errors |= {
        "fork": error_of(lambda: ttt.fork(model)),
        "peft": error_of(lambda: ttt.adapt.export_peft(model, f"{folder}/peft{dist.get_rank()}", base_model="m")),
        "capturable": error_of(lambda: ttt.capturable_(model, 4)),
        "rules": error_of(lambda: ttt.Learner(model, rules=[SequenceReplay(8)])),
        "episodes": error_of(lambda: ttt.Learner(model, episodes=ttt.EpisodeLog())),
        "experts": error_of(lambda: ttt.GrowingLearner(learner)),
        "other text": error_of(lambda: learner.observe(mine)),
        "other mask": error_of(
            lambda: learner.observe(mine * 0 + 4, learn_mask=torch.arange(9).view(1, 9) > dist.get_rank())
        ),
        "other prompt": error_of(lambda: learner.generate(mine, max_new_tokens=2)),
        "no folder": error_of(lambda: ttt.save(model, f"{folder}/none/file")),
    }
    unchanged = [torch.equal(t, layer.state()[k]) for layer, state in zip(learner.layers, kept, strict=True)
                 for k, t in state.items()]  # fmt: skip
    return {"errors": errors, "unchanged": all(unchanged)}


def infinite(mesh, folder):
    """A loss that is not finite in one process alone is learnt by none."""
    _, two = two_learners(mesh)
    kept = [{k: t.clone() for k, t in layer.state().items()} for layer in two.layers]
    norm = two.model.model.norm
    if dist.get_rank() == 1:
        norm.register_forward_hook(lambda _, args, y: y * torch.inf)
    output = two.observe(ids_of(1, 8) * 0 + 7)
    found = [] if (output.learned, output.rejected) == (0, 1) else [f"learnt {output.learned}"]
    return found + [k for layer, state in zip(two.layers, kept, strict=True) for k, t in state.items()
                    if not torch.equal(t, layer.state()[k])]  # fmt: skip


CHECKS = {
    check.__name__: check
    for check in (language_model, guarded, auto, saving, layouts, converted, unsupported, infinite)
}


def find(mesh, folder, names):
    return {
        name: CHECKS[name](mesh, folder) if name in CHECKS else bare(mesh, name)
        for name in names or [*CONFIGS, *CHECKS]
    }


if __name__ == "__main__":
    meet(find, torchrun=True)
