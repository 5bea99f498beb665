"""The bytes of single tokens, of tokenizers of several kinds, and what logprobs say of tokens that are no character."""

import json

import httpx
import pytest
import transformers
from tiny_chat_model import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from web import CHAT, NAME

from ttt.serve.token_text import Offsets, TokenText

TEXT = "Ω is é, 🐕 is a dog, 漢字 \ufffd and\nwords"


def sentencepiece_tokenizer():
    """As Llama 2 has it: words with their space, and bytes for what is in no word."""
    pieces = [
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abdegiknorstw,",
        "is",
        "▁is",
        "do",
        "▁do",
        "▁dog",
        "\ufffd",
    ]
    model = models.BPE(
        vocab={piece: at for at, piece in enumerate(pieces)},
        merges=[("i", "s"), ("▁", "is"), ("d", "o"), ("▁", "do"), ("▁do", "g")], byte_fallback=True,
    )  # fmt: skip
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    ("tokenizer", "space"),
    [(byte_tokenizer(), ""), (sentencepiece_tokenizer(), " "), (transformers.ByT5Tokenizer(), "")],
    ids=["byte-level", "sentencepiece", "bytes"],
)
def test_the_bytes_of_all_tokens_are_the_text(tokenizer, space):
    tokens = [TokenText.of(tokenizer, token) for token in tokenizer(TEXT, add_special_tokens=False).input_ids]
    assert b"".join(token.raw for token in tokens).decode() == space + TEXT
    offsets = Offsets()
    at = [offsets.add(token) for token in tokens]
    assert at == [
        len(b"".join(token.raw for token in tokens[:end]).decode(errors="ignore")) for end in range(len(tokens))
    ]
    dog = [token for token in tokens if token.raw in (b"\xf0", b"\x9f")][:2]
    assert [token.shown for token in dog] == ["\\xf0", "\\x9f"]
    assert [token.shown_apart for token in dog] == ["bytes:\\xf0", "bytes:\\x9f"]


def test_tokens_that_are_characters_are_shown_as_they_are():
    tokenizer = sentencepiece_tokenizer()
    of = {piece: TokenText.of(tokenizer, token) for piece, token in tokenizer.get_vocab().items()}
    for piece, text in (("▁dog", " dog"), ("do", "do"), ("▁", " "), ("<0x0A>", "\n"), ("\ufffd", "\ufffd")):
        assert of[piece].shown == of[piece].shown_apart == text
    end = TokenText.of(byte_tokenizer(), 257)
    assert (end.raw, end.shown) == (b"<|im_end|>", "<|im_end|>")


def scores_of(url, route, **body):
    body = {"model": NAME, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **body}
    return httpx.post(f"{url}/v1/{route}", json=body, timeout=60).json()["choices"][0]


def test_alternatives_that_are_parts_of_characters_are_kept_apart(url):
    chat = scores_of(url, "chat/completions", messages=CHAT, logprobs=True, top_logprobs=20)
    content = chat["logprobs"]["content"]
    parts = [each for token in content for each in token["top_logprobs"] if each["token"].startswith("\\x")]
    assert parts
    for each in parts:
        assert each["bytes"] == [int(each["token"].removeprefix("\\x"), 16)]
    assert all(len({tuple(each["bytes"]) for each in token["top_logprobs"]}) == 20 for token in content)
    text = scores_of(url, "completions", prompt="é", logprobs=20, echo=True)["logprobs"]
    assert text["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert text["text_offset"][:3] == [0, 0, 1]
    assert [len(top) for top in text["top_logprobs"][1:]] == [20] * 13
    assert any(name.startswith("bytes:") for name in json.dumps(text["top_logprobs"][1:]).split('"'))
