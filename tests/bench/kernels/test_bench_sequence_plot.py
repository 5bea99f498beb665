"""The picture of cost against length."""

from bench.kernels.plot_sequence import lengths


def row(contender, tokens):
    return {"suite": "sequence", "case": f"prefill: T = {tokens}, 2 heads of 8", "contender": contender, "us": 3.0,
            "tokens": tokens, "heads": 2, "width": 8}  # fmt: skip


def test_the_picture_is_drawn_where_there_are_rows(tmp_path):
    rows = [row(name, tokens) for name in ("ttt", "gated delta rule", "attention") for tokens in (64, 128)]
    assert lengths("title", rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert not lengths("title", [], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
