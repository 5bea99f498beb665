"""The streams of the suite "text": no byte is read twice or tuned on, and a seed always draws the same text."""

import itertools
import re

import pytest
import torch

from bench.learning.text import streams
from bench.learning.text.streams import REPORTED, SCENARIOS, TUNING, cut, held_out, read, stream, streamed, visits
from bench.learning.text.suite import TextSuite


def raw(ids):
    return bytes(ids.flatten().tolist())


@pytest.mark.parametrize("scenario", [*SCENARIOS, "tuning"])
@pytest.mark.parametrize("seed", [0, 1001, 1002, 1003])
def test_a_stream_has_no_byte_twice_and_no_held_out_byte(scenario, seed):
    text = stream(scenario, seed, tuning=scenario == "tuning")
    rows = iter(text.other)
    for domain in text.domains:
        mine = [s.ids for s in text.segments if s.domain == domain]
        mine += [next(rows) for _ in range(sum(ids.shape[1] - 1 for ids in mine) // 512)]
        # They follow each other in the part that is streamed.
        assert b"".join(map(raw, mine)) in streamed(domain)
        assert len(streamed(domain)) < len(read(domain))
        for row in held_out(domain):
            assert raw(row) in read(domain)[len(streamed(domain)) :]
        assert held_out(domain).shape == (streams.HELD_WINDOWS, 512)
    assert next(rows, None) is None


def test_tuning_reads_no_reported_text():
    assert not set(TUNING) & set(REPORTED)
    for seed, domain in enumerate(("headers", "javascript", "readmes", "docs"), 1000):
        text = stream("tuning", seed, tuning=True)
        assert text.domains == [domain]
        part = raw(text.segments[0].ids)
        assert not any(part[at : at + 1000] in read(other) for other in REPORTED for at in range(0, len(part), 1000))
    with pytest.raises(ValueError, match=r"scenario must be one of .* \(tuning = False\), got 'adapt-headers'"):
        stream("adapt-headers", 0)
    with pytest.raises(ValueError, match=r"scenario must be one of .* \(tuning = True\), got 'adapt-english'"):
        stream("adapt-english", 0, tuning=True)
    whole = streams.texts.stream_of("headers")
    assert read("headers") == whole[len(whole) // 2 :]  # the demo reads the first half


def test_a_seed_always_draws_the_same_text_and_other_seeds_draw_other_text():
    for scenario in ("adapt-html", "recurring"):
        first, again, other = stream(scenario, 3), stream(scenario, 3), stream(scenario, 4)
        assert first.sources() == again.sources() != other.sources()
        assert torch.equal(first.other, again.other)
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(first.segments, again.segments, strict=True))


def test_each_domain_of_the_recurring_stream_occurs_twice():
    assert visits(4) == [0, 1, 0, 2, 1, 3, 2, 3]  # A B A C B D C D
    assert visits(3) == [0, 1, 0, 2, 1, 2]
    for seed in range(3):
        text = stream("recurring", seed)
        order = [segment.domain for segment in text.segments]
        assert sorted(order) == sorted(REPORTED * 2)
        assert all(a != b for a, b in itertools.pairwise(order))
        assert {s.ids.shape for s in text.segments} == {(1, streams.SEGMENT + 1)}
    assert len({tuple(stream("recurring", seed).domains) for seed in range(8)}) > 1


def test_cut_gives_consecutive_pieces_and_refuses_short_text():
    pieces, other = cut(bytes(range(256)) * 11, [600, 700], torch.Generator())
    assert [p.shape for p in pieces] == [(1, 601), (1, 701)]
    assert other.shape == (2, 513)
    joined = raw(pieces[0]) + raw(pieces[1]) + raw(other)
    assert joined in bytes(range(256)) * 11
    exact = bytes(1300 + 2 + 2 * 513)
    assert cut(exact, [600, 700], torch.Generator())[1].shape == (2, 513)
    with pytest.raises(ValueError, match="at least 2328 bytes, got 2327"):
        cut(exact[1:], [600, 700], torch.Generator())


def test_a_domain_with_too_little_text_is_left_out(monkeypatch):
    monkeypatch.setitem(streams._SOURCES, "rst", lambda: b"x" * 59_999)
    read.cache_clear(), streams.missing.cache_clear()
    try:
        assert streams.missing() == {"rst": "rst must have at least 60000 bytes on this machine, got 59999"}
        suite = TextSuite()
        assert suite.facts()["missing"] == streams.missing()
        assert not suite.fits("naive", "adapt-rst")
        assert suite.fits("naive", "adapt-html")
        assert suite.fits("naive", "recurring")
        assert [s.domain for s in stream("recurring", 0).segments].count("rst") == 0
        assert len(stream("recurring", 0).segments) == 6
    finally:
        read.cache_clear(), streams.missing.cache_clear()
    with pytest.raises(ValueError, match="domain must be one of"):
        read("latin")


def test_pages_contain_no_path_or_address():
    page = read("html").decode()
    assert "<html" in page
    assert not re.search(r"file:|0x[0-9a-f]", page)
