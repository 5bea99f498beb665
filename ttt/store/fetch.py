"""A version's state, read and checked."""

from __future__ import annotations

import errno
import hashlib
from typing import Any

from torch import Tensor

from ttt.store.blobs import Blobs
from ttt.store.errors import StorageFailure
from ttt.store.index import Version
from ttt.store.state import decode


class Damage(ValueError):
    """A blob is missing, torn or altered, or the disk cannot read it; the message says which."""


def fetch(blobs: Blobs, version: Version) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) of a version.

    Raises:
        Damage: if its blob is not what was put.
        StorageFailure: if the target is out of reach, which tells nothing of the blob.
    """
    try:
        data = blobs.read(version.key)
    except FileNotFoundError:
        raise Damage("its blob is missing") from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise Damage(f"its blob cannot be read ({error})") from error
        raise StorageFailure(f"the blobs are out of reach: {error}") from error
    if len(data) != version.size:
        raise Damage(f"its blob has {len(data)} bytes, not {version.size}")
    if hashlib.sha256(data).hexdigest() != version.sha256:
        raise Damage("its blob was altered: the checksum differs")
    try:
        return decode(data)
    except ValueError as error:
        raise Damage(f"its blob is {error}") from error
