"""Leases and their fencing tokens, on every kind of store, and between processes."""

import multiprocessing
import time

import pytest
import torch
from states import assert_same_state, small_state

import ttt
from ttt.store import LeaseHeld, StaleLease, UnknownUser


def test_a_lease_excludes_others_until_it_ends(store, url):
    with ttt.Store(url) as other:
        with store.lease("ada", seconds=30) as lease:
            with pytest.raises(LeaseHeld, match="'ada' is leased for another"):
                other.lease("ada")
            with other.lease("bob"):  # other users are free
                pass
            store.put(lease, small_state(1))
        with other.lease("ada") as second:
            assert second.token > lease.token
            with pytest.raises(StaleLease, match="was released"):
                store.put(lease, small_state(2))
        assert store.get("ada").version == 1


def test_the_stale_holder_cannot_write_and_loses_nothing(store, url):
    first = store.lease("ada", seconds=0.05)
    assert store.put(first, small_state(1)) == 1
    with ttt.Store(url) as other:
        second = other.lease("ada", seconds=30, wait=10)  # waits until the first expires
        assert second.token > first.token
        for attempt in (
            lambda: store.put(first, small_state(2)),
            lambda: store.rollback("ada", 1, lease=first),
            first.renew,
        ):
            with pytest.raises(StaleLease, match="no longer the latest"):
                attempt()
        first.release()  # must not end the second's
        with pytest.raises(LeaseHeld):
            store.lease("ada")
        assert_same_state(other.get("ada").tensors, small_state(1))
        assert other.put(second, small_state(3)) == 2
        report = other.verify()
        assert report.sound
        assert report.orphans == []  # the stale write left nothing behind


def test_expiry_alone_takes_nothing_from_the_holder(store):
    lease = store.lease("ada", seconds=0.01)
    time.sleep(0.05)
    assert store.put(lease, small_state(1)) == 1  # nobody took over: the token is still the latest


def test_put_and_renew_extend_the_lease(store):
    lease = store.lease("ada", seconds=20)
    before = lease.expires
    store.put(lease, small_state(1))
    assert lease.expires > before
    lease.renew(500)
    assert lease.expires > before + 400
    lease.release()
    lease.release()
    with pytest.raises(StaleLease):
        lease.renew()


def test_steal_takes_over_from_a_live_holder(store):
    lease = store.lease("ada")
    with store.lease("ada", steal=True) as thief:
        assert thief.token > lease.token
        with pytest.raises(StaleLease):
            store.put(lease, small_state(1))
        store.put(thief, small_state(2))


def test_an_error_in_the_block_gives_the_lease_back(store):
    with pytest.raises(ZeroDivisionError), store.lease("ada"):
        raise ZeroDivisionError
    with store.lease("ada"):
        pass


def fight(url, user, rounds, found):
    """Take the lease again and again, add one to what stands there; report (token, version) of each write."""
    torch.set_num_threads(1)
    store = ttt.Store(url)
    written, stale = [], 0
    while len(written) < rounds:
        lease = store.lease(user, seconds=0.002, wait=60)  # shorter than a write takes: most are taken over
        try:
            count = int(store.get(user).tensors["count"])
        except UnknownUser:
            count = 0
        try:
            version = store.put(lease, {"count": torch.tensor(count + 1)})
        except StaleLease:
            stale += 1
            continue
        written.append((lease.token, version, count + 1))
    found.put((written, stale))


@pytest.mark.parametrize("url", ["folder", "postgres"], indirect=True)
def test_two_processes_that_fight_for_a_lease_never_both_write(url):
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    fighters = [context.Process(target=fight, args=(url, "ada", 25, found)) for _ in range(2)]
    for fighter in fighters:
        fighter.start()
    results = [found.get(timeout=120) for _ in fighters]
    for fighter in fighters:
        fighter.join()
        assert fighter.exitcode == 0
    writes = sorted(write for written, _ in results for write in written)  # by token
    assert [version for _, version, _ in writes] == list(range(1, 51))  # in the order of their tokens
    assert [count for _, _, count in writes] == list(range(1, 51))  # no update was lost
    with ttt.Store(url) as store:
        assert int(store.get("ada").tensors["count"]) == 50
        report = store.verify()
        assert (report.versions, report.sound, report.orphans) == (50, True, [])
