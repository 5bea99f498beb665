"""Models with their files, made once for the tests of a module."""

import pytest
from forged import OPTIONS, Case


@pytest.fixture(scope="module", params=OPTIONS)
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("forged"), OPTIONS[request.param])


@pytest.fixture(scope="module")
def first_case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("forged"), OPTIONS["rms, momentum, generated rows"])
