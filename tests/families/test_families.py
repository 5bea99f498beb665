"""Every family works in every column or is refused by a sentence; what fails otherwise is known and named here."""

import re
from pathlib import Path

import matrix
import pytest

# Fail inside of transformers, also without this package, or are not right yet: see docs/compatibility.md.
KNOWN = {"dory"}
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("family", matrix.families())
def test_a_family_works_or_is_refused(family):
    row = matrix.try_family(family)
    if not any(row.found.values()):  # it could not be made tiny: the page says so
        assert family in re.findall(r"[\w.-]*\w", matrix.PAGE.read_text().partition("## Not tried")[2]), row.why
    else:
        assert ("no" in row.found.values()) == (family in KNOWN), row.why


def test_the_page_names_every_family_once():
    text = matrix.PAGE.read_text()
    assert text.startswith("# Compatibility\n")
    tried, _, rest = text.partition("## Not tried")
    table = tried.partition("## Families")[2].partition("## What does not work")[0]
    for family in matrix.families():
        assert (f"| {family} |" in table) != (f" {family}," in rest or f" {family}." in rest), family


def test_the_page_says_what_else_was_tried_and_where():
    text = matrix.PAGE.read_text()
    for what, how, said, where in matrix.OTHERS:
        assert f"| {what} | {how} | {said} | `tests/{where}` |" in text
        assert (TESTS / where).exists(), where
