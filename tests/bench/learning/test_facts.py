"""The suite "facts": people and questions, scores against plain forward passes, and every method on a tiny model."""

import copy
import math
import types
from collections import Counter

import pytest
import torch

from bench.learning.facts import contenders, scores
from bench.learning.facts.base_model import BaseModel, own_texts
from bench.learning.facts.chat import Chat, Question, questions, session, telling
from bench.learning.facts.methods import METHODS, method
from bench.learning.facts.people import KINDS, Fact, person
from bench.learning.facts.retrieval import nearest
from bench.learning.facts.run import tell_and_ask
from bench.learning.facts.suite import FactsSuite


class Bytes:
    """A tokenizer whose tokens are bytes, with a short chat template."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return types.SimpleNamespace(input_ids=list(text.encode()))

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        return "".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + "<a>" * add_generation_prompt


@pytest.fixture(scope="module")
def base():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3,
    )  # fmt: skip
    return BaseModel(LlamaForCausalLM(config), Chat(Bytes()), torch.randint(256, (8, 40)), torch.randint(256, (2, 30)))


def options_of(name):
    return {option: values[0] for option, values in METHODS[name].grid.items()}


# -- people and chats ------------------------------------------------------------------------------------------------


def test_every_kind_can_be_told_and_asked():
    for kind in KINDS.values():
        assert len(set(kind.values)) == 10
        assert all(telling.count("{}") == 1 for telling in kind.tellings)
        for question, begins in kind.questions:
            assert not any(value in question or value in begins.split() for value in kind.values)
            assert question.endswith("?")
            assert begins == begins.strip()


def test_a_person_has_one_fact_of_each_kind_and_another_person_others():
    facts = person(5)
    assert facts == person(5)
    assert facts != person(6)
    assert sorted(fact.kind for fact in facts) == sorted(KINDS)
    assert all(fact.value in fact.told for fact in facts)
    assert len({tuple(fact.kind for fact in person(seed)) for seed in range(9)}) == 9
    many = Counter(fact.index for seed in range(200) for fact in person(seed))
    assert min(many.values()) > 120  # 200 of each are expected, with a deviation of 13


def test_chats_hold_what_was_said_and_end_where_the_answer_begins():
    chat, facts = Chat(Bytes()), person(1)
    question = questions(facts)[0]
    prompt = bytes(chat.prompt(question, session(facts))).decode()
    assert all(fact.told in prompt for fact in facts)
    assert prompt.endswith(f"<u>{question.text}<a>{question.begins}")
    alone = bytes(chat.prompt(question)).decode()
    assert question.fact.value not in alone
    assert [bytes(value).decode() for value in chat.values(question)] == [f" {value}" for value in question.values]
    assert len(questions(facts)) == 30


# -- scores ----------------------------------------------------------------------------------------------------------


def by_hand(model, ids, start):
    """Sum of the log probabilities of the tokens of ``ids`` from ``start`` on, from one forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return sum(float(logits[i - 1].log_softmax(-1)[ids[i]]) for i in range(start, len(ids)))


def test_log_probabilities_are_those_of_a_forward_pass_for_each_continuation(base):
    prompt = torch.randint(256, (11,)).tolist()
    continuations = [torch.randint(256, (n,)).tolist() for n in (1, 5, 2, 3)]
    found = scores.log_probabilities(base.model, prompt, continuations)
    assert found == pytest.approx([by_hand(base.model, prompt + c, 11) for c in continuations], abs=1e-4)
    assert scores.log_probabilities(base.model, prompt, [[7], [9]]) == pytest.approx(
        [by_hand(base.model, [*prompt, token], 11) for token in (7, 9)], abs=1e-4
    )


def test_the_right_value_has_the_rank_of_its_probability(base):
    question = questions(person(2))[4]
    prompt, values = base.chat.prompt(question), base.chat.values(question)
    found = [by_hand(base.model, prompt + value, len(prompt)) for value in values]
    order = sorted(range(10), key=lambda i: -found[i])
    for index in range(10):
        asked = Question(Fact(question.fact.kind, index, ""), question.text, question.begins)
        choice = scores.choose(base.model, base.chat, asked)
        assert choice.rank == 1 + order.index(index)
        assert choice.nll == pytest.approx(-found[index], abs=1e-4)


def test_general_nll_is_the_mean_over_sentences_read_alone(base):
    ids = base.chat.ids
    each = [-by_hand(base.model, ids(begin + end), len(ids(begin))) for begin, end in scores.GENERAL]
    assert len(each) == 30
    assert scores.general_nll(base.model, base.chat) == pytest.approx(sum(each) / 30, abs=1e-4)


def test_divergence_of_two_coins():
    before, after = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    assert scores.divergence(before, after) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert scores.divergence(before, before) == 0


def test_own_texts_begin_with_the_question_and_depend_on_the_seed_alone(base):
    found = own_texts(base.model, base.chat, 0)
    torch.rand(3)
    before = torch.get_rng_state()
    assert torch.equal(found, own_texts(base.model, base.chat, 0))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(found, own_texts(base.model, base.chat, 1))
    assert b"Write about the history of Rome." in bytes(found[0].tolist())


# -- retrieval -------------------------------------------------------------------------------------------------------


def test_nearest_finds_the_sentences_that_share_rare_words():
    told = ["My dog is called Luna.", "I live in Lyon.", "My car is red.", "I play the harp."]
    assert nearest("What is my dog's name?", told, 1) == [0]
    assert nearest("In which city do I live?", told, 1) == [1]
    assert nearest("What colour is my car?", told, 2) == [0, 2]
    assert nearest("Nothing shared", told, 2) == [2, 3]


def test_nearest_is_the_cosine_of_tf_idf():
    told = [fact.told for fact in person(3)]
    words = [[w.strip(".,?").lower() for w in t.replace("'", " ").split()] for t in told]
    rare = {w: math.log((1 + len(told)) / (1 + sum(w in ws for ws in words))) + 1 for ws in words for w in ws}

    def vector(ws):
        counts = {w: n * rare[w] for w, n in Counter(ws).items() if w in rare}
        norm = math.sqrt(sum(v * v for v in counts.values())) or 1.0
        return {w: v / norm for w, v in counts.items()}

    for question in questions(person(3)):
        asked = vector([w.strip(".,?").lower() for w in question.text.replace("'", " ").split()])
        near = [sum(asked.get(w, 0.0) * v for w, v in vector(ws).items()) for ws in words]
        kept = nearest(question.text, told, 3)
        assert kept == sorted(kept)
        assert min(near[i] for i in kept) >= max(near[i] for i in range(10) if i not in kept) - 1e-12


# -- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:no protection")
def test_every_method_answers_and_does_not_change_the_base_model(base, name):
    before = copy.deepcopy(base.model.state_dict())
    out = tell_and_ask(base, METHODS[name], 0, options_of(name))
    assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items())
    assert len(out["ranks"]) == 30
    assert all(1 <= rank <= 10 for rank in out["ranks"])
    frozen = tell_and_ask(base, METHODS["frozen"], 0, {})
    learns = name.startswith(("online", "LoRA"))
    assert (out["drift"] > 0) == (out["own_drift"] > 0) == learns
    assert (out["general"] != frozen["general"]) == learns
    assert (out["nll"] == frozen["nll"]) == (name == "frozen")
    again = tell_and_ask(base, METHODS[name], 0, options_of(name))
    timed = {"told_seconds": 0, "asked_seconds": 0}
    assert {**out, **timed} == {**again, **timed}


def test_what_stands_before_a_question(base):
    facts = person(4)
    question = questions(facts)[0]

    def before(kind, **options):
        contender = kind(base, options, 0)
        contender.tell(facts)
        return contender.before(question)

    assert before(contenders.Contender) == []
    assert before(contenders.InContext) == session(facts)
    assert before(contenders.OwnFact) == telling(question.fact)
    assert len(before(contenders.Retrieval, count=3)) == 6


def test_telling_more_often_is_reading_more_often(base):
    facts, options = person(2), {"lr": 0.05}
    four = contenders.Online(base, {**options, "times": 4}, 0)
    four.tell(facts)
    once = contenders.Online(base, {**options, "times": 1}, 0)
    for _ in range(4):
        for fact in facts:
            ids = torch.tensor([base.chat.ids(base.chat.text(telling(fact)))])
            once.learner.observe(ids)
    for ours, theirs in zip(four.learner.layers, once.learner.layers, strict=True):
        torch.testing.assert_close(ours.effective_weight(), theirs.effective_weight(), rtol=1e-5, atol=1e-6)


def test_lora_makes_what_was_told_more_probable_and_padding_teaches_nothing(base):
    facts = person(1)
    text = base.chat.text(telling(facts[0]))
    ids = base.chat.ids(text)
    losses = []
    for steps in (0, 8):
        lora = contenders.LoRA(base, {"rank": 2, "lr": 1e-2, "steps": steps}, 0)
        lora.tell(facts)
        losses.append(-by_hand(lora.model, ids, 1))
    assert losses[0] == pytest.approx(-by_hand(base.model, ids, 1), abs=1e-3)
    assert losses[1] < losses[0] - 1


# -- the suite -------------------------------------------------------------------------------------------------------


def test_figures_of_a_run_made_by_hand():
    suite = FactsSuite()
    frozen = {"method": "frozen", "ranks": [1, 4, 3, 2], "nll": 3.0, "general": 1.5, "drift": 0.0, "own_drift": 0.0}
    run = {"method": "LoRA", "ranks": [1, 1, 1, 3], "nll": 0.5, "general": 1.56, "drift": 0.2, "own_drift": 0.1}
    for record in (frozen, run):
        record |= {"told_seconds": 1.0, "asked_seconds": 2.0}
    others = {"frozen": frozen}
    found = suite.measure(run, others)
    assert set(found) == {figure.name for figure in suite.figures}
    assert found["right"] == 0.75
    assert found["rank"] == 1.5
    assert found["general"] == pytest.approx(0.06)
    assert suite.score(run, others) == pytest.approx(0.75 - 10 * 0.05)
    assert suite.score(frozen, {}) == 0.25
    assert suite.measure(run, {})["general"] is None


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method must be one of"):
        method("magic")
