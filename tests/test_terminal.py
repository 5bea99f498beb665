"""What commands show while something takes long, in a terminal and in a file."""

import io

from rich.console import Console

from ttt.terminal import doing, progress


def test_a_file_gets_a_line_at_once_and_a_terminal_a_spinner():
    file, shown = io.StringIO(), io.StringIO()
    with doing(Console(file=file), "Measuring ..."):
        assert file.getvalue() == "Measuring ...\n"
    assert file.getvalue() == "Measuring ...\n"
    with doing(Console(file=shown, force_terminal=True), "Measuring ..."):
        pass
    assert "Measuring ..." in shown.getvalue()
    assert shown.getvalue() != "Measuring ...\n"


def test_progress_is_a_bar_in_a_terminal_and_a_line_for_each_quarter_in_a_file():
    file, shown = io.StringIO(), io.StringIO()
    with progress(Console(file=file, width=20), "Writing [b]texts[/b] of some length") as told:
        for done in (0, 1, 2, 4, 7, 8):
            told(done, 8)
    what = "Writing [b]texts[/b] of some length"
    assert file.getvalue().splitlines() == [
        f"{what} ...",
        f"{what}: 25 %",
        f"{what}: 50 %",
        f"{what}: 75 %",
        f"{what}: 100 %",
    ]
    with progress(Console(file=shown, width=120, force_terminal=True), what) as told:
        told(3, 8)
    assert what in shown.getvalue()
    assert "38%" in shown.getvalue()
