"""Leases and their fencing tokens, on every kind of store, and between processes."""

import multiprocessing
import shutil
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


def test_a_stale_holder_cannot_write_and_loses_nothing(store, url):
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


def test_a_lease_that_expired_still_writes_unless_taken_over(store):
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


def test_an_error_in_the_block_releases_the_lease(store):
    with pytest.raises(ZeroDivisionError), store.lease("ada"):
        raise ZeroDivisionError
    with store.lease("ada"):
        pass


def with_equal_leases(store, other):
    """A lease of each store, on users of the same row and with the same token."""
    leases = store.lease("ada"), other.lease("eve")
    assert [(lease.grant.row, lease.token) for lease in leases] == [(1, 1)] * 2
    return leases


@pytest.mark.parametrize("kind", ["folder", "postgres", "copy", "copy of a folder in use"])
def test_a_lease_of_another_store_is_refused(kind, request, tmp_path):
    """Although row and token are the same."""
    if kind == "postgres":
        new_schema = request.getfixturevalue("postgres_server")
        urls = [f"{new_schema()}&blobs={tmp_path}/blobs{number}" for number in range(2)]
    else:
        urls = [str(tmp_path / "one"), str(tmp_path / "two")]
    with ttt.Store(urls[0]) as store:
        if kind == "copy":
            store.close()
            shutil.copytree(*urls)
        if kind == "copy of a folder in use":
            mine = store.lease("ada")
            shutil.copytree(*urls)
        with ttt.Store(urls[1]) as other:
            if kind == "copy of a folder in use":
                theirs = other.lease("ada", steal=True)
            else:
                mine, theirs = with_equal_leases(store, other)
            for wrong, right, target in ((mine, theirs, other), (theirs, mine, store)):
                with pytest.raises(ValueError, match=r"lease must be one of the store .*, got one of"):
                    target.put(wrong, small_state(1))
                assert target.users() == []
                assert target.put(right, small_state(2)) == 1
                with pytest.raises(ValueError, match="lease must be one of the store"):
                    target.rollback(wrong.user, 1, lease=wrong)
            for target in (store, other):
                report = target.verify()
                assert (report.versions, report.sound, report.orphans) == (1, True, [])


YEAR = 365 * 86400


def test_a_clock_that_was_set_back_blocks_no_longer_than_the_lease_was_for(store, monkeypatch):
    clock = [time.time() + YEAR]
    monkeypatch.setattr(store.index, "now", lambda run: clock[0])
    first = store.lease("ada", seconds=30)
    clock[0] += 20
    store.put(first, small_state(1))  # extends it
    clock[0] -= YEAR
    with pytest.raises(LeaseHeld, match=r"another 30\.0 s"):  # the holder may be alive
        store.lease("ada")
    clock[0] += 29
    with pytest.raises(LeaseHeld, match=r"another 1\.0 s"):
        store.lease("ada")
    clock[0] += 1
    second = store.lease("ada", seconds=7)
    with pytest.raises(StaleLease):
        store.put(first, small_state(2))
    second.renew(500)
    clock[0] += 400
    with pytest.raises(LeaseHeld, match=r"another 100\.0 s"):  # a clock that runs on changes nothing
        store.lease("ada")


def test_gc_shortens_leases_of_a_clock_that_was_set_back(store, monkeypatch):
    clock = [time.time() + YEAR]
    monkeypatch.setattr(store.index, "now", lambda run: clock[0])
    lease = store.lease("ada", seconds=30)
    clock[0] -= YEAR
    store.gc(grace=1)
    clock[0] += 30
    store.lease("ada")
    with pytest.raises(StaleLease):
        store.put(lease, small_state(1))


SHORT_LEASE = 0.002  # seconds: less than a write takes, so that most leases are taken over


def fight(url, user, rounds, found):
    """Take the lease again and again and add one to the stored count; (token, version, count) of each write."""
    torch.set_num_threads(1)
    store = ttt.Store(url)
    written, stale = [], 0
    seconds = SHORT_LEASE
    while len(written) < rounds:
        lease = store.lease(user, seconds=seconds, wait=60)
        try:
            count = int(store.get(user).tensors["count"])
        except UnknownUser:
            count = 0
        try:
            version = store.put(lease, {"count": torch.tensor(count + 1)})
        except StaleLease:
            stale += 1
            seconds *= (
                2  # until a lease is longer than a write: on a slow disk the fighters would stop each other for ever
            )
            continue
        seconds = SHORT_LEASE
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
