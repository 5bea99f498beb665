"""Texts for the tests of the suites, which must run where the Debian packages that hold the real ones are missing."""

import inspect
import os
import pydoc_data.topics
import tarfile

import pytest

from bench.learning.language import texts


@pytest.fixture(scope="session", autouse=True)
def _texts_at_hand(tmp_path_factory):
    """Read every text whose package is missing from a file with another text, which comes with Python."""
    if os.environ.get(texts.SAVED):
        yield
        return
    folder = tmp_path_factory.mktemp("texts")
    other = "\n\n".join(pydoc_data.topics.topics.values()) + inspect.getsource(tarfile)
    for at, (name, source) in enumerate(texts.SOURCES.items()):
        if name != "known":
            try:
                text = source.read()
            except FileNotFoundError:
                text = other[20_000 * at :]
            (folder / f"{name}.txt").write_bytes(text.encode())
    (folder / "english.txt").write_bytes(texts.english().encode())
    caches = (texts.read, texts.english)
    for cached in caches:
        cached.cache_clear()
    os.environ[texts.SAVED] = str(folder)
    yield
    del os.environ[texts.SAVED]
    for cached in caches:
        cached.cache_clear()
