"""The pages as a reader meets them: code runs, tables are those of the results, links lead somewhere."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest

from bench import tables

ROOT = Path(__file__).parents[1]
PAGES = tables.pages()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.S | re.M)


def blocks(path):
    return BLOCK.findall(path.read_text())


def ids(path):
    return str(path.relative_to(ROOT))


@pytest.mark.filterwarnings("error::DeprecationWarning:README", "error::DeprecationWarning:docs")
@pytest.mark.parametrize("page", [p for p in PAGES if any(kind == "python" for kind, _ in blocks(p))], ids=ids)
def test_code_blocks_of_a_page_run_in_order_and_print_what_it_says(page, tmp_path, monkeypatch):
    """A block of text after one of code is what that prints; numbers may differ by 5 % between machines."""
    monkeypatch.chdir(tmp_path)
    if page.name == "users.md":  # which has an example of how to calibrate
        warnings.filterwarnings("error", "learning is unprotected")  # pytest puts the filters back
    namespace: dict = {}
    printed = None
    for number, (kind, code) in enumerate(blocks(page)):
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, f"{page.relative_to(ROOT)} block {number}", "exec"), namespace)
            printed = out.getvalue()
        elif kind == "text" and printed is not None:
            assert re.sub(r"[\d.]+", "#", code) == re.sub(r"[\d.]+", "#", printed)
            numbers = [[float(n) for n in re.findall(r"\d+\.?\d*", text)] for text in (code, printed)]
            assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.011)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_tables_are_those_of_the_results(page):
    assert tables.filled(page.read_text()) == page.read_text(), "run python -m bench.tables"


def test_every_table_stands_on_a_page():
    named = [name for page in PAGES for name in re.findall(r"^<!-- table: (.+) -->$", page.read_text(), re.M)]
    assert sorted(named) == sorted(tables.TABLES)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for name in re.findall(r"`((?:bench|tests|ttt|csrc|docs)/[\w/.-]+)`", text):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m (bench[\w.]+)", text):
        assert any((ROOT / f"{module.replace('.', '/')}{end}").exists() for end in (".py", "/__main__.py")), module


def test_the_readme_is_short():
    text = BLOCK.sub("", (ROOT / "README.md").read_text())
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    assert len(prose.split()) <= 1000
