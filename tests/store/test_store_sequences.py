"""Any sequence of operations against a dict: Hypothesis looks for one that tells them apart."""

import shutil
import tempfile
import warnings

import pytest
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule
from states import assert_same_state, small_state

import ttt
from ttt.store import DamagedState, LeaseHeld, StaleLease, UnknownUser, UnknownVersion

USERS = strategies.sampled_from(["ada", "bob", "../eve"])
STORES = strategies.sampled_from([0, 1])


class Sequences(RuleBasedStateMachine):
    """Two processes' views of one store; the model: user -> {version: seed}, and the lease that is the latest."""

    leases = Bundle("leases")

    def __init__(self):
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.stores = [ttt.Store(self.folder) for _ in range(2)]
        self.model, self.latest, self.damaged = {}, {}, set()
        self.tokens, self.seed = [0], 0

    def teardown(self):
        for store in self.stores:
            store.close()
        shutil.rmtree(self.folder)

    @rule(target=leases, which=STORES, user=USERS, steal=strategies.booleans())
    def take(self, which, user, steal):
        held = user in self.latest and self.latest[user] is not None
        if held and not steal:
            with pytest.raises(LeaseHeld):
                self.stores[which].lease(user, seconds=1000)
            return self.latest[user]
        lease = self.stores[which].lease(user, seconds=1000, steal=steal)
        assert lease.token > self.tokens[-1]
        self.tokens.append(lease.token)
        self.latest[user] = lease
        return lease

    @rule(lease=leases)
    def release(self, lease):
        lease.release()
        if self.latest.get(lease.user) is lease:
            self.latest[lease.user] = None

    @rule(lease=leases, which=STORES)
    def put(self, lease, which):
        self.seed += 1
        store, state, meta = self.stores[which], small_state(self.seed), {"seed": self.seed}
        if self.latest.get(lease.user) is not lease:
            with pytest.raises(StaleLease):
                store.put(lease, state, meta)
            return
        versions = self.model.setdefault(lease.user, {})
        number = max(versions, default=0) + 1
        assert store.put(lease, state, meta) == number
        versions[number] = self.seed

    @rule(lease=leases, which=STORES, back=strategies.integers(0, 3))
    def rollback(self, lease, which, back):
        versions = self.model.get(lease.user, {})
        head = max(versions, default=0)
        call = lambda: self.stores[which].rollback(lease.user, head - back, lease=lease)  # noqa: E731
        if not versions:
            expected = UnknownUser
        elif head - back not in versions:
            expected = UnknownVersion
        elif versions[head - back] in self.damaged:
            expected = DamagedState
        elif self.latest.get(lease.user) is not lease:
            expected = StaleLease
        else:
            assert call() == head + 1
            versions[head + 1] = versions[head - back]
            return
        with pytest.raises((expected, StaleLease) if self.latest.get(lease.user) is not lease else expected):
            call()

    @rule(which=STORES, user=USERS)
    def forget(self, which, user):
        known = self.model.pop(user, None) is not None or user in self.latest
        self.latest.pop(user, None)
        if known:
            self.stores[which].forget(user)
        else:
            with pytest.raises(UnknownUser):
                self.stores[which].forget(user)

    @rule(which=STORES, keep=strategies.integers(1, 3))
    def collect(self, which, keep):
        self.stores[which].gc(keep_last=keep, keep_days=0, grace=0)
        for versions in self.model.values():
            for number in sorted(versions)[:-keep]:
                del versions[number]
        for user in [u for u, lease in self.latest.items() if lease is None and not self.model.get(u)]:
            del self.latest[user]

    @precondition(lambda self: any(self.model.values()))
    @rule(user=USERS)
    def damage(self, user):
        if not self.model.get(user):
            return
        newest = self.stores[0].history(user)[0]
        with open(self.stores[0].blobs.root / newest.key, "r+b") as file:
            file.truncate(newest.size - 1)
        self.damaged.add(self.model[user][newest.number])

    @invariant()
    def reads_agree(self):
        for store in self.stores:
            for user in ("ada", "bob", "../eve"):
                self.read_agrees(store, user)

    def read_agrees(self, store, user):
        versions = self.model.get(user, {})
        if not versions:
            with pytest.raises(UnknownUser):
                store.get(user)
            return
        assert [v.number for v in store.history(user)] == sorted(versions, reverse=True)
        good = [n for n in versions if versions[n] not in self.damaged]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ttt.store.DamagedStateWarning)
            if not good:
                with pytest.raises(DamagedState):
                    store.get(user)
                return
            state = store.get(user)
        assert state.version == max(good)
        assert state.meta == {"seed": versions[state.version]}
        assert_same_state(state.tensors, small_state(versions[state.version]))
        assert len(state.damaged) == len([n for n in versions if n > state.version])


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
