"""A PostgreSQL server of its own in a temporary folder, for tests and measurements."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

BINARIES = ["/usr/local/bin", *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]


def account() -> str | None:
    """The account to run the server as: PostgreSQL refuses to run as root."""
    if os.getuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


@contextlib.contextmanager
def running(fsync: bool = False) -> Iterator[Callable[[], str]]:
    """Run a server, and give a function that makes an empty schema and returns the URL of an index in it.

    The URL lacks the store's blobs: append ``&blobs=file:///folder``.

    Args:
        fsync: whether commits are flushed to the disk. Without, a crash of the machine may lose them; that of a client
            does not.

    Raises:
        FileNotFoundError: if PostgreSQL's programs are not installed.
    """
    paths = os.pathsep.join([os.environ.get("PATH", ""), *BINARIES])
    initdb, pg_ctl = (shutil.which(name, path=paths) for name in ("initdb", "pg_ctl"))
    if initdb is None or pg_ctl is None:
        raise FileNotFoundError("PostgreSQL's initdb and pg_ctl are not installed (Debian: postgresql)")
    import psycopg

    user = account()
    folder = Path(tempfile.mkdtemp(prefix="ttt-postgres-"))  # short: a socket's path has 107 bytes at most
    if user is not None:
        shutil.chown(folder, user)

    def run(*command: str | Path) -> None:
        # Not through a pipe: the server inherits it, and would keep it open.
        subprocess.run(command, check=True, user=user, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    data = folder / "data"
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync={'on' if fsync else 'off'}"
    try:
        run(initdb, "--auth=trust", "--username=ttt", "--no-sync", "--encoding=UTF8", "--locale=C", "-D", data)
        run(pg_ctl, "-D", data, "-l", folder / "log", "-w", "-o", options, "start")
        try:
            base, number = f"postgresql://ttt@/postgres?host={folder}", itertools.count()

            def new_schema() -> str:
                name = f"store{next(number)}"
                with psycopg.connect(base, autocommit=True) as connection:
                    connection.execute(f"CREATE SCHEMA {name}")
                return f"{base}&options=-csearch_path%3D{name}"

            yield new_schema
        finally:
            run(pg_ctl, "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)
