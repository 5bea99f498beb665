"""What a killed `ttt.save` leaves in a folder is removed by the next one; what others write there is not."""

import errno
import fcntl
import os
import signal
import time

import pytest
from tiny_models import adapted

import ttt
from ttt import files

KILLED = """
import os, signal, sys
from pathlib import Path
from ttt import files
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(Path(sys.argv[1]), b"half of it")
"""


def test_the_next_save_sweeps_what_a_killed_one_left(forks, tmp_path):
    path = tmp_path / "s.safetensors"
    done = forks.run(["-c", KILLED, path])
    assert done.returncode == -signal.SIGKILL
    (stray,) = tmp_path.iterdir()
    others = [tmp_path / name for name in (".s.safetensors.settings", "s.safetensors.ttt-x", ".s.safetensor.ttt-abcd")]
    for other in others:
        other.write_bytes(b"mine")
    for file in tmp_path.iterdir():
        os.utime(file, (time.time() - 60,) * 2)
    held = stray.with_name(stray.name + "x")  # another process is writing it
    held.write_bytes(b"theirs")
    os.utime(held, (time.time() - 60,) * 2)
    model, _ = adapted()
    with open(held, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ttt.save(model, path)
        assert sorted(tmp_path.iterdir()) == sorted([path, held, *others])
    ttt.save(model, path)
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    model, _ = adapted()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        ttt.save(model, tmp_path / "s")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "s"))
    assert list(tmp_path.iterdir()) == []
