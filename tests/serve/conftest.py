"""A model that the tests of this folder serve, made once."""

import pytest
from tiny_chat_model import byte_tokenizer, tiny_chat_model


@pytest.fixture(scope="session")
def model():
    return tiny_chat_model()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()
