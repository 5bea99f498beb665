"""Shared by all tests: the seed of each, which of them are slow, how the Triton kernels run, and garbage collection.

Without a GPU the Triton kernels run in Triton's interpreter, and tests/gpu is not collected.
"""

import gc
import os
import signal
import sys
import zlib

import pytest
import selection
import torch
from forked import Forks

collect_ignore_glob = []
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    collect_ignore_glob.append("gpu/*")
    sys.modules.setdefault("fla", None)  # transformers takes its kernels where it is installed, and they need a GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What is imported and collected stays until the end: about a million objects, which take half a second to look at.
gc.disable()


SEED = os.environ.get("TTT_TEST_SEED", "0")
SEED = int.from_bytes(os.urandom(4), "little") if SEED == "random" else int(SEED)
os.environ["TTT_TEST_SEED"] = str(SEED)  # the processes that pytest-xdist starts draw the same


def pytest_configure():
    # A run in the background of a script inherits an ignored SIGINT, which would make the tests of Ctrl-C fail.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    selection.refuse_broken_interpreter()


def pytest_report_header():
    return f"TTT_TEST_SEED={SEED}"


def pytest_ignore_collect(collection_path, config):
    return selection.left_out(collection_path, config) or None


def pytest_collection_modifyitems(items):
    selection.mark_slow(items)
    selection.long_files_first(items)


def pytest_collection_finish():
    """From here on the garbage collector looks only at what tests make."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """After each file, what its tests left in this process is set aside, too.

    They import modules and fill caches, which come to millions of objects: a collection would take seconds.
    """
    found = yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return found


def pytest_unconfigure():
    gc.unfreeze()  # at the end Python frees it, or extension modules report leaks


@pytest.fixture(autouse=True)
def _seeded(request):
    """Seed torch differently for every test. ``TTT_TEST_SEED=random`` draws new inputs; the header shows the seed."""
    torch.manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def forks():
    """Runs programs in processes that need not import anything: see `forked`."""
    started = Forks()
    yield started
    started.close()
