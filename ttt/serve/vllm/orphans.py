"""Ends vLLM's engine processes when the API server is gone: nobody could ask them for anything any more.

vLLM ends them when the API server stops in order. After it was killed they live on, and the worker would renew the
leases of its users for ever, so that no other server could let them learn.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

log = logging.getLogger("vllm.ttt")
_EVERY = 1.0  # seconds between two looks
_GRACE = 90.0  # seconds for storing what was learnt, after which a process that does not end is killed


def end_with_parent() -> None:
    """From now on, end this process as by SIGTERM once the process that started it is gone."""
    threading.Thread(target=_watch, args=(os.getppid(),), name="ttt-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:  # an orphan gets another parent at once
        time.sleep(_EVERY)
    log.warning("the process that started this one is gone: it ends, too")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)
