import pytest
import torch

from ttt.ops.philox import philox

# Known answers of the Random123 library (kat_vectors, philox4x32).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    words = philox(torch.tensor([counter[0]]), counter[1], counter[2], counter[3], key[0] | key[1] << 32)
    assert " ".join(f"{int(w):08x}" for w in words) == answer
