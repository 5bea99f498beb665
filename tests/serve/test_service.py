"""The service: what is learnt from requests, in which order, and what survives."""

import subprocess
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_chat_model import Answer, learner_of, service_of, slowed
from tiny_models import assert_same

import ttt
from ttt.conversation import Telling
from ttt.serve import writer as writer_module
from ttt.serve.errors import Conflict, NotFound, TooBusy, Unavailable
from ttt.serve.limits import Limits
from ttt.serve.teaching import Lesson, Teaching
from ttt.store import StorageFailure, UnknownUser


def words(length):
    return torch.randint(0, 256, (length,)).tolist()


def lesson_of(length=30, teach=0.5):
    learn = (torch.rand(length) < teach).tolist()
    return Lesson.of(words(length), [*learn[:-1], True], 500)


def learned(learner, lessons, user="ada", telling=None):
    """The state of ``user`` after ``lessons``, by a learner that does nothing else."""
    for lesson in lessons:
        ids, mask = lesson.tensors()
        learner.observe(ids, learn_mask=mask, users=[user], **(telling or Telling().of(lesson.tokens)).options)
    return learner.pool.export(user)


def stored(store, user):
    return ttt.Store(store).get(user).tensors


def test_a_turn_is_learnt_after_the_answer_and_the_next_request_has_it(model, tmp_path):
    service, reference = service_of(model, tmp_path), learner_of(model)
    prompt, lessons = words(20), [lesson_of() for _ in range(3)]
    before = Answer(service, None, prompt, logprobs=0).wait()
    found = []
    for lesson in lessons:
        answer = Answer(service, "ada", prompt, lesson, logprobs=0).wait()
        assert answer.end.learning == "queued"
        found.append(answer)
    after = Answer(service, "ada", prompt, logprobs=0).wait()
    assert [each.end.updates for each in [*found, after]] == [0, 1, 2, 3]
    with torch.no_grad():
        for count, answer in enumerate([*found, after]):
            state = learner_of(model)
            learned(state, lessons[:count]) if count else state.pool.open("ada")
            ids = torch.tensor([prompt + answer.tokens()])
            with ttt.users(state.model, ["ada"]):
                logits = state.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores = [score.logprob for piece in answer.pieces for score in piece.tokens]
            wanted = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(scores), wanted, rtol=0, atol=1e-4)
    assert service.drain() == []
    assert_same(learned(reference, lessons), stored(tmp_path, "ada"))
    base = service_of(model, tmp_path / "other")
    assert Answer(base, None, prompt, logprobs=0).wait().tokens() == before.tokens()
    base.drain()


def test_how_a_lesson_is_read_is_the_services_choice_or_that_of_the_lesson(model, tmp_path):
    lessons, once = [lesson_of(), lesson_of()], Telling(1, 1.0)
    service = service_of(model, tmp_path, telling=once)
    service.learn("ada", lessons[0]).result(60)
    service.learn("bob", lessons[0], Telling(3, 5.0)).result(60)
    assert service.drain() == []
    plain = learned(learner_of(model), lessons[:1], telling=once)
    assert_same(plain, stored(tmp_path, "ada"))
    assert_same(learned(learner_of(model), lessons[:1], "bob", Telling(3, 5.0)), stored(tmp_path, "bob"))
    told = learned(learner_of(model), lessons[:1])
    assert any(not torch.equal(told[name], plain[name]) for name in told)


def test_many_users_at_once_each_end_as_if_alone(model, tmp_path):
    """More users than slots: evictions, openings, learning and decoding side by side."""
    service = service_of(model, tmp_path, slots=2, rows=3)
    users, lessons = ["ada", "bob", "cy", "dee", "eve"], {}
    answers, lock = [], threading.Lock()

    def talk(user, turns):
        for lesson in turns:
            answer = Answer(service, user, words(10), lesson, max_tokens=4, wait=True).wait()
            with lock:
                answers.append(answer)

    threads = []
    for user in users:
        lessons[user] = [lesson_of(24) for _ in range(4)]
        threads.append(threading.Thread(target=talk, args=(user, lessons[user])))
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert {answer.end.learning for answer in answers} == {"stored"}
    assert service.drain() == []
    for user in users:
        reference = learner_of(model, slots=1)
        # Their state is written and read again between turns, which changes no bit.
        assert_same(learned(reference, lessons[user], user), stored(tmp_path, user))
        assert [version.number for version in ttt.Store(tmp_path).history(user)] == [4, 3, 2, 1]


def test_a_user_who_comes_back_while_the_lease_is_being_given_up_is_learnt_from(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path, slots=1)
    release = ttt.store.Lease.release

    def slowly(lease):
        time.sleep(0.5)
        release(lease)

    monkeypatch.setattr(ttt.store.Lease, "release", slowly)
    for _ in range(2):
        assert Answer(service, "ada", words(5), lesson_of(), max_tokens=1, wait=True).wait().end.learning == "stored"
        Answer(service, "bob", words(5), max_tokens=1).wait()  # takes the only slot
    service.drain()
    assert ttt.Store(tmp_path).get("ada").meta["updates"] == 2


def test_what_was_acknowledged_survives_a_kill(forks, model, tmp_path):
    script = """
        import sys, torch
        sys.path[:0] = [{tests!r}, {serve!r}]
        from tiny_chat_model import Answer, service_of, tiny_chat_model
        from ttt.serve.teaching import Lesson
        service = service_of(tiny_chat_model(), {store!r}, lease_seconds=1.0)
        torch.manual_seed(5)
        while True:
            ids = torch.randint(0, 256, (20,)).tolist()
            answer = Answer(service, "ada", ids[:5], Lesson.of(ids, [True] * 20, 99), max_tokens=2, wait=True).wait()
            print(answer.end.learning, answer.end.updates, flush=True)
    """
    here = Path(__file__).parent
    code = textwrap.dedent(script).format(tests=str(here.parent), serve=str(here), store=str(tmp_path))
    process = forks.start(["-c", code], stdout=subprocess.PIPE)
    lines = [process.stdout.readline() for _ in range(4)]
    process.kill()
    process.wait()
    process.stdout.close()
    acknowledged = [line.split() for line in lines]
    assert [learning for learning, _ in acknowledged] == ["stored"] * 4
    newest = int(acknowledged[-1][1])
    torch.manual_seed(5)
    reference, states = learner_of(model), {}
    for count in range(1, newest + 8):
        ids = torch.randint(0, 256, (20,)).tolist()
        states[count] = learned(reference, [Lesson.of(ids, [True] * 20, 99)])
    found = ttt.Store(tmp_path).get("ada")
    assert found.meta["updates"] >= newest
    assert_same(states[found.meta["updates"]], found.tensors)
    # The user moves to another server within the length of the lease.
    service = service_of(model, tmp_path, lease_seconds=1.0)
    began = time.monotonic()
    while Answer(service, "ada", words(5), lesson_of(), max_tokens=1, wait=True).wait().end.learning != "stored":
        assert time.monotonic() - began < 20
        time.sleep(0.2)
    service.drain()


def test_two_servers_only_one_learns_and_the_other_reads_on(model, tmp_path):
    first, second = (service_of(model, tmp_path) for _ in range(2))
    lessons = [lesson_of() for _ in range(2)]
    assert Answer(first, "ada", words(9), lessons[0], wait=True).wait().end.learning == "stored"
    prompt = words(9)
    there = Answer(second, "ada", prompt, lesson_of(), logprobs=0).wait()
    assert "another server holds the lease" in there.end.learning
    assert there.end.learning.startswith("refused")
    here = Answer(first, "ada", prompt, logprobs=0).wait()
    assert there.tokens() == here.tokens()  # it reads the newest version
    with pytest.raises(Conflict, match="nothing was learnt: another server"):
        second.learn("ada", lessons[1]).result(60)
    with pytest.raises(Conflict, match="nothing was rolled back: another server"):
        second.rollback("ada", 1).result(60)
    with pytest.raises(Conflict, match="nothing was studied: another server"):
        second.study("ada").result(60)
    first.drain()
    assert_same(learned(learner_of(model), lessons[:1]), stored(tmp_path, "ada"))
    second.drain()
    third = service_of(model, tmp_path)
    assert third.learn("ada", lessons[1]).result(60).stored.result(60) == 2
    third.drain()
    assert_same(learned(learner_of(model), lessons), stored(tmp_path, "ada"))


def test_a_server_whose_lease_was_taken_over_loses_nothing_that_was_stored(model, tmp_path):
    service, store = service_of(model, tmp_path), ttt.Store(tmp_path)
    lesson = lesson_of()
    service.learn("ada", lesson).result(60).stored.result(60)
    with store.lease("ada", steal=True) as lease:
        store.put(lease, store.get("ada").tensors, {"updates": 7, "model": "tiny"})
    with pytest.raises(Conflict, match="taken over"):
        service.learn("ada", lesson_of()).result(60).stored.result(60)
    time.sleep(0.2)
    prompt = words(9)
    found = Answer(service, "ada", prompt, logprobs=0).wait()
    reference = learner_of(model)
    learned(reference, [lesson])
    with torch.no_grad(), ttt.users(reference.model, ["ada"]):
        first = reference.model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert found.pieces[0].tokens[0].logprob == pytest.approx(float(first.max()), abs=1e-4)
    service.drain()
    assert_same(learned(learner_of(model), [lesson]), stored(tmp_path, "ada"))


def test_of_a_user_who_was_forgotten_at_another_server_no_version_is_named(model, tmp_path):
    first, second = (service_of(model, tmp_path) for _ in range(2))
    first.learn("ada", lesson_of()).result(60).stored.result(60)
    second.forget("ada").result(60)
    end = Answer(first, "ada", words(9), lesson_of(), wait=True).wait().end
    assert end.learning.startswith("refused: what was learnt was not stored: another server has taken over")
    assert (end.updates, end.version) == (None, None)
    began = time.monotonic()
    while first.sessions.get("ada") is not None:
        assert time.monotonic() - began < 20
        time.sleep(0.01)
    off = Answer(first, "ada", words(9)).wait().end  # opened anew
    assert (off.updates, off.version) == (0, None)
    first.drain()
    second.drain()


def test_going_back_and_forgetting(model, tmp_path):
    service = service_of(model, tmp_path)
    lessons = [lesson_of() for _ in range(3)]
    for lesson in lessons:  # each is stored by itself: a slow store may keep two as one version
        service.learn("ada", lesson).result(60).stored.result(60)
    session = service.rollback("ada", 1).result(60)
    assert (session.version, session.updates) == (4, 4)
    one = learned(learner_of(model), lessons[:1])
    assert_same(one, service.export("ada").result(60))
    with pytest.raises(NotFound, match="version"):
        service.rollback("ada", 99).result(60)
    assert_same(one, service.export("ada").result(60))
    prompt = words(12)
    base = Answer(service, None, prompt, logprobs=0).wait()
    assert Answer(service, "ada", prompt, logprobs=0).wait().end.updates == 4
    service.forget("ada").result(60)
    with pytest.raises(UnknownUser):
        ttt.Store(tmp_path).get("ada")
    after = Answer(service, "ada", prompt, logprobs=0).wait()
    assert after.pieces == base.pieces  # to the bit
    assert after.end.updates == 0
    service.forget("nobody").result(60)
    service.drain()


def test_a_request_that_is_cancelled_teaches_nothing(model, tmp_path):
    service = service_of(model, tmp_path)
    answer = Answer(service, "ada", words(10), lesson_of(), max_tokens=400)
    while not answer.pieces:
        time.sleep(0.01)
    answer.request.cancelled = True
    after = Answer(service, "ada", words(10), max_tokens=1).wait()
    assert after.end.updates == 0
    assert answer.end is None
    service.drain()
    with pytest.raises(UnknownUser):
        ttt.Store(tmp_path).get("ada")


def test_a_lesson_that_nobody_waits_for_any_more_is_given_up_and_teaches_nothing(model, tmp_path):
    service = service_of(model, tmp_path)
    ended = service.learn("ada", lesson_of(400, 1.0), Telling(16, 20.0))
    layer = next(iter(service.pool.layers.values()))
    while not bool(layer.rows.any()):  # the first steps have been taken
        time.sleep(0.001)
    assert ended.cancel()
    service.drain()
    with pytest.raises(UnknownUser):
        ttt.Store(tmp_path).get("ada")


def test_a_lesson_that_fails_changes_nothing(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path)
    service.learn("ada", lesson_of()).result(60).stored.result(60)
    before = service.export("ada").result(60)
    layer = list(service.pool.layers.values())[-1]
    learn, calls = layer.learn, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        learn(*args)

    object.__setattr__(layer, "learn", failing)
    with pytest.raises(MemoryError):
        service.learn("ada", lesson_of(60, teach=1.0)).result(60)
    assert len(calls) == 3
    assert_same(before, service.export("ada").result(60))
    object.__setattr__(layer, "learn", learn)
    service.learn("ada", lesson_of()).result(60).stored.result(60)
    service.drain()


def test_a_store_that_fails_for_a_while_loses_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_RETRY", 0.05)
    monkeypatch.setattr("ttt.serve.jobs.LONGEST_WAIT", 60.0)
    service = service_of(model, tmp_path)
    put, broken = service.store.put, threading.Event()
    broken.set()

    def flaky(*args):
        if broken.is_set():
            raise StorageFailure("the disk is full")
        return put(*args)

    monkeypatch.setattr(service.store, "put", flaky)
    lessons = [lesson_of(12) for _ in range(service.sessions.most_unsaved)]
    learnt = [service.learn("ada", lesson).result(60) for lesson in lessons]
    monkeypatch.setattr("ttt.serve.jobs.LONGEST_WAIT", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(service.sessions.health, "stalled", lambda after: None)  # else that alone would refuse
        with pytest.raises(Unavailable, match="the store does not take what was learnt before"):
            service.learn("ada", lesson_of()).result(60)  # as many are unsaved as may be
    assert Answer(service, "ada", words(5)).wait().end.updates == len(lessons)
    assert not any(each.stored.done() for each in learnt)
    broken.clear()
    for each in learnt:
        each.stored.result(60)
    assert service.drain() == []
    assert_same(learned(learner_of(model), lessons), stored(tmp_path, "ada"))


def test_a_user_of_another_model_is_refused(model, tmp_path):
    store = ttt.Store(tmp_path)
    with store.lease("ada") as lease:
        store.put(lease, {"x": torch.zeros(2)}, {"model": "something else"})
    with store.lease("bob") as lease:
        store.put(lease, {"x": torch.zeros(2)})
    service = service_of(model, store)
    for user, why in (("ada", "another model"), ("bob", "do not fit")):
        end = Answer(service, user, words(5), lesson_of()).wait().end
        assert isinstance(end, Conflict)
        assert why in end.message
        with store.lease(user, wait=10):  # the server does not keep it
            pass
    assert Answer(service, "cy", words(5)).wait().text()
    service.drain()


def test_too_many_requests_are_refused_at_once(model, tmp_path):
    service = service_of(model, tmp_path, rows=1, waiting=3)
    long = Answer(service, None, words(10), max_tokens=450)
    time.sleep(0.2)
    waiting = [Answer(service, None, words(5), max_tokens=1) for _ in range(3)]
    with pytest.raises(TooBusy) as refused:
        Answer(service, None, words(5))
    assert refused.value.retry_after > 0
    for answer in [long, *waiting]:
        assert answer.wait().end.completion_tokens
    assert Answer(service, None, words(5)).wait().text()
    service.drain()


def test_draining_finishes_what_has_come_in_and_refuses_the_rest(model, tmp_path):
    service = service_of(model, tmp_path, rows=1)
    lessons = [lesson_of() for _ in range(3)]
    answers = [Answer(service, "ada", words(20), lesson, max_tokens=30) for lesson in lessons]
    assert service.drain() == []
    assert [answer.wait(1).end.learning for answer in answers] == ["queued"] * 3
    assert_same(learned(learner_of(model), lessons), stored(tmp_path, "ada"))
    with pytest.raises(Unavailable):
        Answer(service, None, words(5))
    with pytest.raises(Unavailable):
        service.learn("ada", lesson_of())
    with ttt.Store(tmp_path).lease("ada"):
        pass


def test_draining_with_a_deadline_refuses_what_is_not_served(model, tmp_path):
    service = service_of(model, tmp_path, rows=1)
    done = Answer(service, "ada", words(5), lesson_of(), max_tokens=1).wait()
    late = [Answer(service, None, words(9), max_tokens=480) for _ in range(4)]
    assert service.drain(timeout=0.05) == []
    assert done.end.learning == "queued"
    assert [isinstance(answer.wait(1).end, Unavailable) for answer in late] == [True] * 4
    assert ttt.Store(tmp_path).get("ada").version == 1


def test_what_was_said_is_studied_when_nothing_else_is_to_be_done(model, tmp_path):
    service = service_of(model, tmp_path, study_after=0.3)
    lesson = lesson_of(40, teach=1.0)
    service.learn("ada", lesson).result(60)
    ids, learn, base, now, studied = service.taught("ada", 5).result(60)[0]
    assert (ids, learn[1:], studied) == (lesson.ids, lesson.learn[1:], False)
    began = time.monotonic()
    while not service.taught("ada", 5).result(60)[0][4]:
        assert time.monotonic() - began < 60
        time.sleep(2)
    again = service.taught("ada", 5).result(60)[0]
    assert again[2] == base
    assert again[3] < now - 0.02
    reference = learner_of(model)
    learned(reference, [lesson])
    with torch.no_grad():
        logits = reference.model(input_ids=torch.tensor([lesson.ids[:-1]])).logits[0]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(lesson.ids[1:]), reduction="none")
    assert base == pytest.approx(float(nll[torch.tensor(lesson.learn[1:])].mean()), abs=1e-4)
    service.drain()
    reference.study("ada")
    assert_same(reference.pool.export("ada"), stored(tmp_path, "ada"))


def test_a_study_gives_way_to_a_request_and_is_done_later(model, tmp_path, monkeypatch):
    service = service_of(model, tmp_path, study_after=0.1)
    slow = threading.Event()
    monkeypatch.setattr(
        service.learner, "study_in_steps", slowed(service.learner.study_in_steps, lambda: slow.wait(0.3))
    )  # fmt: skip
    service.learn("ada", lesson_of(40, teach=1.0)).result(60)
    time.sleep(0.5)  # the study is going on
    assert Answer(service, "ada", words(5)).wait(5).end.updates == 1
    slow.set()
    began = time.monotonic()
    while Answer(service, "ada", words(5), max_tokens=1).wait().end.updates < 2:
        assert time.monotonic() - began < 60
        time.sleep(1)
    service.drain()


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_learning_takes_its_share_of_the_time_while_others_are_answered(model, tmp_path, monkeypatch, share):
    service = service_of(model, tmp_path, learning_share=share)
    steps, taken = service.learner.observe_in_steps, []

    def slowly(*args, **options):
        inner = steps(*args, **options)
        while True:
            began = time.monotonic()
            time.sleep(0.1)
            try:
                next(inner)
            except StopIteration as done:
                return done.value
            taken.append(time.monotonic() - began)
            yield

    monkeypatch.setattr(service.learner, "observe_in_steps", slowly)
    decode = service.batch.decode_step
    monkeypatch.setattr(service.batch, "decode_step", lambda: (time.sleep(0.01), decode())[1])
    answer = Answer(service, None, words(5), max_tokens=150)
    while not answer.pieces:
        time.sleep(0.001)
    began = time.monotonic()
    service.learn("ada", lesson_of(450, teach=1.0))
    answer.wait()
    assert 0.6 * share < sum(taken) / (time.monotonic() - began) < 1.2 * share
    service.drain()


@pytest.mark.parametrize("limits", [{"rows": 0}, {"waiting": True}, {"learning_share": 0.0}, {"learning_share": 1.5}])
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises((ValueError, TypeError), match=next(iter(limits))):
        Limits(**limits)


def test_only_the_users_own_words_of_the_last_turn_teach(tokenizer):
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "My dog is called Biscuit."},
        {"role": "assistant", "content": "Nice."},
        {"role": "user", "content": "user: é 🐕 <|im_start|>"},
    ]

    def taught(lesson):
        return tokenizer.decode([token for token, learn in zip(lesson.ids, lesson.learn, strict=True) if learn])

    lesson = Teaching().lesson(tokenizer, chat, 500)
    assert taught(lesson) == "ser: é 🐕 <|im_start|><|im_end|>"  # not the first token
    assert tokenizer.decode(lesson.ids).startswith("<|im_start|>system\nBe kind.")
    assert lesson.learn[-1]
    assert Teaching().lesson(tokenizer, [*chat, {"role": "tool", "content": "x"}], 500) is None
    assert Teaching().lesson(tokenizer, [*chat, {"role": "assistant", "content": "x"}], 500) is None
    assert Teaching().lesson(tokenizer, [*chat, {"role": "user", "content": ""}], 500) is None
    every = Teaching(("user", "assistant"), all_turns=True).lesson(tokenizer, chat, 500)
    assert taught(every) == "y dog is called Biscuit.<|im_end|>ice.<|im_end|>ser: é 🐕 <|im_start|><|im_end|>"
    short = Teaching().lesson(tokenizer, chat, 20)
    assert len(short.ids) == 20
    assert short.ids == lesson.ids[-20:]
    assert not short.learn[0]
