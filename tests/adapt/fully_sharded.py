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
    same_everywhere,
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


def compares(one, two, texts, bound=1e-9, **options):
    """Let ``two`` read this process's of the ``texts``, and ``one`` all of them in one batch: what differs."""
    rank = dist.get_rank()
    masks = [{k: v[r] for k, v in options.items() if type(v) is list} for r in (0, 1)]
    alike = {k: v for k, v in options.items() if type(v) is not list}
    every = {k: torch.cat(v) for k, v in options.items() if type(v) is list}
    wanted = one.observe(torch.cat(texts), **every, **alike)
    got = two.observe(texts[rank], **masks[rank], **alike)
    rows = slice(rank * len(texts[0]), (rank + 1) * len(texts[0]))
    found = [] if (got.learned, got.rejected) == (wanted.learned, wanted.rejected) else ["chunks"]
    error = float((wanted.nll[rows] - got.nll).abs().max())
    found += [] if error <= 1e-6 else [f"nll by {error:.2g}"]
    return found + differences(layers_of(one), layers_of(two), bound)


def own_texts(mesh, folder):
    """Each process reads texts of its own; all learn what one process would learn from all of them in a batch."""
    found, replay = [], ttt.LayerReplay()
    for options in ({}, {"protect": [ttt.MAS(strength=0.1), replay]}, {"protect": [ttt.SI()], "feedback": 0.5}):
        one, two = two_learners(mesh, data_parallel=True, **options)
        for batch, length in ((2, 30), (1, 9), (3, 41)):
            found += compares(one, two, [ids_of(batch, length), ids_of(batch, length)])
        texts, taught = [ids_of(2, 30), ids_of(2, 30)], [torch.ones(2, 30, dtype=torch.bool) for _ in range(2)]
        taught[0][0, :7] = taught[1][1, 5:9] = False
        taught[1][:, 8:] = False  # of the last chunks one process alone learns
        found += compares(one, two, texts, learn_mask=taught, passes=2, emphasis=3.0)
        padding = [torch.ones(2, 30, dtype=torch.bool) for _ in range(2)]
        padding[1][0, :6] = False
        found += compares(one, two, texts, attention_mask=padding)
        for learner in (one, two):
            learner.consolidate()
        found += compares(one, two, [ids_of(1, 12), ids_of(1, 12)])
        outputs = [x.generate(ids_of(2, 9) * 0 + 5, max_new_tokens=4, learn_prompt=False) for x in (one, two)]
        found += [] if torch.equal(outputs[0].sequences, outputs[1].sequences) else ["generated text"]
    return found


def own_texts_guarded(mesh, folder):
    """The guard measures in all processes what it would in one, and decides the same."""
    torch.manual_seed(2)
    held_back, texts, both = ids_of(2, 20), [ids_of(2, 60), ids_of(2, 60)], []
    for data_parallel in (False, True):
        model = sharded(model_of(), mesh) if data_parallel else model_of()
        guard = ttt.Guard([held_back], every=32, threshold=1e-4)
        ttt.adapt_(model, ttt.TTTConfig(**LEARN | {"lr": 5.0}))
        both.append(learner_of(model, guard=guard, data_parallel=data_parallel))
    found = compares(*both, texts)
    assert both[0].guard.rollbacks
    seen = [(x.guard.tokens, x.guard.strength, x.guard.rollbacks) for x in both]
    return found + ([] if seen[0] == seen[1] else [f"guard: {seen}"])


def own_losses(mesh, folder):
    """`ttt.learning` from inputs of each process, of which one has more than the other."""
    one, two = two_learners(mesh, data_parallel=True)
    found, rank = [], dist.get_rank()
    for batches in ((2, 2), (3, 1)):
        texts = [ids_of(batch, 12) for batch in batches]
        with ttt.learning(one.model):
            loss_of(one.model, torch.cat(texts)).backward()
        with ttt.learning(two.model, data_parallel=True):
            loss_of(two.model, texts[rank]).backward()
        found += differences(layers_of(one), layers_of(two))
    kept = kept_of(two)

    def learn(data_parallel, scale=1.0):
        with ttt.learning(two.model, data_parallel=data_parallel):
            (scale * loss_of(two.model, texts[0])).backward()

    errors = {
        "in one alone": (error_of(lambda: learn(rank == 1)), "data_parallel must be the same in all processes"),
        "not finite": (error_of(lambda: learn(True, torch.inf if rank else 1.0)), "is not finite; nothing was learnt"),
    }
    found += [f"{name}: {error}" for name, (error, wanted) in errors.items() if wanted not in error]
    return found + changed(two, kept)


def own_texts_refused(mesh, folder):
    """What processes that read texts of their own are refused, and that nothing changes."""
    _, two = two_learners(mesh, data_parallel=True)
    rank, ids = dist.get_rank(), ids_of(2, 20)
    own = error_of(lambda: two.calibrate([ids * rank]))
    two.observe(ids)
    kept = kept_of(two)
    plain = ttt.adapt_(model_of(), two.config)
    errors = {
        "shapes": (lambda: two.observe(ids[: 1 + rank]), "the shape of input_ids and options must be the same in all"),
        "passes": (lambda: two.observe(ids, passes=1 + rank), "the shape of input_ids and options must be the same"),
        "generate": (lambda: two.generate(ids, max_new_tokens=2), "learn_prompt and learn_output must be False where"),
        "one alone": (
            lambda: ttt.Learner(two.model, data_parallel=rank == 1),
            "context, guard and data_parallel must be",
        ),
        "one process": (lambda: ttt.Learner(plain, data_parallel=True), "data_parallel must be False for a model that"),
        "learning": (lambda: learn_alone(plain), "data_parallel must be False for a model that FSDP2 does not shard"),
        "type": (lambda: ttt.Learner(two.model, data_parallel=1), "data_parallel must be True or False, got int 1"),
        "too": (lambda: ttt.Learner(tensor_parallel(mesh), data_parallel=True), "data_parallel must be False for a"),
    }
    found = [] if "each of batches must be the same in all processes" in own else [f"calibrate: {own}"]
    for name, (action, wanted) in errors.items():
        error = error_of(action)
        found += [] if wanted in error else [f"{name}: {error}"]
    norm = two.model.model.norm
    handle = norm.register_forward_hook(lambda _, args, y: y * torch.inf if rank else y)
    output = two.observe(ids)
    handle.remove()
    found += [] if (output.learned, output.rejected) == (0, 3) else ["a loss that is not finite in one"]
    return found + changed(two, kept)


def learn_alone(model):
    with ttt.learning(model, data_parallel=True):
        pass


def tensor_parallel(mesh):
    model = model_of()
    for block in model.model.layers:
        parallelize_module(block, mesh, {"mlp.up_proj": ColwiseParallel()})
    return ttt.adapt_(model, ttt.TTTConfig(**LEARN))


def users_of(mesh, first="adapt", **options):
    """Learners with users: of a whole model, and of a sharded copy."""
    one, config = model_of(), ttt.TTTConfig(**LEARN, per_user=ttt.LowRank(slots=2, rank=4, window=8))
    two = copy.deepcopy(one)
    two = sharded(ttt.adapt_(two, config), mesh) if first == "adapt" else ttt.adapt_(sharded(two, mesh), config)
    guards = [options.get("guard", lambda: None)() for _ in range(2)]
    both = [learner_of(m, guard=g) for m, g in zip((ttt.adapt_(one, config), two), guards, strict=True)]
    torch.manual_seed(1)
    known = [ids_of(4, 40), ids_of(2, 17)]
    for learner in both:
        learner.calibrate(known)
    return both


def states_differ(one, two, bound=1e-9):
    """Names of what users hold otherwise in ``two`` than in ``one``, or than in the other process."""
    found = [] if sorted(one.pool.users) == sorted(two.pool.users) else ["the users"]
    for user in two.pool.users:
        alone, state = one.pool.export(user), two.pool.export(user)
        if not same_everywhere(state):
            found.append(f"{user}: bits differ between processes")
        for layer in two.pool.layers:
            wanted, got = (s[f"{layer}.b"].T @ s[f"{layer}.a"] for s in (alone, state))  # rows have no sign
            error = float((wanted - got).abs().max()) if wanted.numel() else 0.0
            if not error <= bound * float(wanted.abs().max()):
                found.append(f"{user}: {layer} by {error:.2g} of {float(wanted.abs().max()):.2g}")
    return found


def users(mesh, folder):
    """Users learn in all processes what they would in one; an eviction and a return are the same in all."""
    found = []
    for first in ("adapt", "shard"):
        one, two = users_of(mesh, first)
        for names in (["a", "b"], ["b", None], ["c", "a"], ["a", "c"]):  # b and a are evicted, a comes back as new
            ids = ids_of(2, 30)
            wanted, got = (learner.observe(ids, users=names) for learner in (one, two))
            error = float((wanted.nll - got.nll).abs().max())
            found += [] if error <= 1e-6 and got.learned == wanted.learned > 0 else [f"{names}: nll by {error:.2g}"]
            found += states_differ(one, two)
        state = two.pool.export("a")
        two.pool.forget("a")
        two.pool.load("a", state)
        found += states_differ(one, two)
        ids = ids_of(2, 9)
        with torch.no_grad():
            outputs = []
            for learner in (one, two):
                with ttt.users(learner.model, ["a", None]):
                    outputs.append(learner.model.generate(ids, max_new_tokens=4, do_sample=False))
        found += [] if torch.equal(*outputs) else ["generated text"]
        base = whole(model_of())
        back = whole(ttt.restore_(two.model))
        found += [k for k, t in base.items() if not torch.equal(t, back[k])]
    return found


def users_guarded(mesh, folder):
    """A guard for each user rolls back in all processes what it would in one."""
    torch.manual_seed(2)
    held_back = ids_of(2, 20)
    one, two = users_of(mesh, guard=lambda: ttt.Guard([held_back], every=16, threshold=1e-5))
    found = []
    for _ in range(2):
        ids = ids_of(2, 60)
        wanted, got = (learner.observe(ids, users=["a", "b"], emphasis=50.0) for learner in (one, two))
        found += [] if got.rolled_back_users == wanted.rolled_back_users else ["rollbacks"]
        found += states_differ(one, two)
    assert one.user_guards.history
    return found + ([] if any(check.rolled_back for check in one.user_guards.history) else ["nothing was rolled back"])


def users_refused(mesh, folder):
    """What is refused in all processes, and that no user's state changes."""
    _, two = users_of(mesh)
    rank, ids = dist.get_rank(), ids_of(2, 20)
    two.observe(ids, users=["a", "b"])
    kept = {user: two.pool.export(user) for user in two.pool.users}
    model, norm = two.model, two.model.model.norm
    errors = {
        "users": (lambda: two.observe(ids, users=["a", "b" if rank else None]), "must be the same in all processes"),
        "text": (lambda: two.observe(ids + rank - 1, users=["a", "b"]), "must be the same in all processes"),
        "in steps": (lambda: two.observe_in_steps(ids, users=["a", "b"]), "Learner.observe_in_steps does not work"),
        "episodes": (lambda: ttt.Learner(model, episodes=ttt.EpisodeLog()), "ttt.Learner(episodes=...) does not work"),
        "own texts": (lambda: ttt.Learner(model, data_parallel=True), "data_parallel must be False for a model whose"),
    }
    found = []
    for name, (action, wanted) in errors.items():
        error = error_of(action)
        found += [] if wanted in error else [f"{name}: {error}"]
    handle = norm.register_forward_hook(lambda _, args, y: y * (1.0 + rank))  # other gradients in one of them
    error = error_of(lambda: two.observe(ids, users=["a", "b"]))
    handle.remove()
    found += [] if "must learn from the same tokens, to the bit" in error else [f"other gradients: {error}"]
    after = {user: two.pool.export(user) for user in two.pool.users}
    for user, state in kept.items():
        found += [f"{user}: {name}" for name, t in state.items() if not torch.equal(t, after[user][name])]
    return found


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


CHECKS = {
    check.__name__: check
    for check in (
        reading, own_text, guarded, any_loss, own_texts, own_texts_guarded, own_losses, own_texts_refused, users,
        users_guarded, users_refused, saving, unsupported,
    )
}  # fmt: skip


if __name__ == "__main__":
    meet(lambda mesh, folder, names: {name: CHECKS[name](mesh, folder) for name in names or CHECKS})
