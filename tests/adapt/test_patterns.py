"""Regular expressions of the safe subset: as ``re`` where that is quick, and bounded where it is not."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt.adapt.patterns import Budget, Pattern

ATOMS = st.sampled_from(["a", "b", "1", "_", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c1]", r"[\d_]", "^", "$"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "??"])).map(lambda two: f"(?:{two[0]}){two[1]}"),
        st.tuples(ATOMS.filter(lambda atom: atom not in "^$"), st.sampled_from("*+?")).map("".join),
        inner.map(lambda one: f"({one}|)"),
    ),
    max_leaves=6,
)
NAMES = st.text("ab1_.", max_size=8) | st.lists(st.text("ab1", min_size=1, max_size=3), min_size=1).map(".".join)


@settings(max_examples=400, deadline=None)
@given(EXPRESSIONS, st.lists(NAMES, min_size=1, max_size=6))
def test_names_match_as_with_pefts_rule(expression, names):
    pattern = Pattern(expression)
    for name in names:
        assert pattern.matches_end(name, Budget()) == bool(re.match(rf"(.*\.)?({expression})$", name)), name


@pytest.mark.parametrize(
    ("expression", "name", "expected"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "model.layers.0.xq_proj", False),
        ("layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj", True),
        (r"layers\.1\.mlp", "model.layers.11mlp", False),
        (r".*\.(q|v)_proj", "model.layers.0.v_proj", True),
        (r"^model\.layers\.[0-9]+\.q_proj$", "model.layers.12.q_proj", True),
        (r"^layers\.[0-9]+\.q_proj$", "model.layers.12.q_proj", False),
        (r"[]_]x", "a._x", True),
        (r"a\-b", "a-b", True),
        ("", "model.layers", False),
        ("", "", True),
    ],
)
def test_examples(expression, name, expected):
    assert Pattern(expression).matches_end(name, Budget()) is expected
    assert bool(re.match(rf"(.*\.)?({expression})$", name)) is expected


@pytest.mark.parametrize(
    "expression",
    ["(a+)+$", "(a*)*b", "(a|a)*b", "(a|aa)+$", "(.*)*x", "((a?)*)*b", "(a|a)" * 40 + "b", "a*" * 60 + "b"],
)
def test_expressions_on_which_re_would_not_end(expression):
    start = time.perf_counter()
    assert Pattern(expression).matches_end("model." + "a" * 60 + "!", Budget()) is False
    assert time.perf_counter() - start < 2


def test_work_is_bounded():
    budget = Budget(10_000)
    pattern, name = Pattern("(.*)*x"), "a" * 40
    assert pattern.matches_end(name, budget) is False
    assert 0 < budget.left < 10_000
    with pytest.raises(ValueError, match="matching the patterns takes more than 10000 steps"):
        pattern.matches_end(name * 20, budget)


@pytest.mark.parametrize(
    ("expression", "match"),
    [
        ("a{2}", "not supported: '{' at 1"),
        (r"(a)\1", "the escape"),
        (r"\bq", "the escape"),
        (r"\Z", "the escape"),
        ("a\\", "the escape"),
        ("(?=a)a", "an extension at 1"),
        ("(?i)a", "an extension at 1"),
        ("(?P<x>a)", "an extension at 1"),
        ("a++", "a second quantifier"),
        ("a*?+", "a second quantifier"),
        ("*a", r"'\*' at 0"),
        ("(a", r"unbalanced '\('"),
        ("a)|(b", r"unbalanced '\)' at 1"),
        ("[a", "unterminated character set"),
        ("[b-a]", "bad character range"),
        ("(" * 17 + ")" * 17, "nested at most 16 deep"),
        ("(" * 900, "nested at most 16 deep"),
        ("a" * 1001, "at most 1000 characters, got 1001"),
    ],
)
def test_expressions_that_are_refused(expression, match):
    with pytest.raises(ValueError, match=match):
        Pattern(expression)
