"""Stores of each kind. PostgreSQL is a real server, started for the tests in a temporary folder."""

import glob
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

import ttt

BINARIES = ["/usr/local/bin", *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]
_number = itertools.count()


def _account():
    """The account to run the server: PostgreSQL refuses to run as root."""
    if os.getuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


@pytest.fixture(scope="session")
def postgres_server():
    """A function that makes an empty schema, and returns the URL of an index in it, without blobs."""
    paths = os.pathsep.join([os.environ.get("PATH", ""), *BINARIES])
    initdb, pg_ctl = (shutil.which(name, path=paths) for name in ("initdb", "pg_ctl"))
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed (Debian: postgresql)")
    import psycopg

    account = _account()
    folder = Path(tempfile.mkdtemp(prefix="ttt-postgres-"))  # short: a socket's path has 107 bytes at most
    if account is not None:
        shutil.chown(folder, account)

    def run(*command):
        # Not through a pipe: the server inherits it, and would keep it open.
        subprocess.run(
            command, check=True, user=account, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    data = folder / "data"
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    try:
        run(initdb, "--auth=trust", "--username=ttt", "--no-sync", "--encoding=UTF8", "--locale=C", "-D", data)
        run(pg_ctl, "-D", data, "-l", folder / "log", "-w", "-o", options, "start")
        try:
            base = f"postgresql://ttt@/postgres?host={folder}"

            def new_schema():
                name = f"store{next(_number)}"
                with psycopg.connect(base, autocommit=True) as connection:
                    connection.execute(f"CREATE SCHEMA {name}")
                return f"{base}&options=-csearch_path%3D{name}"

            yield new_schema
        finally:
            run(pg_ctl, "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["folder", "fsspec", "postgres"])
def url(request, tmp_path):
    """The URL of an empty store: of each kind in turn."""
    if request.param == "folder":
        return str(tmp_path / "store")
    if request.param == "fsspec":
        return f"sqlite:///{tmp_path}/index.db?blobs=memory://{tmp_path.name}-{next(_number)}"
    return f"{request.getfixturevalue('postgres_server')()}&blobs=file://{tmp_path}/blobs"


@pytest.fixture
def store(url):
    """An empty store, of each kind in turn."""
    with ttt.Store(url) as store:
        yield store


@pytest.fixture
def local(tmp_path):
    """An empty store in a folder."""
    with ttt.Store(str(tmp_path / "store")) as store:
        yield store
