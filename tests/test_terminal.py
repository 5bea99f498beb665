"""What commands show while something takes long, in a terminal and in a file."""

import io

from rich.console import Console

from ttt.terminal import doing


def test_a_file_gets_a_line_at_once_and_a_terminal_a_spinner():
    file, shown = io.StringIO(), io.StringIO()
    with doing(Console(file=file), "Measuring ..."):
        assert file.getvalue() == "Measuring ...\n"
    assert file.getvalue() == "Measuring ...\n"
    with doing(Console(file=shown, force_terminal=True), "Measuring ..."):
        pass
    assert "Measuring ..." in shown.getvalue()
    assert shown.getvalue() != "Measuring ...\n"
