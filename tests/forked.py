"""Python processes that need not import torch, transformers and the server: they are forked from one that has.

`Forks` starts a process that imports `MODULES`, which takes seconds, and that from then on forks a child for each
program that is to run. The child runs it as a new interpreter would: with its own arguments, environment, folder,
output and exit status. What is different: modules are imported already, with the environment of the tests.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types

MODULES = ("torch", "torch.distributed.run", "torch.distributed.tensor", "torch.distributed.fsdp", "transformers",
           "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama",
           "transformers.models.qwen2.modeling_qwen2", "ttt", "ttt.cli", "ttt.serve.main", "uvicorn")  # fmt: skip


class Forked:
    """A process that `Forks` has started, with the methods of `subprocess.Popen` that tests call.

    It leads a session of its own, which holds what it forks.
    """

    def __init__(self, connection, stdout, stderr):
        self._connection = connection
        self.pid = int(_line(connection))
        self.stdout, self.stderr = stdout, stderr
        self.returncode = None

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = int(_line(self._connection))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(f"the forked process {self.pid}", timeout) from None
            self._connection.close()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Forks:
    """The process that has imported `MODULES`, until `close`."""

    def __init__(self):
        self._channel, theirs = socket.socketpair()
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        theirs.close()

    def close(self):
        self._channel.close()
        self._server.wait()

    def start(self, arguments, env=None, cwd=None, stdout=None, stderr=None):
        """Start what ``python *arguments`` would run.

        Args:
            arguments: "-c" and code, "-m" and a module, or a file; and what it is called with.
            env: the whole environment; that of this process if it is None.
            cwd: the folder to run in.
            stdout: a file, `subprocess.PIPE` for a pipe to read from, or None for that of this process.
            stderr: as ``stdout``.
        """
        ours, theirs = socket.socketpair()
        read, given = [], []
        for wanted, own in ((stdout, sys.__stdout__), (stderr, sys.__stderr__)):
            end = None
            if wanted == subprocess.PIPE:
                end, wanted = os.pipe()
                end, wanted = os.fdopen(end), os.fdopen(wanted, "w")
            read.append(end)
            given.append(wanted or own)
        request = {"arguments": [str(each) for each in arguments], "env": dict(os.environ if env is None else env)}
        request["cwd"] = str(cwd or os.getcwd())
        socket.send_fds(self._channel, [b"+"], [theirs.fileno(), *(file.fileno() for file in given)])
        ours.sendall(json.dumps(request).encode() + b"\n")
        theirs.close()
        for file, end in zip(given, read, strict=True):
            if end is not None:
                file.close()
        return Forked(ours, *read)

    def run(self, arguments, timeout=300, **options):
        """As `subprocess.run` with ``capture_output`` and ``text``; what the program has forked is ended with it."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.start(arguments, stdout=out, stderr=err, **options)
            try:
                process.wait(timeout)
            finally:
                with contextlib.suppress(ProcessLookupError):  # all of them have ended
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess(arguments, process.returncode, out.read(), err.read())


# -- the process that forks ------------------------------------------------------------------------------------------


def _line(connection):
    found = b""
    while not found.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise EOFError("the other end is closed")
        found += byte
    return found


def _serve(channel):
    """Fork for each request of ``channel`` until its other end is closed."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    base = [each for each in sys.path[1:] if each not in paths]
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # at the end Python frees it, or extension modules report leaks
    while True:
        _, handed, _, _ = socket.recv_fds(channel, 1, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not handed:
            return
        if os.fork() == 0:
            channel.close()
            program = _watched(*handed)
            return _become(base, **program)
        for each in handed:
            os.close(each)


def _watched(number, *streams):
    """In a child of the process that forks: forks once more, and tells how the grandchild, which returns, has ended."""
    connection = socket.socket(fileno=number)
    request = json.loads(_line(connection))
    child = os.fork()
    if child == 0:
        connection.close()
        for to, file in enumerate(streams, 1):
            os.dup2(file, to)
            os.close(file)
        return request
    for each in streams:
        os.close(each)
    connection.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(base, arguments, env, cwd):
    """Run the program as the main one of this process."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    random.seed()
    sys.stdout.reconfigure(line_buffering=False, write_through=bool(env.get("PYTHONUNBUFFERED")))
    kind, *rest = arguments
    first = {"-c": "", "-m": cwd}.get(kind, os.path.dirname(os.path.abspath(kind)))
    sys.path[:] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *base]
    if kind == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
