"""A call that is refused changes nothing: no bit, no module, no hook, no flag, and no user."""

import copy
import dataclasses
import hashlib

import pytest
import torch
from tiny_models import TARGETS, ids_of, tiny
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import ttt
from ttt.nn.base import Adapted
from ttt.rules import SequenceReplay

CACHES = {"_binding", "_largest_step", "_tried"}  # what is computed from the rest, when it is first needed
OPTIONS = {"target_modules": TARGETS["llama"], "layers": "last:2", "lr": 0.05, "chunk": 8, "window": 16}
USERS = ttt.LowRank(slots=2, rank=2, window=8)


def config(**options):
    return ttt.TTTConfig(**{**OPTIONS, **options})


def mixture():
    common = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**common, **heads)).eval()


def plain():
    model = tiny()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    return model, None


def odd():
    """A model in which most layers cannot learn, each for another reason."""
    names = ("good", "tied", "twin", "nan", "cut", "whole", "numbers", "wide")
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    model["tied"].weight = model["twin"].weight
    model["nan"].weight.data[1, 2] = torch.nan
    model["cut"].weight = nn.Parameter(model["whole"].weight.data.view(-1)[4:12].view(2, 4))
    model["meta"], model["lstm"], model["embedding"] = nn.Linear(4, 4, device="meta"), nn.LSTM(4, 4), nn.Embedding(3, 4)
    model["numbers"].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    model["wide"].weight = nn.Parameter(torch.randn(4, 4).T)
    return model, None


def shared():
    """One set of weights, which has learnt."""
    model = ttt.adapt_(tiny(), config())
    learner = ttt.Learner(model, episodes=ttt.EpisodeLog())
    learner.observe(ids_of(2, 30))
    return model, learner


def apart():
    """A model of which two parts were adapted, each in a call of its own."""
    model = tiny()
    for block in model.model.layers[:2]:
        ttt.adapt_(block, config(target_modules=["q_proj"], layers="all"))
    return model, None


def users():
    model = ttt.adapt_(tiny(), config(per_user=USERS))
    learner = ttt.Learner(model)
    learner.observe(ids_of(2, 30), users=["a", "b"])
    return model, learner


def experts():
    model = ttt.adapt_(mixture(), config(target_modules=["experts"]))
    learner = ttt.Learner(model)
    learner.observe(ids_of(2, 30))
    return model, learner


def learn(model, loss):
    with ttt.learning(model):
        loss(model(ids_of(2, 9), use_cache=False).logits).backward()


def name_users(model, named, ids):
    with ttt.users(model, named):
        model(ids)


def half(model):
    """What a user has learnt, without one of its tensors."""
    return {key: t for key, t in ttt.pool_of(model).export("a").items() if not key.endswith("2.mlp.down_proj.b")}


IDS = torch.arange(1, 21).view(2, 10)
CALLS = {
    "adapt: no layer": (plain, lambda m, x, f: ttt.adapt_(m, config(target_modules=["nothing"]))),
    "adapt: one entry of two": (plain, lambda m, x, f: ttt.adapt_(m, config(target_modules=["down_proj", "upproj"]))),
    "adapt: no blocks": (plain, lambda m, x, f: ttt.adapt_(m, config(layers={"tower": 2}))),
    "adapt: filter raises": (plain, lambda m, x, f: ttt.adapt_(m, filter_fn=lambda module, name: 1 / 0)),
    "adapt: no configuration": (plain, lambda m, x, f: ttt.adapt_(m)),
    "adapt: memory": (plain, lambda m, x, f: ttt.adapt_(m, config(window=2**50))),
    **{
        f"adapt: {name}": (
            odd,
            lambda m, x, f, name=name: ttt.adapt_(m, config(target_modules=["good", name], layers=None)),
        )
        for name in ("nan", "tied", "cut", "meta", "lstm", "embedding", "numbers", "wide")
    },
    "restore: not adapted": (plain, lambda m, x, f: ttt.restore_(m)),
    "learner: not adapted": (plain, lambda m, x, f: ttt.Learner(m)),
    "learning: not adapted": (plain, lambda m, x, f: learn(m, torch.sum)),
    "load: no file": (plain, lambda m, x, f: ttt.load(m, f / "none")),
    "load: of another model": (plain, lambda m, x, f: ttt.load(m, f / "other")),
    "load: cut off": (plain, lambda m, x, f: ttt.load(m, f / "cut")),
    "adapt: twice": (shared, lambda m, x, f: ttt.adapt_(m, config())),
    "adapt: a part of it": (shared, lambda m, x, f: ttt.adapt_(m.model, config(target_modules=["q_proj"]))),
    "adapt: what holds it": (shared, lambda m, x, f: ttt.adapt_(nn.Sequential(m), config(target_modules=["q_proj"]))),
    "learner: parts adapted apart": (apart, lambda m, x, f: ttt.Learner(m)),
    "learning: parts adapted apart": (apart, lambda m, x, f: learn(m, torch.sum)),
    "load: cut off, adapted": (shared, lambda m, x, f: ttt.load(m, f / "cut")),
    "load: of another model, adapted": (shared, lambda m, x, f: ttt.load(m, f / "other")),
    "save: no folder": (shared, lambda m, x, f: ttt.save(m, f / "none" / "file")),
    "restore: inside of learning": (shared, lambda m, x, f: learn(m, lambda logits: ttt.restore_(m))),
    "learning: raises": (shared, lambda m, x, f: learn(m, lambda logits: 1 / 0)),
    "learning: not finite": (shared, lambda m, x, f: learn(m, lambda logits: logits.sum() * torch.inf)),
    "learner: context": (shared, lambda m, x, f: ttt.Learner(m, context=1)),
    "learner: rules": (shared, lambda m, x, f: ttt.Learner(m, rules=[3])),
    "learner: guard": (shared, lambda m, x, f: ttt.Learner(m, guard=ttt.Guard([IDS + 99]))),
    "learner: in processes": (shared, lambda m, x, f: ttt.Learner(m, data_parallel=True)),
    "observe: floats": (shared, lambda m, x, f: x.observe(IDS.float())),
    "observe: vocabulary": (shared, lambda m, x, f: x.observe(IDS + 99)),
    "observe: mask": (shared, lambda m, x, f: x.observe(IDS, learn_mask=torch.ones(2, 3, dtype=torch.bool))),
    "observe: users": (shared, lambda m, x, f: x.observe(IDS, users=["a", "b"])),
    "observe: passes": (shared, lambda m, x, f: x.observe(IDS, passes=0)),
    "calibrate: after learning": (shared, lambda m, x, f: x.calibrate([IDS])),
    "calibrate: no batches": (shared, lambda m, x, f: x.calibrate([])),
    "generate: too long": (shared, lambda m, x, f: x.generate(IDS, max_new_tokens=10**6)),
    "rollback: no snapshot": (shared, lambda m, x, f: x.rollback(3)),
    "rollback: of experts": (shared, lambda m, x, f: x.rollback(experts()[1].snapshot())),
    "study: no step": (shared, lambda m, x, f: x.study(lr=-1.0)),
    "study: passes": (shared, lambda m, x, f: x.study(passes=0)),
    "capturable: rows": (shared, lambda m, x, f: ttt.capturable_(m, 0)),
    "graphed: with a log": (shared, lambda m, x, f: ttt.GraphedLearner(x, graph=False)),
    "growing: with a log": (shared, lambda m, x, f: ttt.GrowingLearner(x)),
    "peft: folder in use": (shared, lambda m, x, f: ttt.export_peft(m, f, base_model="x")),
    "pool: none": (shared, lambda m, x, f: ttt.pool_of(m)),
    "to: complex": (shared, lambda m, x, f: m.model.layers[-1].mlp.down_proj.to(torch.complex64)),
    "version: of a user": (shared, lambda m, x, f: ttt.version(m, "a")),
    "users: of one set": (shared, lambda m, x, f: name_users(m, ["a", "b"], IDS)),
    "users: another number": (users, lambda m, x, f: name_users(m, ["b"], IDS)),
    "users: no strings": (users, lambda m, x, f: name_users(m, [1, 2], IDS)),
    "users: too many": (users, lambda m, x, f: name_users(m, ["a", "b", "c"], ids_of(3, 9))),
    "users: no more slots": (users, lambda m, x, f: x.observe(ids_of(3, 9), users=["c", "d", "e"])),
    "users: observe without": (users, lambda m, x, f: x.observe(IDS)),
    "users: generate": (users, lambda m, x, f: x.generate(IDS, max_new_tokens=2)),
    "users: save": (users, lambda m, x, f: ttt.save(m, f / "x")),
    "users: learning": (users, lambda m, x, f: learn(m, torch.sum)),
    "users: fork": (users, lambda m, x, f: ttt.fork(m)),
    "users: restore": (users, lambda m, x, f: ttt.restore_(m, keep_learned=True)),
    "users: calibrate": (users, lambda m, x, f: x.calibrate([IDS])),
    "users: half a state": (users, lambda m, x, f: ttt.pool_of(m).load("a", half(m))),
    "users: state of none": (users, lambda m, x, f: ttt.pool_of(m).load("c", {})),
    "users: export": (users, lambda m, x, f: ttt.pool_of(m).export("nobody")),
    "users: rules": (users, lambda m, x, f: ttt.Learner(m, rules=[SequenceReplay(8)])),
    "users: packed": (users, lambda m, x, f: m.generate_batch([[1, 2]])),
    "experts: users": (lambda: (mixture(), None), lambda m, x, f: ttt.adapt_(
        m, config(target_modules=["experts"], layers=None, per_user=USERS))),
    "experts: captured": (experts, lambda m, x, f: ttt.capturable_(m, 8)),
    "experts: growing": (experts, lambda m, x, f: ttt.GrowingLearner(x)),
    "experts: learning raises": (experts, lambda m, x, f: learn(m, lambda logits: 1 / 0)),
    "experts: load": (experts, lambda m, x, f: ttt.load(m, f / "other")),
}  # fmt: skip


def digest(t):
    t = t.detach().contiguous().flatten()
    return hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() if t.numel() else ""


def seen(value):
    """``value`` of an attribute, as far as it can be compared."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype, "meta" if value.is_meta else digest(value))
    if isinstance(value, dict):
        return {str(key): seen(each) for key, each in value.items()}
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype)) or dataclasses.is_dataclass(value):
        return repr(value)
    return type(value).__name__


def everything(model, learner):
    """What a refused call may not change."""
    found = {}
    for name, module in model.named_modules():
        found[name] = id(module), {key: seen(value) for key, value in vars(module).items() if key not in CACHES}
        if isinstance(module, Adapted):
            found[f"{name}: sink"] = module.sink
    found["requires_grad"] = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    if learner is not None:
        found["learner"] = {k: seen(v) for k, v in vars(learner).items() if k not in CACHES}
        found["version"] = ttt.version(model)
        if learner.episodes is not None:
            found["log"] = seen(learner.episodes.export(None))
        if learner.pool is not None:
            pool = learner.pool
            found["users"] = pool.users, {user: seen(pool.export(user)) for user in pool.users}, pool.routing._open[:]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a file of another model, and one of a model as `plain` makes it, of which the end is missing."""
    folder = tmp_path_factory.mktemp("files")
    ttt.save(ttt.adapt_(tiny(layers=2), config()), folder / "other")
    torch.manual_seed(0)
    ttt.save(ttt.adapt_(plain()[0], config()), folder / "cut")
    (folder / "cut").write_bytes((folder / "cut").read_bytes()[:-100])
    return folder


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_a_refused_call_changes_nothing(name, folder):
    torch.manual_seed(0)
    make, call = CALLS[name]
    model, learner = make()
    before, files = everything(model, learner), sorted(folder.iterdir())
    with pytest.raises((ValueError, TypeError, RuntimeError, KeyError, OSError, ArithmeticError, MemoryError)):
        call(model, learner, folder)
    after = everything(model, learner)
    assert [key for key in before if before[key] != after.get(key)] == []
    assert before.keys() == after.keys()
    assert sorted(folder.iterdir()) == files


@pytest.mark.parametrize("call", [ttt.Learner, lambda model: learn(model, torch.sum)])
def test_parts_that_were_adapted_apart_do_not_learn_together(call):
    model, _ = apart()
    with pytest.raises(ValueError, match=r"adapted in 2 calls of ttt.adapt_.* in one call"):
        call(model)
    assert ttt.Learner(copy.deepcopy(model.model.layers[0])).layers  # a part alone learns


CHANGES = {
    "bit": lambda m, layer: m.lm_head.weight.data.view(-1)[5:6].view(torch.int32).bitwise_xor_(1),
    "bit of the state": lambda m, layer: layer.get_buffer("a" if hasattr(layer, "a") else "win_x")[0, 0].add_(1e-6),
    "flag": lambda m, layer: m.lm_head.weight.requires_grad_(True),
    "mode": lambda m, layer: m.model.norm.train(),
    "attribute": lambda m, layer: setattr(layer, "share", 2.0),
    "hook": lambda m, layer: m.model.norm.register_forward_hook(lambda *args: None),
    "module": lambda m, layer: setattr(m.model, "norm", copy.deepcopy(m.model.norm)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [shared, users])
def test_what_is_compared_notices_every_kind_of_change(make, change):
    model, learner = make()
    before = everything(model, learner)
    assert everything(model, learner) == before
    CHANGES[change](model, next(m for m in model.modules() if isinstance(m, Adapted)))
    assert everything(model, learner) != before
