"""What two processes find that each hold a whole model and read texts of their own; `test_replicas.py` starts them.

Both hold a second copy of it, too, which learns from all texts in one batch.
"""

import copy

import torch
import torch.distributed as dist
from data_parallel import compares
from fully_sharded import loss_of
from tiny_models import ids_of
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from two_processes import LEARN, changed, differences, error_of, kept_of, layers_of, meet, model_of, same_everywhere

import ttt
from ttt.adapt.convert import learning_layers
from ttt.rules import SequenceReplay


def two_learners(model=None, **options):
    """Learners of two copies of one model, the second of which joins what the processes read."""
    config = ttt.TTTConfig(**LEARN | options)
    one = model_of() if model is None else model
    two = copy.deepcopy(one)
    both = [ttt.Learner(ttt.adapt_(one, config)), ttt.Learner(ttt.adapt_(two, config), data_parallel=True)]
    torch.manual_seed(1)
    known = [ids_of(4, 40)]
    for learner in both:
        learner.calibrate(known)
    return both


def own_texts(mesh, folder):
    """Each process reads texts of its own; all learn what one process would learn from all of them in a batch."""
    found = []
    for options in ({}, {"protect": [ttt.MAS(strength=0.1), ttt.LayerReplay()]}):
        one, two = two_learners(**options)
        for batch, length in ((2, 30), (1, 9)):
            found += compares(one, two, [ids_of(batch, length), ids_of(batch, length)])
        taught = [torch.ones(2, 30, dtype=torch.bool) for _ in range(2)]
        taught[1][:, 8:] = False  # of the last chunks one process alone learns
        found += compares(one, two, [ids_of(2, 30), ids_of(2, 30)], learn_mask=taught, passes=2)
        snapshots = [learner.snapshot() for learner in (one, two)]
        found += compares(one, two, [ids_of(1, 20), ids_of(1, 20)])
        for learner, snapshot in zip((one, two), snapshots, strict=True):
            learner.rollback(snapshot)
            learner.consolidate()
        found += compares(one, two, [ids_of(1, 20), ids_of(1, 20)])
        for learner in (one, two):
            learner.reset()
        found += differences(layers_of(one), layers_of(two))
    return found


def own_texts_of_experts(mesh, folder):
    """The experts to which tokens of one process only were routed learn in all of them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, head_dim=8, experts_implementation="eager",
    )  # fmt: skip
    model = MixtralForCausalLM(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 3:
                p.mul_(4)
    one, two = two_learners(model, target_modules=["experts", "q_proj"], protect=[])
    found = compares(one, two, [ids_of(1, 4), ids_of(1, 4)])
    return found + compares(one, two, [ids_of(2, 20), ids_of(2, 20)])


def beside_an_optimizer(mesh, folder):
    """Of a model in DistributedDataParallel an optimizer trains the output head, and the other layers learn."""
    one = ttt.adapt_(model_of(), ttt.TTTConfig(**LEARN | {"protect": []}))
    two = copy.deepcopy(one)
    for model in (one, two):
        model.lm_head.weight.requires_grad_(True)
    wrapped, found, rank = DistributedDataParallel(two), [], dist.get_rank()
    # DistributedDataParallel takes the mean over the processes; what learns, the sum.
    optimizers = [SGD([one.lm_head.weight], lr=0.1), SGD([two.lm_head.weight], lr=0.2)]
    for _ in range(4):
        texts = [ids_of(2, 12), ids_of(2, 12)]
        with ttt.learning(one):
            loss_of(one, torch.cat(texts)).backward()
        with ttt.learning(wrapped, data_parallel=True):
            loss_of(wrapped, texts[rank]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found += differences(*([layer for _, layer in learning_layers(model)] for model in (one, two)))
    heads = one.lm_head.weight.detach(), two.lm_head.weight.detach()
    found += [] if torch.allclose(*heads, rtol=1e-9) and same_everywhere({"head": heads[1]}) else ["the output head"]
    return found


def refused(mesh, folder):
    """What is refused in all processes, and that nothing changes."""
    _, two = two_learners()
    rank, ids = dist.get_rank(), ids_of(2, 20)
    two.observe(ids)
    kept, model = kept_of(two), two.model
    other, learnt = model_of(), copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight[3] += rank * 1e-12
    ttt.adapt_(other, two.config)
    ttt.Learner(learnt).observe(ids * 0 + 5 + rank)

    def learn(model, data_parallel=True):
        with ttt.learning(model, data_parallel=data_parallel):
            loss_of(model, ids).backward()

    users = ttt.adapt_(model_of(), ttt.TTTConfig(**LEARN, per_user=ttt.LowRank(slots=2)))
    thawed = copy.deepcopy(model)
    thawed.lm_head.weight.requires_grad_(True)
    wrapped = DistributedDataParallel(thawed)
    errors = {
        "other weights": (lambda: ttt.Learner(other, data_parallel=True), "the processes hold different models"),
        "other weights, any loss": (lambda: learn(other), "the processes hold different models"),
        "learnt other text": (lambda: ttt.Learner(learnt, data_parallel=True), "the processes hold different models"),
        "learnt other text, any loss": (lambda: learn(learnt), "the processes hold different models"),
        "shapes": (lambda: two.observe(ids[: 1 + rank]), "the shape of input_ids and options must be the same in all"),
        "users": (lambda: ttt.Learner(users, data_parallel=True), "must be False for a model whose users"),
        "rules": (lambda: ttt.Learner(model, rules=[SequenceReplay(8)], data_parallel=True), "must be False for ttt.L"),
        "episodes": (
            lambda: ttt.Learner(model, episodes=ttt.EpisodeLog(), data_parallel=True), "must be False for ttt.Learner"
        ),
        "growing": (lambda: ttt.GrowingLearner(two), "data_parallel must be False for ttt.GrowingLearner"),
        "graphed": (lambda: ttt.GraphedLearner(two, graph=False), "data_parallel must be False for ttt.GraphedLearner"),
        "wrapped": (lambda: ttt.Learner(wrapped, data_parallel=True), "is a DistributedDataParallel, which is not"),
        "wrapped, not joined": (lambda: learn(wrapped, False), "is a DistributedDataParallel, which is not supported"),
    }  # fmt: skip
    found = []
    for name, (action, wanted) in errors.items():
        error = error_of(action)
        found += [] if wanted in error else [f"{name}: {error}"]
    return found + changed(two, kept)


CHECKS = {check.__name__: check for check in (own_texts, own_texts_of_experts, beside_an_optimizer, refused)}


if __name__ == "__main__":
    meet(CHECKS)
