"""What two processes find that read texts of their own (FSDP2); `test_data_parallel.py` starts them.

Both hold the whole model, too, and let it learn from all texts in one batch.
"""

import torch
import torch.distributed as dist
from fully_sharded import learner_of, loss_of, sharded, two_learners
from tiny_models import ids_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from two_processes import LEARN, changed, differences, error_of, kept_of, layers_of, meet, model_of

import ttt


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


def own_texts_on_two_dimensions(mesh, folder):
    """The same where parameters are sharded over one dimension of a mesh and replicated over the other."""
    found = []
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        one, two = two_learners(mesh, data_parallel=True)
        for _ in range(2):
            found += compares(one, two, [ids_of(2, 30), ids_of(2, 30)])
    return found


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
    errors = {
        "shapes": (lambda: two.observe(ids[: 1 + rank]), "the shape of input_ids and options must be the same in all"),
        "passes": (lambda: two.observe(ids, passes=1 + rank), "got others in one of them (passes)"),
        "two": (lambda: two.observe(ids, emphasis=1.0 + rank, learn=not rank), "in one of them (emphasis, learn)"),
        "generate": (lambda: two.generate(ids, max_new_tokens=2), "learn_prompt and learn_output must be False where"),
        "one alone": (
            lambda: ttt.Learner(two.model, data_parallel=rank == 1),
            "context, guard and data_parallel must be",
        ),
        "type": (lambda: ttt.Learner(two.model, data_parallel=1), "data_parallel must be True or False, got int 1"),
        "too": (lambda: ttt.Learner(tensor_parallel(mesh), data_parallel=True), "must be False where a layer that"),
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


def tensor_parallel(mesh):
    model = model_of()
    for block in model.model.layers:
        parallelize_module(block, mesh, {"mlp.up_proj": ColwiseParallel()})
    return ttt.adapt_(model, ttt.TTTConfig(**LEARN))


CHECKS = {
    check.__name__: check
    for check in (own_texts, own_texts_guarded, own_texts_on_two_dimensions, own_losses, own_texts_refused)
}


if __name__ == "__main__":
    meet(CHECKS)
