"""Choices of a model among answers, against plain forward passes."""

import pytest
import torch
from tiny_models import VOCAB, tiny

from ttt.demo.knowledge import GENERAL_KNOWLEDGE
from ttt.demo.questions import (
    Question,
    Template,
    choose,
    log_probabilities,
    names_the_right_value,
    padded,
    written,
)  # fmt: skip


class Letters:
    def __call__(self, text, add_special_tokens):
        return type("Tokens", (), {"input_ids": [1 + ord(letter) % (VOCAB - 1) for letter in text]})

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(m["content"][:9] for m in messages)

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def by_hand(model, ids, start):
    """Sum of the log probabilities of the tokens of ``ids`` from ``start`` on, from one forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return sum(float(logits[i - 1].log_softmax(-1)[ids[i]]) for i in range(start, len(ids)))


def test_log_probabilities_are_those_of_a_forward_pass_for_each_continuation():
    model, prompt, sizes = tiny(), torch.randint(VOCAB, (11,)).tolist(), []
    continuations = [torch.randint(VOCAB, (n,)).tolist() for n in (1, 5, 2, 3)]
    found = log_probabilities(model, prompt, continuations)
    assert found == pytest.approx([by_hand(model, prompt + c, 11) for c in continuations], abs=1e-3)

    class Answering:
        def __init__(self, rows):
            sizes.append(rows)

        def __enter__(self):
            return None

        def __exit__(self, *exc):
            return None

    assert log_probabilities(model, prompt, [[7], [9]], Answering) == pytest.approx(
        [by_hand(model, [*prompt, token], 11) for token in (7, 9)], abs=1e-3
    )
    assert sizes == [1, 2]


def test_no_logits_of_the_prompt_are_computed_but_the_last(monkeypatch):
    model, sizes = tiny(), []
    head = type(model.lm_head).forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: sizes.append(tuple(x.shape[:2])) or head(model.lm_head, x))
    log_probabilities(model, [5] * 20, [[7, 8], [9]])
    assert sizes == [(1, 1), (2, 2)]


def test_the_right_value_has_the_rank_of_its_probability():
    model, template = tiny(), Template(Letters())
    values = tuple("".join(chr(97 + int(i)) for i in torch.randint(26, (n,))) for n in (1, 4, 2, 6, 3))
    prompt = template.prompt(Question("what?", " it is", values, 0))
    found = [by_hand(model, prompt + template.ids(f" {value}"), len(prompt)) for value in values]
    order = sorted(range(5), key=lambda i: -found[i])
    for right in range(5):
        choice = choose(model, template, Question("what?", " it is", values, right))
        assert choice.rank == 1 + order.index(right)
        assert choice.chosen == order[0]
        assert choice.nll == pytest.approx(-found[right], abs=1e-3)


def test_the_written_answer_is_the_most_probable_token_again_and_again():
    model, template = tiny(), Template(Letters())
    model.generation_config.eos_token_id = None
    question = Question("what?", " it is", ("a", "b"), 0)
    ids = template.prompt(question, begun=False)
    assert ids == template.prompt(Question("what?", "", ("a", "b"), 0))
    for _ in range(7):
        ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    expected = " ".join(map(str, ids[-7:]))
    assert written(model, template, question, tokens=7) == expected


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Your dog is called Max.", True), ("MAX", True), ("It is Maxwell.", False), ("", False),
        ("Max or Luna", False), ("Luna", False), ("Your dog, Max, likes Max's ball.", True),
    ],
)  # fmt: skip
def test_an_answer_is_right_if_it_names_the_right_value_and_no_other(answer, right):
    assert names_the_right_value(answer, Question("", "", ("Luna", "Max", "Coco"), 1)) == right


def test_general_knowledge_is_sentences_that_go_on():
    assert len(GENERAL_KNOWLEDGE) == 30
    assert all(end.startswith(" ") and not begin.endswith(" ") for begin, end in GENERAL_KNOWLEDGE)


def test_rows_are_padded_at_the_end():
    assert padded([[1, 2, 3], [4]]).tolist() == [[1, 2, 3], [4, 0, 0]]


def test_text_that_does_not_fit_into_the_context_is_refused():
    model = tiny()
    context = model.config.max_position_embeddings
    assert len(log_probabilities(model, [1] * (context - 2), [[7], [8, 9]])) == 2
    with pytest.raises(ValueError, match=f"context of {context} tokens, got {context + 1}"):
        log_probabilities(model, [1] * (context - 1), [[7], [8, 9]])
