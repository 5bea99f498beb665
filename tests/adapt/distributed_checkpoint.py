"""What two processes find with torch.distributed.checkpoint; `test_distributed_checkpoint.py` starts them.

Checkpoints of one process are written by the first of them, without the group.
"""

import copy
import io
from pathlib import Path

import fully_sharded
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tensor_parallel import sharded
from tiny_models import ids_of
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from two_processes import DEFAULT, LEARN, error_of, layers_of, meet, model_of, whole

import ttt
from ttt.adapt.convert import learning_layers

CONFIG = ttt.TTTConfig(**LEARN | {"protect": [*DEFAULT, ttt.EWC(), ttt.LayerReplay()]})


def learnt(model, seed):
    """A learner of ``model``, adapted and with all kinds of state, and rows in the window."""
    if not learning_layers(model):
        ttt.adapt_(model, CONFIG)
    learner = ttt.Learner(model)
    torch.manual_seed(seed)
    learner.calibrate([ids_of(4, 40), ids_of(2, 17)])
    learner.observe(ids_of(2, 30))
    learner.consolidate()
    learner.observe(ids_of(2, 14))
    assert layers_of(learner)[0].pending
    return learner


def state_of(model):
    """All of the state of the whole model, in clones."""
    found = {}
    for name, layer in learning_layers(model):
        held = layer.state() | {f"base.{key}": t for key, t in layer.base.items()}
        parts = layer.gathered(layer.state()) | {f"base.{k}": t for k, t in layer.gathered(layer.base).items()}
        assert parts.keys() == held.keys()
        found |= {f"{name}: {key}": t.clone() for key, t in parts.items()}
    return found


def whole_of(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def unlike(model, wanted):
    """Names of the state of ``model`` that is not ``wanted``, to the bit."""
    found = state_of(model)
    return sorted(found.keys() ^ wanted.keys()) + [k for k, t in wanted.items() if not torch.equal(t, found[k])]


KINDS = {
    "whole": lambda mesh: model_of(),
    "tensor parallel": lambda mesh: sharded(model_of(), mesh),
    "fsdp": lambda mesh: fully_sharded.sharded(ttt.adapt_(model_of(), CONFIG), mesh),
}


def save(model, folder):
    dcp.save({"learnt": ttt.LearntState(model)}, checkpoint_id=folder)


def state(mesh, folder):
    """Learnt state, from each kind of model to each other: bit-equal to what `ttt.load` gives."""
    found, saved = [], {}
    for kind, make in KINDS.items():
        model = learnt(make(mesh), seed=len(kind)).model
        if kind == "whole":  # by one process alone
            if dist.get_rank() == 0:
                dcp.save({"learnt": ttt.LearntState(model)}, checkpoint_id=f"{folder}/{kind}", no_dist=True)
            dist.barrier()
        else:
            save(model, f"{folder}/{kind}")
        ttt.save(model, f"{folder}/{kind}.file{dist.get_rank() if kind == 'whole' else ''}")
        saved[kind] = state_of(model)
    dist.barrier()
    for kind in KINDS:
        for other, make in KINDS.items():
            model = make(mesh)
            if not learning_layers(model):
                ttt.adapt_(model, CONFIG)
            options = {"no_dist": True} if other == "whole" else {}
            dcp.load({"learnt": ttt.LearntState(model)}, checkpoint_id=f"{folder}/{kind}", **options)
            found += [f"{kind} to {other}: {name}" for name in unlike(model, saved[kind])]
            by_file = ttt.adapt_(model_of(), CONFIG)
            ttt.load(by_file, f"{folder}/{kind}.file{dist.get_rank() if kind == 'whole' else ''}")
            found += [f"file of {kind}: {name}" for name in unlike(by_file, state_of(model))]
    return found


def weights(mesh, folder):
    """Weights alone, by get_model_state_dict and set_model_state_dict: other base weights, as of the last commit."""
    found = []
    for kind, make in KINDS.items():
        learner = learnt(make(mesh), seed=20 + len(kind))
        learner.flush()
        wanted = whole(learner.model)
        dcp.save({"model": get_model_state_dict(learner.model)}, checkpoint_id=f"{folder}/{kind} weights")
        dist.barrier()
        for other, make_other in KINDS.items():
            model = learnt(make_other(mesh), seed=30).model
            held = {"model": get_model_state_dict(model)}
            dcp.load(held, checkpoint_id=f"{folder}/{kind} weights")
            set_model_state_dict(model, held["model"])
            got = whole(model)
            assert got.keys() == wanted.keys()
            found += [f"{kind} to {other}: {k}" for k, t in wanted.items() if not torch.equal(t, got[k])]
            for name, layer in learning_layers(model):
                if layer.pending or not torch.equal(layer.anchor, layer.weight) or bool(layer.trace.any()):
                    found.append(f"{kind} to {other}: {name} was not forgotten")
            plain = model_of()
            set_model_state_dict(
                plain, {k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in held["model"].items()}
            )
            found += [f"{kind} to plain: {k}" for k, t in wanted.items() if not torch.equal(t, plain.state_dict()[k])]
            ttt.restore_(model)
            found += [f"{other}, restored: {k}" for k, t in whole(model).items() if not torch.equal(t, wanted[k])]
    return found


def refused(mesh, folder):
    """What cannot be loaded is refused, and changes nothing."""
    model = learnt(sharded(model_of(), mesh), seed=3).model
    save(model, f"{folder}/learnt")
    before = state_of(model)
    errors = {
        "users": error_of(
            lambda: ttt.LearntState(ttt.adapt_(model_of(), ttt.TTTConfig(**LEARN, per_user=ttt.LowRank())))
        ),
        "not adapted": error_of(lambda: ttt.LearntState(model_of())),
        "no module": error_of(lambda: ttt.LearntState(3)),
        "other content": error_of(lambda: ttt.LearntState(model).load_state_dict({"weight": torch.zeros(3)})),
        "damaged": error_of(lambda: ttt.LearntState(model).load_state_dict({"safetensors": b"abc"})),
    }
    other = model_of()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1)
    other = ttt.adapt_(sharded(other, mesh), CONFIG)
    kept = state_of(other)
    errors["other base"] = error_of(
        lambda: dcp.load({"learnt": ttt.LearntState(other)}, checkpoint_id=f"{folder}/learnt")
    )
    return {"errors": errors, "unlike": unlike(model, before) + unlike(other, kept)}


def nothing_to_save(mesh, folder):
    """A state that cannot be saved, torn or not finite in one process: it never is, and another can be loaded."""
    found = []
    for kind, make in KINDS.items():
        good = learnt(make(mesh), seed=5).model
        wanted, at = state_of(good), f"{folder}/{kind} to keep"
        options = {"no_dist": True} if kind == "whole" else {}
        at += f"{dist.get_rank()}" * bool(options)  # each process its own
        dcp.save({"learnt": ttt.LearntState(good)}, checkpoint_id=at, **options)
        for ill in ("torn", "not finite"):
            model = make(mesh)
            learner = learnt(model, seed=6)
            layer = layers_of(learner)[1]
            if options or dist.get_rank() == 1:
                if ill == "torn":
                    layer.torn = "a write ended half-way"
                else:
                    layer.weight.fill_(torch.nan)
            entry = {"learnt": ttt.LearntState(model)}
            for path in (at, f"{folder}/{kind} {ill} {dist.get_rank()}" if options else f"{folder}/{kind} {ill}"):
                held = {f: f.read_bytes() for f in Path(path).glob("*")}
                try:
                    dcp.save(entry, checkpoint_id=path, **options)
                    found.append(f"{kind}, {ill}: saved")
                except dcp.api.CheckpointException as error:
                    reason = "belong together" if ill == "torn" else "weight must hold"
                    texts = " ".join(map(str, error.failures.values()))
                    found += [] if reason in texts or "refused in another" in texts else [f"{kind}, {ill}: {texts}"]
                if {f: f.read_bytes() for f in Path(path).glob("*")} != held:
                    found.append(f"{kind}, {ill}: files changed")
                if dist.is_initialized() and not options:
                    dist.barrier()
            copied = error_of(lambda e=entry: copy.deepcopy(e["learnt"].state_dict()))
            pickled = error_of(lambda e=entry: torch.save(e["learnt"].state_dict(), io.BytesIO()))
            found += [] if copied and pickled else [f"{kind}, {ill}: copied"]
            dcp.load(entry, checkpoint_id=at, **options)
            found += [f"{kind}, {ill}: {name}" for name in unlike(model, wanted)]
            found += [f"{kind}, {ill}: still torn"] if layer.torn else []
    return found


CHECKS = {check.__name__: check for check in (state, weights, refused, nothing_to_save)}


if __name__ == "__main__":
    meet(CHECKS)
