"""``python tests/store/crash.py --kills 1000``: kill -9 a writer at random moments, and check what is left.

A forked writer takes the lease, puts, rolls back and collects garbage, and acknowledges each version through a pipe
once the store has. Every second writer is killed so many seconds after it began, which is often before it has
written, the others after their first acknowledgement, however slow the machine is. After each kill the parent checks
that nothing acknowledged is lost, that no version went back, and that every version that can be read is, to the bit,
the state that was put under its number.
"""

import argparse
import json
import os
import random
import select
import signal
import struct
import tempfile
import time
import traceback
from collections import Counter

import torch
from states import assert_same_state, small_state

import ttt
from ttt.store import UnknownUser, filesystems

USER = "ada"
KEEP = 6
PATIENCE = 120.0
"""Seconds in which a writer must acknowledge its first version."""


def write_forever(url, pipe, seed):
    """Write until killed. The state of version v, unless rolled back to, is ``small_state(v)``."""
    rng = random.Random(seed)
    store = ttt.Store(url)
    while True:
        # After a kill the lease is waited for or taken over: both must be safe.
        with store.lease(USER, seconds=0.02, wait=60, steal=rng.random() < 0.5) as lease:
            for _ in range(rng.randrange(1, 4)):
                try:
                    head = store.history(USER)[0].number
                except UnknownUser:
                    head = 0
                if head > KEEP and rng.random() < 0.2:
                    version = store.rollback(USER, head - rng.randrange(KEEP - 1), lease=lease)
                else:
                    version = store.put(lease, small_state(head + 1), {"version": head + 1})
                os.write(pipe, struct.pack("<q", version))
                if rng.random() < 0.15:
                    store.gc(keep_last=KEEP, keep_days=0, grace=0)


def killed_writer(url, seed, seconds, has_written):
    """Fork a writer and kill it ``seconds`` after it began, or acknowledged a version; all that it acknowledged."""
    reader, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            write_forever(url, pipe, seed)
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # a writer ends only when it is killed
    os.close(pipe)
    if has_written:
        assert select.select([reader], [], [], PATIENCE)[0], f"the writer of seed {seed} wrote nothing"
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the writer of seed {seed} failed by itself"
    acknowledged = b""
    while select.select([reader], [], [], 0)[0] and (part := os.read(reader, 1 << 16)):
        acknowledged += part
    os.close(reader)
    return [version for (version,) in struct.iter_unpack("<q", acknowledged)]


def check(url, acknowledged, before, everything):
    """Assert what must be true of a store after a kill; its newest version, and how many orphans it has."""
    with ttt.Store(url) as store:
        report = store.verify()
        assert report.sound, report
        if before == 0 and not acknowledged and not store.users():
            return 0, len(report.orphans)
        history = store.history(USER)
        head = history[0].number
        assert head >= max([before, *acknowledged]), (head, before, acknowledged)
        assert acknowledged == sorted(set(acknowledged))
        assert all(version > before for version in acknowledged)
        assert [v.number for v in history] == list(range(head, head - len(history), -1))  # without a gap
        for version in history:
            state = store.get(USER, version.number)
            assert_same_state(state.tensors, small_state(state.meta["version"]))
            # A version's content never changes once it was read; a rollback's is that of the version it names.
            expected = everything.get(version.source) if version.source else version.number
            if expected is not None:
                assert state.meta["version"] == expected
            assert everything.setdefault(version.number, state.meta["version"]) == state.meta["version"]
        assert store.get(USER, strict=True).version == head
        return head, len(report.orphans)


def main(kills, url, seed, longest):
    """Kill ``kills`` writers one after another; figures of what happened."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    head, everything, found = 0, {}, Counter()
    for kill in range(kills):
        acknowledged = killed_writer(url, rng.random(), rng.uniform(0.0, longest), has_written=kill % 2 == 1)
        before, (head, orphans) = head, check(url, acknowledged, head, everything)
        found["acknowledged"] += len(acknowledged)
        found["committed, not acknowledged"] += head - before - len(acknowledged)
        found["kills that left an orphan"] += orphans > 0
        found["kills before any version"] += not acknowledged
        if orphans:
            with ttt.Store(url) as store:
                store.gc(keep_last=KEEP, keep_days=0, grace=0)
                assert store.verify().orphans == [], f"garbage is left after kill {kill}"
    return {"kills": kills, "seed": seed, "versions": head, **found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--url", help="of an empty store; by default in a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=0.15, help="seconds that a writer lives at most")
    parser.add_argument("--network", action="store_true", help="as if on a network file system: a rollback journal")
    args = parser.parse_args()
    if args.network:
        filesystems.network_filesystem = lambda folder: "nfs"
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(main(args.kills, args.url or f"{folder}/store", args.seed, args.longest)))
