"""What ends the start of a server, with a message that names it."""

from __future__ import annotations

import pytest
from server import Server


def test_a_start_with_what_was_not_tested_ends_and_names_all_of_it(tmp_path):
    wrong = ("--tensor-parallel-size", "2", "--quantization", "fp8")
    with pytest.raises(RuntimeError) as found:
        Server(tmp_path, *wrong).start()
    assert "ttt cannot serve users with: --tensor-parallel-size 2" in str(found.value)
    assert "--quantization fp8" in str(found.value)
