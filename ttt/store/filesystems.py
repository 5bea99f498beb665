"""Which file system a folder is on, for those on which a SQLite database cannot share memory."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

NETWORK_FILESYSTEMS = {
    0x6969: "nfs",
    0x517B: "smb",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x01021997: "9p",
    0x65735546: "fuse",
    0x0BD00BD0: "lustre",
    0x00C36400: "ceph",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0xAAD7AAEA: "panfs",
    0x5346414F: "afs",
    0x6B414653: "afs",
    0x73757245: "coda",
    0x564C: "ncp",
    0x01161970: "gfs2",
    0x7461636F: "ocfs2",
    0x786F4256: "vboxsf",
}
"""``f_type`` of statfs(2) -> name. FUSE is among them because it serves network file systems such as sshfs."""

_STATFS_BYTES = 1024  # more than ``struct statfs`` takes on any platform


def network_filesystem(folder: Path) -> str | None:
    """The name of the network file system that ``folder`` is on; None for a local one, and on systems but Linux.

    Raises:
        OSError: if the system cannot tell.
    """
    if sys.platform != "linux":
        return None
    status = ctypes.create_string_buffer(_STATFS_BYTES)
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(folder), status):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    kind = ctypes.c_long.from_buffer(status).value  # the first field
    return NETWORK_FILESYSTEMS.get(kind & 0xFFFFFFFF)
