"""The suite "facts": people and questions, scores against plain forward passes, and every method on a tiny model."""

import copy
import functools
import math
import types
from collections import Counter

import pytest
import torch

import bench.learning.facts.run
import ttt
from bench.learning.experiments import telling as hundreds
from bench.learning.facts import contenders, memit, tables
from bench.learning.facts.methods import METHODS, TALKING, method
from bench.learning.facts.people import FRIENDS, KINDS, OTHERS, corrected, of_friends, of_things, other_person, person
from bench.learning.facts.questions import about_the_neighbour, questions
from bench.learning.facts.run import CHAT, SCENARIOS, _general, run
from bench.learning.facts.suite import FactsSuite
from bench.learning.language.base import Base
from ttt.demo import knowledge
from ttt.demo.knowledge import GENERAL_KNOWLEDGE
from ttt.demo.questions import Template, session, telling, written
from ttt.demo.retrieval import nearest


class Bytes:
    """A tokenizer whose tokens are bytes, with a short chat template."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return types.SimpleNamespace(input_ids=list(text.encode()))

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        return "".join(f"<{m['role'][0]}>{m['content']}.\n" for m in messages) + "<a>" * add_generation_prompt

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """Answers of 2 tokens: the tiny model, whose tokens are bytes, ends none of them by itself."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bench.learning.facts.run, "written", functools.partial(written, tokens=2))
        yield


@pytest.fixture(scope="module")
def base():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.3,
    )  # fmt: skip
    return Base(
        LlamaForCausalLM(config).eval(), lambda text: torch.tensor(list(text.encode())),
        lambda: torch.randint(256, (8, 40), generator=torch.Generator().manual_seed(0)), GENERAL_KNOWLEDGE[:3], Bytes(),
    )  # fmt: skip


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
    template, facts = Template(Bytes()), person(1)
    question, told = questions(facts)[0]
    prompt = bytes(template.prompt(question, session([fact.told for fact in facts]))).decode()
    assert told == facts[0].told
    assert all(fact.told in prompt for fact in facts)
    assert prompt.endswith(f"<u>{question.text}.\n<a>{question.begins}")
    alone = bytes(template.prompt(question)).decode()
    assert facts[0].value not in alone
    assert question.values[question.right] == facts[0].value
    assert len(questions(facts)) == 30


def test_of_a_turn_the_persons_words_and_their_end_are_learnt_but_the_first_token():
    ids, said = Template(Bytes()).turn("I live in Lyon")
    assert bytes(t for t, mine in zip(ids, said, strict=True) if mine) == b" live in Lyon."
    assert bytes(ids).decode().endswith("<u>I live in Lyon.")


def test_five_facts_are_corrected_with_other_values_of_their_kinds():
    facts = person(4)
    before = {fact.kind: fact.index for fact in facts}
    later = corrected(facts, 4)
    assert len({fact.kind for fact in later}) == 5
    for fact in later:
        assert before[fact.kind] != fact.index
        assert fact.value in fact.told
        assert fact.told not in [each.told for each in facts]
    assert later == corrected(facts, 4)


def test_another_person_says_the_same_with_other_values():
    facts = person(6)
    for fact, other in zip(facts, other_person(facts, 6), strict=True):
        assert (fact.kind, fact.index) != (other.kind, other.index)
        assert fact.kind == other.kind
        assert other.told.replace(other.value, fact.value) == fact.told
    assert len({tuple(each.index for each in other_person(facts, seed)) for seed in range(9)}) == 9


def test_other_facts_are_different_ones():
    friends, things = of_friends(2, 50), of_things(2, 500)
    assert len({fact.told for fact in friends}) == 50
    assert all(fact.value in fact.told and any(name in fact.told for name in FRIENDS) for fact in friends)
    assert len(set(things)) == 500
    assert of_things(2, 50) == things[:50]
    values = {value for kind in KINDS.values() for value in kind.values}
    assert not [t for t in of_things(0, 200) for v in values if v in t and v not in {"Rome"}]


def test_the_neighbour_is_asked_about_the_same_kind():
    facts = person(2)
    for fact, (question, _) in zip(facts, about_the_neighbour(facts), strict=True):
        assert "neighbour" in question.text
        assert question.values == KINDS[fact.kind].values
        assert (question.text, question.begins) == OTHERS[fact.kind][2]


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

    for question, _ in questions(person(3)):
        asked = vector([w.strip(".,?").lower() for w in question.text.replace("'", " ").split()])
        near = [sum(asked.get(w, 0.0) * v for w, v in vector(ws).items()) for ws in words]
        kept = nearest(question.text, told, 3)
        assert kept == sorted(kept)
        assert min(near[i] for i in kept) >= max(near[i] for i in range(10) if i not in kept) - 1e-12


# -- methods ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen(base):
    """What a run of the model that learns nothing finds."""
    return run(base, METHODS["frozen"], "ten facts", 0, {})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_answers_and_does_not_change_the_base_model(base, frozen, name):
    before = copy.deepcopy(base.model.state_dict())
    options = options_of(name)
    out = run(base, METHODS[name], "ten facts", 0, options)
    assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items())
    assert len(out["ranks"]) == 30
    assert all(1 <= rank <= 10 for rank in out["ranks"])
    learns = name.startswith(("online", "LoRA", "MEMIT", "study"))
    assert (out["kl"] > 0) == learns
    assert (out["general"] != frozen["general"]) == learns
    assert (out["texts"] != frozen["texts"]) == learns
    assert (out["nll"] == frozen["nll"]) == (name == "frozen")
    assert 0.0 <= out["written"] <= 1.0
    again = run(base, METHODS[name], "ten facts", 0, options)
    timed = {"told_seconds": 0, "asked_seconds": 0}
    assert {**out, **timed} == {**again, **timed}


def test_a_conversation_is_measured_on_the_way(base):
    found = hundreds.run(base, TALKING, 7, (0, 3))
    assert [row["other sentences"] for row in found["rows"]] == [0, 3]
    assert all(0 <= row["right"] <= 1 and row["kl"] > 0 for row in found["rows"])
    assert found["new_values"] > 0
    assert found["options"]["budget"] == ttt.DriftBudget().nats


@pytest.mark.parametrize("name", ["frozen", "study (a user's weights)"])
def test_sentences_that_are_read_together_have_the_loss_of_each_alone(base, name):
    contender = METHODS[name].make(base, options_of(name), 0)
    contender.tell([person(1)[0].told])
    facts = knowledge.as_facts([*GENERAL_KNOWLEDGE[:9], ("a", "bc"), ("b", "cd")], base.encode)
    with contender.answering(1):
        alone = knowledge.facts_loss(contender.model, facts)
    assert _general(contender, facts) == pytest.approx(alone, rel=1e-5)


def test_what_stands_before_a_question(base):
    told = [fact.told for fact in person(4)]
    asked = questions(person(4))[0]

    def before(kind, **options):
        contender = kind(base, options, 0)
        contender.tell(told[:4])
        contender.tell(told[4:])
        return contender.before(asked)

    assert before(contenders.Contender) == []
    assert before(contenders.InContext) == session(told)
    assert before(contenders.OwnFact) == telling(told[0])
    assert len(before(contenders.Retrieval, count=3)) == 6


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_is_said_comes_in_chats_and_what_is_asked_is_in_them(base, scenario):
    chats, others = [], []

    class Spy(contenders.Contender):
        def tell(self, sentences):
            chats.append(list(sentences))

        def tell_by_another(self, sentences):
            others.extend(sentences)

    found = types.SimpleNamespace(make=Spy)
    out = run(base, found, scenario, 3, {})
    plan = SCENARIOS[scenario](3)
    said, facts = plan.said, plan.facts
    assert others == plan.by_another
    assert [each for chat in chats for each in chat] == said
    assert all(len(chat) == CHAT for chat in chats[:-1])
    assert chats[0] == [fact.told for fact in person(3)]
    assert all(fact.told in said for fact in facts)
    assert len(out["ranks"]) == 3 * len(facts)


def test_passes_and_emphasis_are_those_of_observe(base):
    told = [fact.told for fact in person(2)]
    contender = contenders.Online(base, {"passes": 3, "emphasis": 2.0}, 0)
    contender.tell(told)
    found = [layer.effective_weight().clone() for layer in contender.learner.layers]
    learner = base.learner(contenders.CONFIG)
    for sentence in told:
        ids, said = contender.template.turn(sentence)
        for _ in range(3):
            learner.observe(torch.tensor([ids]), learn_mask=torch.tensor([said]), emphasis=2.0)
    for ours, layer in zip(found, learner.layers, strict=True):
        torch.testing.assert_close(ours, layer.effective_weight(), rtol=1e-5, atol=1e-6)


def test_studying_makes_what_was_told_more_probable(base):
    told = [fact.told for fact in person(1)]

    def loss(**options):
        contender = contenders.Online(base, options, 0)
        contender.tell(told)
        ids, said = contender.template.turn(told[0])
        with torch.no_grad(), contender.answering(1):
            logits = contender.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        return float(each[torch.tensor(said[1:])].mean())

    online = loss()
    assert loss(study=True) < online - 0.02
    assert loss(study=True, rank=32, window=64) < online - 0.02


def test_lora_makes_what_was_told_more_probable_and_padding_teaches_nothing(base):
    told = [fact.told for fact in person(1)]
    losses = []
    for steps in (0, 8):
        lora = contenders.LoRA(base, {"rank": 2, "lr": 1e-2, "steps": steps}, 0)
        lora.tell(told)
        ids, said = lora.template.turn(told[0])
        with torch.no_grad():
            logits = lora.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        losses.append(float(each[torch.tensor(said[1:])].mean()))
    assert losses[1] < losses[0] - 0.02


def test_what_another_person_says_reaches_whoever_shares_the_weights(base):
    asked = questions(person(1))[0]
    for name, shared in [("frozen", False), ("in context", False), ("retrieval", False), ("LoRA", True),
                         ("MEMIT", True), ("study", True), ("study (a user's weights)", False)]:  # fmt: skip
        contender = METHODS[name].make(base, options_of(name), 0)
        contender.tell([person(1)[0].told])
        before = answers(contender, asked)
        contender.tell_by_another([fact.told for fact in other_person(person(1), 1)])
        assert torch.equal(answers(contender, asked), before) != shared, name


def answers(contender, asked):
    ids = torch.tensor([contender.template.prompt(asked[0], contender.before(asked))])
    with torch.no_grad(), contender.answering(1):
        return contender.model(input_ids=ids).logits[:, -1]


def test_an_edit_makes_what_was_told_more_probable_and_changes_its_layers_only(base):
    model = copy.deepcopy(base.model).double()
    turns = [Template(Bytes()).turn(fact.told) for fact in person(1)[:2]]
    layers = [3]
    (moment,) = memit.second_moments(model, layers, base.own)
    seen = []
    handle = model.model.layers[3].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        model(input_ids=base.own)
    rows = seen[0].flatten(0, 1)
    torch.testing.assert_close(moment, rows.T @ rows / len(rows))
    before, weight = copy.deepcopy(model), 1e-3
    handle.remove()
    memit.edit(model, turns, layers, [moment], weight)
    losses = []
    for each in (before, model):
        total = 0.0
        for ids, said in turns:
            logits = each(input_ids=torch.tensor([ids])).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            total += float(nll[torch.tensor(said[1:])].mean().detach())
        losses.append(total)
    assert losses[1] < 0.7 * losses[0]
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) == (name != "model.layers.3.mlp.down_proj.weight")


# -- the suite -------------------------------------------------------------------------------------------------------


def test_figures_of_a_run_made_by_hand():
    suite = FactsSuite()
    frozen = {"method": "frozen", "ranks": [1, 4, 3, 2], "nll": 3.0, "general": 1.5, "kl": 0.0, "texts": [3, 2, 1]}
    run = {"method": "LoRA", "ranks": [1, 1, 1, 3], "nll": 0.5, "general": 1.56, "kl": 0.2, "texts": [3, 2.3, 1.3]}
    for record in (frozen, run):
        record |= {"written": 0.25, "neighbour": 0.5, "told_seconds": 1.0, "asked_seconds": 2.0}
    others = {"frozen": frozen}
    found = suite.measure(run, others)
    assert set(found) == {figure.name for figure in suite.figures}
    assert found["right"] == 0.75
    assert found["rank"] == 1.5
    assert found["written"] == 0.25
    assert found["general"] == pytest.approx(0.06)
    assert found["texts"] == pytest.approx(0.2)
    assert suite.score(run, others) == pytest.approx(0.75 - 10 * 0.05)
    assert suite.score(frozen, {}) == 0.25
    assert suite.measure(run, {})["general"] is None


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method must be one of"):
        method("magic")


def test_tables_show_what_was_run_and_with_how_many_people():
    def row(scenario, method, right, people):
        figures = ("right", "written", "rank", "kl", "general", "texts", "neighbour", "told", "asked")
        return {"scenario": scenario, "method": method, "seeds": people} | {name: [right, None] for name in figures}

    found = {"rows": [row("ten facts", "frozen", 0.1, 3), row("ten facts", "study", 0.85, 3),
                      row("50 things", "study", 0.75, 1)]}  # fmt: skip
    assert tables.by_scenario(found) == [
        ("method", "ten facts (3)", "50 things (1)"), ("frozen", "0.10", ""), ("study", "0.85", "0.75"),
    ]  # fmt: skip
    assert [line[0] for line in tables.costs(found)] == ["method", "frozen", "study"]
    assert "right when written" in tables.costs(found)[0]
    older = {"rows": [{name: value for name, value in each.items() if name != "written"} for each in found["rows"]]}
    assert "right when written" not in tables.costs(older)[0]
    machine = {"processor": "a processor", "cores": 2, "threads": 1, "torch": "2"}
    assert tables.about({"machine": machine, "date": "2026-11-28"})[1][-1] == "2026-11-28"
