"""The suite of sequence layers: its contenders agree with the recurrence, and its bytes and flops with hand counts."""

import pytest
from tiny_cases import reasons

from bench.kernels import measure
from bench.kernels.suites import sequence
from bench.kernels.suites.sequence import OPS, TITANS, Prefill, Text, Token


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_contenders_pass_their_checks(op, dtype):
    text = Text("cpu", dtype, op, 40, 2, 16)
    good, not_timed = measure.checked(text)
    assert {"ttt", "torch, in chunks", "token by token"} <= set(good)
    assert all(not row["failed"] for row in not_timed)
    good, not_timed = measure.checked(Token("cpu", dtype, op, 3, 2, 16))
    assert set(good) == {"ttt", "torch"}
    assert not not_timed


def test_prefill_has_attention_beside_it():
    good, not_timed = measure.checked(Prefill("cpu", "float32", 20, 2, 8))
    assert set(good) == {"ttt", "gated delta rule", "attention"}
    assert not not_timed


def test_rows_have_the_shares_of_their_ceilings():
    text, token = Text("cpu", "float32", OPS[0], 20, 1, 16), Token("cpu", "float32", OPS[1], 2, 1, 16)
    for case, ceiling in ((text, "matmul"), (token, "copy")):
        rows, _ = measure.measure(case, 1)
        assert all(row["ceiling"] == ceiling and row["percent_of_ceiling"] > 0 for row in rows)


def test_wrong_outputs_are_caught(monkeypatch):
    real = sequence.run_op
    monkeypatch.setattr(sequence, "run_op", lambda op, x, form: (real(op, x, form)[0] * (1 + (form == "auto")), None))
    assert set(reasons(Text("cpu", "float32", OPS[0], 40, 2, 16))) >= {"ttt"}


def test_bytes_and_flops():
    text = Text("cpu", "float32", "gated delta rule", 10, 3, 8)
    # Products with S for keys, queries and the update: 2 D^2 each. Within a chunk of 32: keys and queries with keys,
    # the triangular solution and the errors' part of the outputs, half of 2 C D each.
    assert text.flops("ttt") == 10 * 3 * (3 * 2 * 8 * 8 + 4 * 32 * 8)
    assert Text("cpu", "float32", "TTT-Linear", 10, 3, 8).flops("ttt") == 10 * 3 * (3 * 2 * 8 * 8 + 2 * 16 * 8)
    # TTT-MLP has layers of 8 x 32 and 32 x 8. Its second weight takes part in the gradient of the first one too.
    products = 7 * 2 * 8 * 32 + 2 * 16 * (8 + 32)
    assert Text("cpu", "float32", "TTT-MLP", 10, 3, 8).flops("ttt") == 10 * 3 * products
    # With momentum also queries with the velocity, and its update.
    assert Text("cpu", "float32", TITANS, 10, 3, 8).flops("ttt") == 10 * 3 * (5 * 2 * 8 * 8 + 2 * 16 * 8)
    assert Token("cpu", "float32", "gated delta rule", 2, 3, 8).bytes("ttt") == 2 * 4 * 2 * 3 * 8 * 8
    # Read and written; read at the beginning of the mini-batch by 15 of 16 tokens, and written there by one of 16.
    assert Token("cpu", "float32", "TTT-Linear", 2, 3, 8).bytes("ttt") == 3 * 4 * 2 * 3 * 8 * 8
    assert Token("cpu", "float32", "TTT-MLP", 2, 3, 8).bytes("ttt") == 3 * 4 * 2 * 3 * 2 * 8 * 32
    # The momentum, too, is read and written.
    assert Token("cpu", "float32", TITANS, 2, 3, 8).bytes("ttt") == 5 * 4 * 2 * 3 * 8 * 8
