"""What the help of the command line says."""

import pytest
from typer.testing import CliRunner

from ttt.cli import app


@pytest.mark.parametrize("command", ["demo", "chat", "serve"])
def test_help_names_the_default_model_in_full(command):
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).output
    assert "by default SmolLM2-135M-Instruct." in text
