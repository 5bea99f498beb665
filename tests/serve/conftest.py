"""A model that the tests of this folder serve, made once, and a server of it."""

import pytest
from tiny_chat_model import byte_tokenizer, service_of, tiny_chat_model


@pytest.fixture(scope="session")
def model():
    return tiny_chat_model()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def url(model, tmp_path):
    """Of a server without keys, whose store is the folder "store"."""
    from web import served  # here: tests of replicas in a Ray cluster run where the clients of HTTP are not installed

    with served(service_of(model, tmp_path / "store")) as found:
        yield found
