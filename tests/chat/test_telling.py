"""How what a user says is read, by its length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt.conversation import SHORT, Telling


@given(st.integers(1, 16), st.floats(1e-3, 100), st.integers(0, 10_000))
def test_a_long_text_moves_the_weights_no_further_than_a_short_one(passes, emphasis, tokens):
    found = Telling(passes, emphasis).of(tokens)
    if tokens <= SHORT:
        assert found.emphasis == emphasis
    assert found.emphasis <= emphasis
    assert found.emphasis * tokens <= max(emphasis * SHORT, tokens) * (1 + 1e-12)
    assert found.emphasis >= min(emphasis, 1.0)
    assert found.passes == (1 if found.emphasis == 1.0 < emphasis else passes)


def test_the_default_at_some_lengths():
    assert [Telling().of(tokens).options for tokens in (3, 64, 128, 640, 5000)] == [
        {"passes": 2, "emphasis": 20.0}, {"passes": 2, "emphasis": 20.0}, {"passes": 2, "emphasis": 10.0},
        {"passes": 2, "emphasis": 2.0}, {"passes": 1, "emphasis": 1.0},
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", [{"passes": 0}, {"passes": 17}, {"passes": 1.5}, {"emphasis": 0}, {"emphasis": 101}])
def test_what_is_out_of_range_is_refused_by_name(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        Telling(**wrong)
