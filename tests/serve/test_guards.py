"""Guards of users in a server: a lesson or a study beyond the bound is undone as a whole, and what is kept agrees."""

import math
import time

import httpx
import pytest
import torch
from guards_by_hand import loss_of, without_guard
from test_service_faults import until
from tiny_chat_model import Answer, byte_tokenizer, learner_of, service_of, tiny_chat_model
from tiny_models import assert_same
from web import NAME, client_of, served

import ttt
from ttt.conversation import Telling
from ttt.learn.own_text import TOPICS
from ttt.per_user.guards import UserGuards
from ttt.serve.errors import Conflict, Tripped
from ttt.serve.http.metrics import Metrics
from ttt.serve.main import guard_users
from ttt.serve.teaching import Lesson
from ttt.store import UnknownUser


def words(length):
    return torch.randint(0, 256, (length,)).tolist()


def lesson_of(length=30):
    return Lesson.of(words(length), [True] * length, 500)


def guarded(model, bound=1e6):
    """A learner whose guards do as a server's, on random tokens; a bound that nothing reaches, to be lowered."""
    learner = learner_of(model)
    learner.user_guards = UserGuards(
        learner.model, [torch.randint(0, 256, (2, 20)) for _ in range(2)], threshold=bound, bound=bound, every=None,
        cap=1.0, surprise=math.inf,
    )  # fmt: skip
    return learner


def test_a_guard_that_does_not_trip_changes_no_bit(model, tmp_path):
    lessons = [lesson_of() for _ in range(3)]
    service = service_of(model, tmp_path, learner=guarded(model))
    for lesson in lessons:
        assert Answer(service, "ada", words(5), lesson, wait=True).wait().end.learning == "stored"
    drift, known = service.sessions.get("ada").drift, torch.cat(service.learner.user_guards.batches)
    assert drift == pytest.approx(
        loss_of(service.learner, known, "ada") / loss_of(service.learner, known) - 1, abs=1e-5
    )
    service.study("ada", passes=2).result(60)
    assert service.sessions.get("ada").drift != drift
    assert service.drain() == []
    plain = learner_of(model)
    for lesson in lessons:
        ids, mask = lesson.tensors()
        plain.observe(ids, learn_mask=mask, users=["ada"], **Telling().of(lesson.tokens).options)
    plain.study("ada", passes=2)
    assert_same(plain.pool.export("ada"), without_guard(ttt.Store(tmp_path).get("ada").tensors))


def test_a_lesson_beyond_the_bound_is_undone_as_a_whole(model, tmp_path):
    metrics, learner = Metrics(), guarded(model)
    guards = learner.user_guards
    service = service_of(model, tmp_path, learner=learner, observer=metrics)
    good, bad = lesson_of(), lesson_of()
    assert Answer(service, "ada", words(5), good, wait=True).wait().end.version == 1
    before, prompt = learner.pool.export("ada"), words(9)
    answered = Answer(service, "ada", prompt, logprobs=0).wait()
    bound, guards.bound, guards.threshold = guards.bound, -1.0, -1.0
    outcome = Answer(service, "ada", prompt, bad, wait=True).wait().end
    assert outcome.learning.startswith("refused: nothing was learnt: with it the loss on the guard's held-back text")
    assert (outcome.updates, outcome.version) == (1, 1)
    assert Answer(service, "ada", prompt, bad).wait().end.learning == "queued"  # it had been sent before the lesson
    again = Answer(service, "ada", prompt, logprobs=0).wait()
    assert (again.tokens(), again.end.updates) == (answered.tokens(), 1)
    with pytest.raises(Tripped, match=r"nothing was learnt: .*; go back to an earlier version, or forget the user"):
        service.learn("ada", bad).result(60)
    with pytest.raises(Tripped, match=r"the study was refused: .*; nothing was changed"):
        service.study("ada", passes=1).result(60)
    assert_same(before, learner.pool.export("ada"))
    assert [episode.studied for episode in learner.episodes.of("ada")] == [False]
    session = service.sessions.get("ada")
    assert (session.trips, session.updates, session.tokens) == (4, 1, good.tokens)
    assert metrics.registry.get_sample_value("ttt_guard_trips_total") == 4
    assert metrics.registry.get_sample_value("ttt_failures_total", {"kind": "learn"}) is None
    with pytest.raises(Tripped):
        service.learn("bob", bad).result(60)  # who has never learnt anything
    assert not learner.episodes.of("bob")
    guards.bound = guards.threshold = bound
    assert Answer(service, "ada", words(5), bad, wait=True).wait().end.version == 2
    service.rollback("ada", 1).result(60)
    assert service.sessions.get("ada").trips == 4
    assert service.drain() == []
    store = ttt.Store(tmp_path)
    assert_same(before, store.get("ada").tensors)
    assert [version.number for version in store.history("ada")] == [3, 2, 1]
    with pytest.raises(UnknownUser):
        store.get("bob")


@pytest.mark.parametrize("back", ["study", "rollback"])
def test_a_study_that_is_refused_is_not_tried_again_after_each_lesson(model, tmp_path, monkeypatch, back):
    learner = guarded(model)
    service = service_of(model, tmp_path, learner=learner, study_after=0.05)
    require, steps, tried, refuses = learner.user_guards.require_within, learner.study_in_steps, [], [True]

    def within(user):
        if refuses[0]:
            raise ttt.GuardTripped("too far", 1.0)
        return require(user)

    def counted(user, **options):
        tried.append(user)
        return steps(user, **options)

    monkeypatch.setattr(learner.user_guards, "require_within", within)
    monkeypatch.setattr(learner, "study_in_steps", counted)

    def learn(user):
        service.learn(user, lesson_of()).result(60).stored.result(60)

    learn("ada")
    until(lambda: service.sessions.get("ada").trips == 1)
    for _ in range(2):
        learn("ada")
        time.sleep(0.3)
    assert tried == ["ada"]
    assert [episode.studied for episode in learner.episodes.of("ada")] == [False] * 3
    with pytest.raises(Tripped):
        service.study("ada", passes=1).result(60)
    learn("ada")
    learn("bob")  # others are studied as before
    until(lambda: tried == ["ada", "ada", "bob"])
    refuses[0], count = False, len(tried) + (back == "study")
    if back == "study":
        service.study("ada", passes=1).result(60)
        learn("ada")
    else:
        service.rollback("ada", 2).result(60)
    until(lambda: "ada" in tried[count:] and all(episode.studied for episode in learner.episodes.of("ada")))
    assert service.drain() == []


def test_what_a_job_has_done_is_counted_when_its_result_is_there(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path, learner=guarded(model))
    guards, ended, trips = service.learner.user_guards, service._jobs._ended, []

    def slowly(job):
        time.sleep(0.1)
        ended(job)

    monkeypatch.setattr(service._jobs, "_ended", slowly)
    guards.bound = guards.threshold = -1.0
    for count in range(1, 4):
        with pytest.raises(Tripped):
            service.learn("ada", lesson_of()).result(60)
        trips.append(service.sessions.get("ada").trips)
        assert service.waiting == 0
        assert trips[-1] == count
    monkeypatch.setattr(service._jobs, "_ended", lambda job: (ended(job), 1 / 0))  # who waits hears of it all the same
    with pytest.raises(Tripped):
        service.learn("ada", lesson_of()).result(60)
    assert service.drain() == []


@pytest.mark.parametrize("kind", ["lesson", "study"])
def test_what_is_undone_as_the_lease_was_lost_leaves_no_drift(model, tmp_path, monkeypatch, kind):
    service = service_of(model, tmp_path, learner=guarded(model))
    service.learn("ada", lesson_of()).result(60).stored.result(60)
    before, drift = service.export("ada").result(60), service.sessions.get("ada").drift

    def lost(user, tokens):
        raise Conflict("the lease was lost", code="read_only")

    monkeypatch.setattr(service.sessions, "learnt", lost)
    with pytest.raises(Conflict, match="the lease was lost"):
        (service.learn("ada", lesson_of()) if kind == "lesson" else service.study("ada", passes=2)).result(60)
    assert service.sessions.get("ada").drift == drift
    assert_same(without_guard(before), without_guard(service.export("ada").result(60)))
    service.drain()


def test_clients_and_prometheus_see_the_guard(model, tmp_path):
    metrics, learner = Metrics(), guarded(model)
    service = service_of(model, tmp_path, learner=learner, observer=metrics)
    with served(service, metrics=metrics) as url:
        client = client_of(url, user="ada", learn="wait")

        def say():
            answer = client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "My dog is called Biscuit."}], max_tokens=2
            )
            return answer.model_extra["ttt"]

        assert say()["learning"] == "stored"
        guard = httpx.get(f"{url}/v1/users/ada").json()["guard"]
        drift = service.sessions.get("ada").drift
        assert guard == {"bound": 1e6, "drift": pytest.approx(drift), "trips": 0}
        learner.user_guards.bound = learner.user_guards.threshold = -1.0
        found = say()
        assert found["learning"].startswith("refused: nothing was learnt: with it the loss")
        assert (found["updates"], found["version"]) == (1, 1)
        answer = httpx.post(f"{url}/v1/users/ada/learn", json={"text": "It rains."})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "guard")
        assert httpx.get(f"{url}/v1/users/ada").json()["guard"] == guard | {"bound": -1.0, "trips": 2}
        assert "ttt_guard_trips_total 2.0" in httpx.get(f"{url}/metrics").text
    with served(service_of(model, tmp_path)) as url:
        assert client_of(url, user="ada").chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "Hi"}], max_tokens=1
        )
        assert httpx.get(f"{url}/v1/users/ada").json()["guard"] is None


def test_a_user_can_move_between_servers_with_and_without_guards(model, tmp_path):
    lessons = [lesson_of() for _ in range(3)]
    for at, guard in enumerate((True, False, True)):
        service = service_of(model, tmp_path, learner=guarded(model) if guard else learner_of(model))
        assert Answer(service, "ada", words(5), lessons[at], wait=True).wait().end.version == at + 1
        assert service.drain() == []
        names = {name for name in ttt.Store(tmp_path).get("ada").tensors if name.startswith("ttt.guard.")}
        assert names == ({"ttt.guard.progress"} if guard else set())
    ttt.export_peft(ttt.Store(tmp_path).get("ada").tensors, tmp_path / "adapter", base_model="tiny")


def test_a_guard_measures_on_what_the_model_wrote_however_long_its_template_is(tmp_path):
    model, tokenizer = tiny_chat_model(), byte_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)  # each next token is certain, so that drawing is choosing the likeliest
    system = "<|im_start|>system\n" + "You are a careful assistant. " * 5 + "<|im_end|>\n"
    tokenizer.chat_template = system + tokenizer.chat_template
    learner = learner_of(model)
    guard_users(learner, tmp_path / "calibration", tokenizer, 0.05)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Write about {topic}."}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for topic in TOPICS[:8]
    ]
    shortest = min(map(len, prompts))
    assert shortest > 100
    ids = torch.tensor([prompt[-shortest:] for prompt in prompts])
    model.generation_config.eos_token_id = None
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=96, do_sample=False)
    assert torch.equal(torch.cat(learner.user_guards.batches), wanted[:, -32:])


def test_the_text_of_a_guard_is_written_once_and_is_that_of_its_model(model, tmp_path):
    file = tmp_path / "calibration.safetensors"
    first, second = learner_of(model), learner_of(model)
    guard_users(first, file, None, 0.05)
    guard_users(second, file, None, 0.1)
    assert [text.shape for text in first.user_guards.batches] == [(4, 32), (4, 32)]
    for mine, theirs in zip(first.user_guards.batches, second.user_guards.batches, strict=True):
        assert torch.equal(mine, theirs)
    assert (first.user_guards.bound, second.user_guards.bound) == (0.05, 0.1)
    assert first.pool.companion is first.user_guards
    other = learner_of(tiny_chat_model(seed=1))
    with pytest.raises(ValueError, match="must be the guard's text of this model and configuration"):
        guard_users(other, file, None, 0.05)
    (tmp_path / "calibration-guard.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="must be a guard's text, but cannot be read"):
        guard_users(other, file, None, 0.05)
    for bound in (0.0, math.inf):
        with pytest.raises(ValueError, match="guard must be"):
            guard_users(other, file, None, bound)
    assert other.pool.companion is None
