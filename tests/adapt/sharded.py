"""What two processes find when they adapt models whose weights are sharded; `test_sharded.py` starts them."""

import torch
import torch.distributed as dist
from helpers import plain_config
from tiny_models import ids_of, tiny
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from two_processes import meet

import ttt
from ttt.adapt.convert import learning_layers


def tensor_parallel(model, mesh):
    plan = {"mlp.up_proj": ColwiseParallel(), "mlp.gate_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for block in model.model.layers:
        parallelize_module(block, mesh, plan)


def fsdp2(model, mesh):
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(model):
    return {k: t.full_tensor() if isinstance(t, DTensor) else t.clone() for k, t in model.state_dict().items()}


def refused(action):
    """The error of ``action``, as text."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def adapting(shard, mesh, users):
    """Adapt a sharded model: the error, and whether modules and weights are as before."""
    torch.manual_seed(0)
    model = tiny(layers=2)
    shard(model, mesh)
    before, modules = whole(model), dict(model.named_modules())
    flags = [p.requires_grad for p in model.parameters()]
    config = plain_config(target_modules=["down_proj"], per_user=users)
    error = refused(lambda: ttt.adapt_(model, config))
    after = whole(model)
    unchanged = dict(model.named_modules()) == modules and all(torch.equal(t, after[k]) for k, t in before.items())
    return error, unchanged and flags == [p.requires_grad for p in model.parameters()]


def learning(shard, mesh, users):
    """Shard an adapted model: the errors of all that learns, and whether nothing was learnt."""
    torch.manual_seed(0)
    model = tiny(layers=2)
    ttt.adapt_(model, plain_config(target_modules=["down_proj"], lr=0.02, per_user=users))
    shard(model, mesh)
    errors = [refused(lambda: ttt.Learner(model))]
    if users is None:
        errors += [refused(lambda: ttt.learning(model).__enter__()), refused(lambda: ttt.save(model, "never"))]
        errors += [refused(lambda: ttt.fork(model))]
    return errors, all(layer.pending == 0 for _, layer in learning_layers(model))


def beside(mesh):
    """Layers that learn beside sharded ones hold whole weights: what they learn, on each process."""
    torch.manual_seed(0)
    model = tiny(layers=2)
    alone = ttt.Learner(ttt.adapt_(tiny_copy(model), plain_config(target_modules=["o_proj"], lr=0.02, chunk=8)))
    tensor_parallel(model, mesh)
    learner = ttt.Learner(ttt.adapt_(model, plain_config(target_modules=["o_proj"], lr=0.02, chunk=8)))
    torch.manual_seed(1)
    ids = ids_of(2, 30)
    found, wanted = (each.observe(ids).nll for each in (learner, alone))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    others = [None, None]
    dist.all_gather_object(others, {n: layer.effective_weight() for n, layer in learning_layers(model)})
    return all(torch.equal(t, others[1][name]) for name, t in others[0].items())


def tiny_copy(model):
    other = tiny(layers=2)
    other.load_state_dict(model.state_dict())
    return other


def find(mesh, folder, names):
    found = {}
    for shard in (tensor_parallel, fsdp2):
        for users in (None, ttt.LowRank(slots=2)):
            name = f"{shard.__name__} {'one' if users is None else 'users'}"
            found[name] = [adapting(shard, mesh, users), learning(shard, mesh, users)]
    return {**found, "beside": beside(mesh)}


if __name__ == "__main__":
    meet(find)
