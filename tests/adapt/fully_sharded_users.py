"""What two processes find whose users learn in a model that FSDP2 shards; `test_fully_sharded_users.py` starts them.

Both hold the whole model, too, and let its users learn the same in one process.
"""

import copy

import torch
import torch.distributed as dist
from fully_sharded import learner_of, sharded
from tiny_models import ids_of
from two_processes import (
    LEARN,
    error_of,
    meet,
    model_of,
    same_everywhere,
    whole,
)

import ttt


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


CHECKS = {check.__name__: check for check in (users, users_guarded, users_refused)}


if __name__ == "__main__":
    meet(CHECKS)
