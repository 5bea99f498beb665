"""What two processes find that share a model when one of them alone fails; `test_one_fails.py` starts them."""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from fully_sharded import loss_of
from fully_sharded import sharded as fully_sharded
from tensor_parallel import sharded
from tiny_models import VOCAB, ids_of
from two_processes import DEFAULT, LEARN, changed, error_of, kept_of, layers_of, meet, model_of, whole

import ttt
from ttt.rules import SequenceReplay

CONFIG = ttt.TTTConfig(**LEARN | {"protect": [*DEFAULT, ttt.LayerReplay()]})
KINDS = {"tensor parallel": sharded, "fsdp": fully_sharded}


def ids():
    return torch.arange(1, 25).view(2, 12)


def failing(after=1):
    """Batches, of which the last cannot be made in the second process."""
    yield from [ids()] * after
    if dist.get_rank() == 1:
        raise OSError("no more data")
    yield ids()


class Torn:
    """The layers of the second process are torn inside."""

    def __init__(self, learner):
        self.layers = layers_of(learner)

    def __enter__(self):
        self.layers[1].torn = "a write ended half-way" * dist.get_rank()

    def __exit__(self, *exc):
        self.layers[1].torn = ""


def cases(learner, fresh, folder):
    """What is called, by name: each raises in the second process by itself."""
    second, model = dist.get_rank() == 1, learner.model

    def torn(action):
        with Torn(learner):
            action()

    def training():
        model.train(second)
        try:
            learner.observe(ids())
        finally:
            model.eval()

    def not_finite():
        with ttt.learning(model):
            loss_of(model, ids()).backward()
            layer = layers_of(learner)[0]
            x = torch.full((1, layer.in_features), torch.nan if second else 1.0, dtype=torch.float64)
            layer.sink.append((x, torch.ones(1, layer.out_features, dtype=torch.float64)))

    def state_not_finite():
        moments, kept = layers_of(learner)[1].moments, layers_of(learner)[1].moments.clone()
        if second:
            moments.fill_(torch.nan)
        try:
            ttt.save(model, f"{folder}/not_finite")
        finally:
            moments.copy_(kept)

    def training_at(action):
        fresh.model.train(second)
        try:
            action()
        finally:
            fresh.model.eval()

    def learning():
        with ttt.learning(model):
            loss_of(model, ids()).backward()

    def no_temporary_folder():
        kept = tempfile.tempdir
        tempfile.tempdir = f"{folder}/none" if second else kept
        try:
            state.load_state_dict(content)
        finally:
            tempfile.tempdir = kept

    def made(**options):
        """Makes a learner of a model in training mode, in which an error leaves it."""
        model = fresh.unlearnt.train()
        try:
            ttt.Learner(model, **options)
        finally:
            assert all(module.training for module in model.modules())

    def guard(**options):
        return ttt.Guard([ids()], **options)

    def check():
        count = len(learner.guard.history)
        try:
            torn(learner.guard.check)
        finally:
            assert len(learner.guard.history) == count

    state, snapshot, other_snapshot = ttt.LearntState(model), learner.snapshot(), fresh.snapshot()
    content = state.state_dict()
    other_snapshot.layers.pop()
    good, own = f"{folder}/good", f"{folder}/own{dist.get_rank()}"
    return {
        "observe: a token outside of the vocabulary": lambda: learner.observe(ids() + VOCAB * second),
        "observe: no tensor": lambda: learner.observe("text" if second else ids()),
        "observe: passes": lambda: learner.observe(ids(), passes=0 if second else 1),
        "observe: torn": lambda: torn(lambda: learner.observe(ids())),
        "observe: training": training,
        "generate: no tokens": lambda: learner.generate(ids(), max_new_tokens=0 if second else 1),
        "generate: too many tokens": lambda: learner.generate(ids(), max_new_tokens=10**6 if second else 1),
        "generate: a mask": lambda: learner.generate(
            ids(), max_new_tokens=2, attention_mask=torch.arange(12).expand(2, 12) < 12 - second
        ),
        "calibrate: a batch": lambda: fresh.calibrate([ids(), ids() + VOCAB * second]),
        "calibrate: no more data": lambda: fresh.calibrate(failing()),
        "calibrate: fewer batches": lambda: fresh.calibrate([ids()] * (2 - second)),
        "calibrate: no more data, with a loss": lambda: fresh.calibrate(failing(), loss=loss_of),
        "calibrate: training": lambda: training_at(lambda: fresh.calibrate([ids()])),
        "calibrate: a loss": lambda: fresh.calibrate([ids()], loss=3 if second else loss_of),
        "calibrate: batches": lambda: fresh.calibrate(3 if second else [ids()]),
        "calibrate: some without a loss": lambda: fresh.calibrate([ids()], loss=None if second else loss_of),
        "calibrate: some without batches": lambda: fresh.calibrate(None if second else [ids()]),
        "rollback: no snapshot": lambda: learner.rollback(3 if second else snapshot),
        "rollback: another model's": lambda: learner.rollback(other_snapshot if second else snapshot),
        "reset: training": lambda: training_at(fresh.reset),
        "snapshot: torn": lambda: torn(learner.snapshot),
        "learning: torn": lambda: torn(learning),
        "load_state_dict: other content": lambda: state.load_state_dict({"a": 1} if second else content),
        "load_state_dict: no temporary folder": no_temporary_folder,
        "consolidate: torn": lambda: torn(learner.consolidate),
        "flush: torn": lambda: torn(learner.flush),
        "restore_: torn": lambda: torn(lambda: ttt.restore_(model, keep_learned=True)),
        "learning: not finite": not_finite,
        "save: no path": lambda: ttt.save(model, 3 if second else f"{folder}/never"),
        "save: torn": lambda: torn(lambda: ttt.save(model, f"{folder}/never")),
        "save: not finite": state_not_finite,
        "check: torn": check,
        "Learner: context": lambda: made(context=1 if second else 64),
        "Learner: guard": lambda: made(guard=3 if second else guard()),
        "Learner: episodes": lambda: made(episodes=3 if second else None),
        "Learner: rules": lambda: made(rules=[SequenceReplay(8)] * second),
        "Learner: held-back text": lambda: made(guard=ttt.Guard([ids() + VOCAB * second])),
        "Learner: a guard of another": lambda: made(guard=learner.guard if second else guard()),
        "Learner: not adapted": lambda: ttt.Learner(fresh.not_adapted if second else fresh.unlearnt),
        "Learner: another context": lambda: made(context=64 + second),
        "Learner: some without a guard": lambda: made(guard=None if second else guard()),
        "Learner: another guard": lambda: made(guard=guard(threshold=0.02 if second else 0.01)),
        "load: no file": lambda: ttt.load(model, f"{folder}/none" if second else good),
        "load: damaged": lambda: ttt.load(model, own),
        "load: another file": lambda: ttt.load(model, f"{folder}/other" if second else good),
        "load: not adapted": lambda: ttt.load(fresh.not_adapted, f"{folder}/none" if second else good),
        "load: not adapted, damaged": lambda: ttt.load(fresh.not_adapted, own),
    }


def try_all(kind, mesh, folder):
    """Name of the case -> its error in this process; and what was changed."""
    shard = KINDS[kind]

    def learner_of(seed):
        model = shard(model_of(), mesh)
        guard = ttt.Guard([ids()], every=None) if seed == 1 else None
        learner = ttt.Learner(ttt.adapt_(model, CONFIG), guard=guard)
        if seed:
            torch.manual_seed(seed)
            learner.calibrate([ids_of(3, 20)])
            learner.observe(ids_of(2, 30))
        return learner

    folder = f"{folder}/{kind}"
    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    learner, fresh = learner_of(1), learner_of(0)
    fresh.not_adapted, fresh.unlearnt = (shard(model_of(), mesh) for _ in range(2))
    ttt.adapt_(fresh.unlearnt, CONFIG)
    ttt.save(learner.model, f"{folder}/good")
    ttt.save(learner_of(2).model, f"{folder}/other")
    content = bytearray(Path(f"{folder}/good").read_bytes())
    content[-5] ^= dist.get_rank()
    Path(f"{folder}/own{dist.get_rank()}").write_bytes(content)
    kept, fresh_kept, base = kept_of(learner), kept_of(fresh), whole(fresh.not_adapted)
    found, errors = [], {}
    for name, action in cases(learner, fresh, folder).items():
        print(name, file=sys.stderr, flush=True)  # the last one is what the processes wait for
        errors[name] = error_of(action)
        found += [f"{name}: {each}" for each in changed(learner, kept) + changed(fresh, fresh_kept)]
        after = whole(fresh.not_adapted)
        found += [f"{name}: {k}" for k in after.keys() ^ base.keys()]
        found += [f"{name}: {k}" for k, t in base.items() if not torch.equal(t, after[k])]
        found += [f"{name}: file"] if Path(f"{folder}/never").exists() else []
    output = learner.observe(ids())  # it works afterwards
    assert output.learned == 2
    return {"errors": errors, "changed": found}


if __name__ == "__main__":
    meet(lambda mesh, folder, names: {kind: try_all(kind, mesh, folder) for kind in KINDS}, seconds=120)
