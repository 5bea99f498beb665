"""Where the words of messages stand in chat templates of several kinds, and which tokens they are."""

import random

import pytest

from ttt.learn.chat_template import openings, spans_in_template, teaching_words, tokens_at, words_in_template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = (  # as that of Llama 3
    "<begin>{% for m in messages %}<|{{ m['role'] }}|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
LOUD = "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}"
FIRST_ONLY = "{% for m in messages %}{% if loop.first %}{{ m['content'] }}\n{% endif %}{% endfor %}"


class Characters:
    """A tokenizer of pieces of 1 to 3 characters, with a chat template."""

    def __init__(self, template=CHATML, seed=0):
        import jinja2

        self.template, self.random = jinja2.Environment().from_string(template), random.Random(seed)

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert not tokenize
        return self.template.render(messages=messages, add_generation_prompt=add_generation_prompt)

    def __call__(self, text, return_offsets_mapping, add_special_tokens):
        assert return_offsets_mapping
        assert not add_special_tokens
        offsets, at = [], 0
        while at < len(text):
            end = min(len(text), at + self.random.randint(1, 3))
            offsets.append((at, end))
            at = end
        return {"input_ids": list(range(len(offsets))), "offset_mapping": offsets}


class Letters(Characters):
    """A tokenizer of characters, with a chat template."""

    def __call__(self, text, return_offsets_mapping, add_special_tokens):
        return {"input_ids": [ord(each) for each in text], "offset_mapping": [(i, i + 1) for i in range(len(text))]}


def chat(rng, blanks=""):
    words = ["hi", "a\nb", "<|im_end|>", "the words", "", "é🐕", "hi"]
    return [
        {"role": rng.choice(["user", "assistant"]), "content": blanks + rng.choice(words) + blanks}
        for _ in range(rng.randint(1, 6))
    ]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("template", "blanks"), [(CHATML, ""), (CHATML, " \n"), (TRIMMING, ""), (TRIMMING, " \n ")])
def test_words_are_found_in_one_rendering(template, blanks, seed):
    rng, tokenizer = random.Random(seed), Characters(template)
    messages = chat(rng, blanks)
    chosen = sorted(rng.sample(range(len(messages)), rng.randint(1, len(messages))))
    text, spans = spans_in_template(tokenizer, messages, chosen, answer=rng.random() < 0.5)
    assert text.startswith(tokenizer.apply_chat_template(messages, False, False))
    for at, (start, stop) in zip(chosen, spans, strict=True):
        # What stands before a message does not depend on what follows in these templates: its place is known.
        before = tokenizer.apply_chat_template(messages[:at], False, False)
        head = "<|im_start|>{}\n" if template is CHATML else "<|{}|>\n\n"
        words = messages[at]["content"] if template is CHATML else messages[at]["content"].strip()
        assert start == len(before) + len(head.format(messages[at]["role"]))
        assert text[start : start + len(words)] == words
        following = text[start + len(words) :].split("\n")[0]
        assert text[start:stop] == words + following


def test_the_last_words_stand_where_all_of_them_stand():
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": "hi"}]
    tokenizer = Characters()
    assert words_in_template(tokenizer, messages) == (
        *(found := spans_in_template(tokenizer, messages, [0, 1]))[:1], *found[1][1],
    )  # fmt: skip


@pytest.mark.parametrize(("template", "chosen"), [(LOUD, [0]), (FIRST_ONLY, [1]), (FIRST_ONLY, [0, 1])])
def test_a_template_that_changes_the_words_is_refused(template, chosen):
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": "ho"}]
    with pytest.raises(ValueError, match="changes what was said"):
        spans_in_template(Characters(template), messages, chosen)


NO_SYSTEM = (  # as that of Gemma
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ refuse() }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}"
    "<end>{% endfor %}"
)
NOTHING_BEFORE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHATML, [
            "<|im_start|>user\n", "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
        ]),
        (TRIMMING, [
            "<begin><|user|>\n\n", "<begin><|system|>\n\n", "<|eot|><|user|>\n\n", "<|eot|><|assistant|>\n\n",
        ]),
        (NO_SYSTEM, ["<user>", "<end><user>", "<end><assistant>"]),
        (NOTHING_BEFORE, ["\n"]),
        (LOUD, []),
    ],
)  # fmt: skip
def test_a_turn_opens_with_what_the_template_puts_before_it(template, wanted):
    for most in (100, 3, 1):
        found = {"".join(map(chr, each)) for each in openings(Letters(template), most)}
        assert found == {each[-most:] for each in wanted}


@pytest.mark.parametrize("seed", range(30))
def test_tokens_are_inside_a_span_if_one_of_their_characters_is(seed):
    rng = random.Random(seed)
    text = "x" * rng.randint(0, 60)
    spans = [tuple(sorted(rng.choices(range(len(text) + 1), k=2))) for _ in range(rng.randint(0, 6))]
    rng.shuffle(spans)
    ids, inside = tokens_at(Characters(seed=seed), text, spans)
    offsets = Characters(seed=seed)(text, True, False)["offset_mapping"]
    held = {at for start, stop in spans for at in range(start, stop)}
    assert inside == [bool(held & set(range(first, last))) for first, last in offsets]
    assert len(ids) == len(inside)


@pytest.mark.parametrize(
    ("inside", "teaches"),
    [
        ("", ""), ("0", "0"), ("1", "1"), ("11", "01"), ("010", "010"), ("0110", "0010"), ("1110111", "0110011"),
        ("101", "101"), ("0011010", "0001010"),
    ],
)  # fmt: skip
def test_of_a_turn_all_tokens_teach_but_the_first_unless_it_is_alone(inside, teaches):
    assert teaching_words([each == "1" for each in inside]) == [each == "1" for each in teaches]
