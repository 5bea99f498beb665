"""What two processes find that share a model by FSDP2, except its learning layers; `test_fully_sharded.py` starts them.

Both hold the whole model, too, and let it learn the same in one process.
"""

import copy

import torch
import torch.distributed as dist
from tiny_models import ids_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from two_processes import (
    DEFAULT,
    LEARN,
    changed,
    differences,
    error_of,
    goes_back_and_forth,
    kept_of,
    layers_of,
    meet,
    model_of,
    reads,
    whole,
)

import ttt
from ttt.adapt.convert import learning_layers
from ttt.rules import SequenceReplay


def sharded(model, mesh, **options):
    """``model``, of which FSDP2 shards all but the parameters of layers that learn, or are going to."""
    targets = LEARN["target_modules"]
    ignored = {p for name, m in model.named_modules() if name.endswith(tuple(targets)) for p in m.parameters()}
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, ignored_params=ignored, **options)
    return fully_shard(model, mesh=mesh, ignored_params=ignored, **options)


def learner_of(model, **options):
    """A learner that leaves the output head, sharded or not, to autograd."""
    learner = ttt.Learner(model, **options)
    learner.head.changed = "a sharded head is left to autograd"
    return learner


def two_learners(mesh, first="adapt", reshard=True, data_parallel=False, **options):
    """Learners of the same model: of the whole of it, and of a sharded copy, adapted before or after it is sharded."""
    one, config = model_of(), ttt.TTTConfig(**LEARN | options)
    two = copy.deepcopy(one)
    if first == "adapt":
        sharded(ttt.adapt_(two, config), mesh, reshard_after_forward=reshard)
    else:
        ttt.adapt_(sharded(two, mesh, reshard_after_forward=reshard), config)
    assert isinstance(two.lm_head.weight, DTensor)
    both = [learner_of(ttt.adapt_(one, config)), learner_of(two, data_parallel=data_parallel)]
    torch.manual_seed(1)
    known = [ids_of(4, 40), ids_of(2, 17)]
    for learner in both:
        learner.calibrate(known)
    return both


def reading(mesh, folder):
    """Learning, consolidating, going back, and generating."""
    found = []
    for first in ("adapt", "shard"):
        for reshard in (True, False):
            one, two = two_learners(mesh, first, reshard)
            found += goes_back_and_forth(one, two)
            for learner in (one, two):
                learner.reset()
            found += differences(layers_of(one), layers_of(two))
    return found


def own_text(mesh, folder):
    """Calibration on text that the model writes itself, which is the same in all processes."""
    config = ttt.TTTConfig(**LEARN)
    one, two = (learner_of(ttt.adapt_(model, config)) for model in (model_of(), sharded(model_of(), mesh)))
    for learner in (one, two):
        learner.calibrate()
    return differences(layers_of(one), layers_of(two)) + reads(one, two, ids_of(2, 30))


def guarded(mesh, folder):
    """A guard, which rolls back; its decisions are the same in all processes."""
    one, two = model_of(), sharded(model_of(), mesh)
    torch.manual_seed(2)
    held_back, text = ids_of(2, 20), ids_of(2, 60)
    both = []
    for model in (one, two):
        guard = ttt.Guard([held_back], every=32, threshold=1e-4)
        both.append(learner_of(ttt.adapt_(model, ttt.TTTConfig(**LEARN | {"lr": 5.0})), guard=guard))
    found = reads(*both, text)
    assert both[0].guard.rollbacks
    histories = [[(c.tokens, c.rolled_back) for c in learner.guard.history] for learner in both]
    return found + ([] if histories[0] == histories[1] else ["history of the guard"])


def loss_of(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def any_loss(mesh, folder):
    """`ttt.learning` beside an optimizer of a sharded parameter; batches that differ are refused and change nothing."""
    one, two = two_learners(mesh)
    found = []
    parameters = [learner.model.model.embed_tokens.weight for learner in (one, two)]
    for p in parameters:
        p.requires_grad_(True)
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in parameters]
    for _ in range(3):
        ids = ids_of(2, 12)
        for learner, optimizer in zip((one, two), optimizers, strict=True):
            optimizer.zero_grad()
            with ttt.learning(learner.model):
                loss_of(learner.model, ids).backward()
            optimizer.step()
        found += differences(layers_of(one), layers_of(two))
    if not torch.allclose(parameters[0], parameters[1].full_tensor(), rtol=1e-9, atol=1e-12):
        found.append("embeddings")
    kept = kept_of(two)

    def learn(ids):
        with ttt.learning(two.model):
            loss_of(two.model, ids).backward()

    own = ids_of(2, 12)
    own[0, 3] = 7 + dist.get_rank()
    error = error_of(lambda: learn(own))
    found += [] if "must learn from the same tokens, to the bit" in error else [f"own batches: {error}"]
    norm = two.model.model.norm
    handle = norm.register_forward_hook(lambda _, args, y: y * torch.inf if dist.get_rank() else y)
    error = error_of(lambda: learn(ids_of(2, 12)))
    handle.remove()
    found += [] if "one of them computed something that is not finite" in error else [f"not finite in one: {error}"]
    return found + changed(two, kept)


def saving(mesh, folder):
    """Files of one process are read in two, and the other way round; ``restore_`` puts the weights back."""
    one, two = two_learners(mesh, protect=[*DEFAULT, ttt.EWC(), ttt.LayerReplay()])
    base = whole(two.model)
    found = reads(one, two, ids_of(2, 30))
    for learner in (one, two):
        learner.consolidate()
    found += reads(one, two, ids_of(2, 13))
    error = error_of(lambda: ttt.save(two.model, f"{folder}/none/file"))
    wanted = ("FileNotFoundError: ", "OSError: ")[dist.get_rank()]
    found += [] if error.startswith(wanted) else [f"save where there is no folder: {error}"]
    ttt.save(two.model, f"{folder}/two")
    dist.barrier()
    saved = kept_of(two)
    alone = ttt.load(model_of(), f"{folder}/two")
    again = ttt.load(sharded(model_of(), mesh), f"{folder}/two")
    adapted = ttt.load(sharded(ttt.adapt_(model_of(), two.config), mesh), f"{folder}/two")
    for model in (alone, again, adapted):
        for (_, layer), state in zip(learning_layers(model), saved, strict=True):
            found += [f"{n} of {layer.name}" for n, t in layer.state().items() if not torch.equal(t, state[n])]
    ids = ids_of(2, 21)
    found += reads(learner_of(alone), learner_of(again), ids)
    if dist.get_rank() == 0:
        ttt.save(one.model, f"{folder}/one")
    dist.barrier()
    ttt.load(two.model, f"{folder}/one")
    found += differences(layers_of(one), layers_of(two), bound=1e-15)
    two.model(ids)  # sharded parameters are whole for a while
    back = whole(ttt.restore_(two.model))
    return found + [k for k, t in base.items() if not torch.equal(t, back[k])]


def sharded_too_late(mesh):
    """The errors of learners that were made before their model was sharded; they have learnt nothing."""
    ids, config = torch.full((1, 20), 3), ttt.TTTConfig(**LEARN)
    users = ttt.TTTConfig(**LEARN, per_user=ttt.LowRank(slots=2))
    by_fsdp, by_head, with_users = (ttt.Learner(ttt.adapt_(model_of(), c)) for c in (config, config, users))
    kept = [kept_of(by_fsdp), kept_of(by_head)]
    sharded(by_fsdp.model, mesh)
    parallelize_module(by_head.model, mesh, {"lm_head": ColwiseParallel()})
    sharded(with_users.model, mesh)
    errors = {
        "FSDP2 too late": error_of(lambda: by_fsdp.observe(ids)),
        "FSDP2 too late, reset": error_of(by_fsdp.reset),
        "tensor parallel too late": error_of(lambda: by_head.observe(ids)),
        "FSDP2 too late, users": error_of(lambda: with_users.observe(ids, users=["a"])),
    }
    assert not changed(by_fsdp, kept[0]) + changed(by_head, kept[1])
    assert not with_users.pool.users
    assert ttt.Learner(by_fsdp.model).observe(ids).learned == 3
    return errors


def unsupported(mesh, folder):
    """The errors of what is not supported, and whether nothing was changed."""
    model, errors = model_of(), {}
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    before, modules = whole(model), dict(model.named_modules())
    for name, options in (("adapt sharded", {}), ("adapt sharded, users", {"per_user": ttt.LowRank(slots=2)})):
        errors[name] = error_of(lambda options=options: ttt.adapt_(model, ttt.TTTConfig(**LEARN, **options)))
    errors["load sharded"] = error_of(lambda: ttt.load(model, f"{folder}/two"))
    after = whole(model)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, after[k]) for k, t in before.items())
    _, learner = two_learners(mesh)
    learner.observe(ids_of(1, 20) * 0 + 3)
    kept, model, mine = kept_of(learner), learner.model, torch.full((1, 9), 4 + dist.get_rank())
    errors |= {
        "fork": error_of(lambda: ttt.fork(model)),
        "peft": error_of(lambda: ttt.adapt.export_peft(model, f"{folder}/peft{dist.get_rank()}", base_model="m")),
        "capturable": error_of(lambda: ttt.capturable_(model, 4)),
        "rules": error_of(lambda: ttt.Learner(model, rules=[SequenceReplay(8)])),
        "episodes": error_of(lambda: ttt.Learner(model, episodes=ttt.EpisodeLog())),
        "growing": error_of(lambda: ttt.GrowingLearner(learner)),
        "tasks": error_of(lambda: ttt.rules.Trainer(model)),
        **sharded_too_late(mesh),
        "other text": error_of(lambda: learner.observe(mine)),
        "other prompt": error_of(lambda: learner.generate(mine, max_new_tokens=2)),
    }
    return {"errors": errors, "changed": changed(learner, kept)}


CHECKS = {check.__name__: check for check in (reading, own_text, guarded, any_loss, saving, unsupported)}


if __name__ == "__main__":
    meet(CHECKS)
