"""A pool that reads, writes, learns, compresses, evicts, goes back and forgets: no user notices another.

The machine runs two models side by side. What the user under watch sends is the same to both, and so are the shapes of
all batches; every other user's tokens differ. After every step the two must agree on each bit of what the watched
user gets and has. ``TTT_LOW_RANK_EXAMPLES`` and ``TTT_LOW_RANK_STEPS`` set how many examples
of how many steps there are.
"""

import copy
import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from tiny_models import VOCAB, tiny

import ttt

EXAMPLES, STEPS = (
    int(os.environ.get(f"TTT_LOW_RANK_{name}", default)) for name, default in (("EXAMPLES", 12), ("STEPS", 80))
)
WATCHED, OTHERS = "ada", ("bob", "cyd", "dan", "eve")
BATCHES = [0]

others = st.lists(st.sampled_from((*OTHERS, None)), min_size=1, max_size=2)
places = st.integers(0, 2)
seeds = st.integers(0, 2**31)


def tokens(seed, rows, length):
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


class Isolation(RuleBasedStateMachine):
    base = None

    @initialize(
        protected=st.booleans(),
        rate=st.sampled_from(["constant", "energy", "rms"]),
        directions=st.sampled_from([0, 5]),
        burst=st.sampled_from([None, 0.5]),
    )
    def begin(self, protected, rate, directions, burst):
        if Isolation.base is None:
            Isolation.base = tiny(layers=2)
        self.learners, self.stores = [], []
        for _ in range(2):
            config = ttt.TTTConfig().with_flat(
                target_modules=["down_proj"], lr=0.5 if rate == "energy" else 0.02, rate=rate, clip=3.0, chunk=6,
                burst=burst if rate == "rms" else None,
                replay_capacity=16, ewc_lambda=0.1 * protected, replay_rows=2 * protected, orthogonal=directions,
                per_user=ttt.LowRank(slots=3, rank=2, window=6),
            )  # fmt: skip
            learner = ttt.Learner(ttt.adapt_(copy.deepcopy(Isolation.base), config), context=24)
            if protected or directions:
                learner.calibrate([tokens(7, 2, 12)])  # of the base model, which all share
            store = {}
            learner.pool.on_evict, learner.pool.on_miss = store.__setitem__, store.get
            self.learners.append(learner)
            self.stores.append(store)
        self.snapshots = []

    def batch(self, names, at, seed, side, length):
        """Rows of all users; the watched user's at ``at`` are the same on both sides, the others' are not."""
        users = list(names)
        users.insert(at % (len(users) + 1), WATCHED)
        mine, theirs = tokens(seed, len(users), length), tokens(seed + 1 + side, len(users), length)
        own = torch.tensor([u == WATCHED for u in users]).unsqueeze(1)
        BATCHES[0] += 1
        return torch.where(own, mine, theirs), users, own[:, 0]

    @rule(
        names=others,
        at=places,
        seed=seeds,
        length=st.sampled_from([2, 7, 13]),
        twice=st.booleans(),
        learn=st.booleans(),
    )
    def observe(self, names, at, seed, length, twice, learn):
        found = []
        for side, learner in enumerate(self.learners):
            ids, users, own = self.batch([*names, *([WATCHED] if twice else [])], at, seed, side, length)
            seen = learner.observe(ids, users=users, learn=learn)
            found.append(seen.nll[own])
        assert torch.equal(*found)

    @rule(names=others, at=places, seed=seeds)
    def generate(self, names, at, seed):
        found = []
        for side, learner in enumerate(self.learners):
            ids, users, own = self.batch(names, at, seed, side, 4)
            with ttt.users(learner.model, users):
                found.append(learner.model.generate(ids, max_new_tokens=3, do_sample=False)[own])
        assert torch.equal(*found)

    @rule(names=others, at=places, seed=seeds)
    def read_logits(self, names, at, seed):
        found = []
        for side, learner in enumerate(self.learners):
            ids, users, own = self.batch(names, at, seed, side, 5)
            with torch.no_grad(), ttt.users(learner.model, users):
                found.append(learner.model(ids).logits[own])
        assert torch.equal(*found)

    @rule(user=st.sampled_from((WATCHED, *OTHERS)))
    def evict(self, user):
        for learner in self.learners:
            if user in learner.pool.users:
                learner.pool.evict(user)

    @rule(user=st.sampled_from(OTHERS))
    def forget_another(self, user):
        for learner, store in zip(self.learners, self.stores, strict=True):
            learner.pool.forget(user)
            store.pop(user, None)

    @rule()
    def forget(self):
        for learner, store in zip(self.learners, self.stores, strict=True):
            learner.pool.forget(WATCHED)
            store.pop(WATCHED, None)

    @rule(user=st.sampled_from(OTHERS))
    def spoil(self, user):
        """On one side, what another user learnt makes every gradient overflow: only there are chunks rejected."""
        learner = self.learners[1]
        if user in learner.pool.users:
            state = learner.pool.export(user)
            learner.pool.load(
                user, {k: (t * 1e25).clamp(-1e30, 1e30) if k[-2:] in (".a", ".b") else t for k, t in state.items()}
            )

    @rule()
    def compress(self):
        for learner in self.learners:
            if WATCHED in learner.pool.users:
                for layer in learner.pool.layers.values():
                    layer.compress(layer.rows > 2)  # the others' fullness may differ by now

    @precondition(lambda self: WATCHED in self.learners[0].pool.users)
    @rule()
    def remember(self):
        self.snapshots.append([learner.pool.export(WATCHED) for learner in self.learners])

    @precondition(lambda self: self.snapshots)
    @rule(which=seeds)
    def roll_back(self, which):
        for learner, state in zip(self.learners, self.snapshots[which % len(self.snapshots)], strict=True):
            learner.pool.load(WATCHED, state)
            assert all(torch.equal(t, state[k]) for k, t in learner.pool.export(WATCHED).items())

    def teardown(self):
        states = []
        for learner in getattr(self, "learners", []):
            learner.pool.open(WATCHED)
            states.append(learner.pool.export(WATCHED))
            for layer in learner.pool.layers.values():  # who has no slot has left nothing in memory
                free = [s for s in range(3) if s not in learner.pool._slot.values()]
                assert float(layer.a[free].abs().sum() + layer.b[free].abs().sum()) == 0
                assert layer.moments is None or not layer.moments[free].any()
        if states:
            assert [k for k, t in states[0].items() if not torch.equal(t, states[1][k])] == []


def test_no_user_notices_another():
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Isolation,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, suppress_health_check=checks
        ),
    )
    print(f"{BATCHES[0] // 2} batches on each side")
