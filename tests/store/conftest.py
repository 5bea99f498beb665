"""Stores of each kind. PostgreSQL is a real server, started for the tests in a temporary folder."""

import contextlib
import itertools

import pytest

import ttt
from bench import postgres

_number = itertools.count()


@pytest.fixture(scope="session")
def postgres_server():
    """A function that makes an empty schema, and returns the URL of an index in it, without blobs."""
    with contextlib.ExitStack() as stack:
        try:
            new_schema = stack.enter_context(postgres.running())
        except FileNotFoundError as error:
            pytest.skip(str(error))
        yield new_schema


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
