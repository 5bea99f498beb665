"""`ttt serve` with a model of sequence layers: users' states read what users say, and are kept as weights are."""

import subprocess
import textwrap
import threading
from pathlib import Path

import httpx
import pytest
import torch
from tiny_chat_model import Answer, byte_tokenizer, served_in_random_order, tiny_chat_model
from tiny_models import assert_same
from tiny_sequence_model import MIXERS, reader_of, states_service, tiny_sequence_model
from web import NAME, client_of, served

import ttt
from ttt.learn.huggingface import cache_of
from ttt.ops.sequence.states import tensors_of
from ttt.sequence_models import SequenceCache
from ttt.serve.batch import Batch
from ttt.serve.errors import BadRequest, Conflict, ServerFailure
from ttt.serve.main import ServeOptions, build_learner, build_users
from ttt.serve.request import Request
from ttt.serve.sampling import Sampling
from ttt.serve.state_reader import StatePool, StateReader
from ttt.serve.state_rows import StateRows
from ttt.serve.teaching import Lesson
from ttt.store import UnknownUser

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "My dog is called Biscuit."}]


@pytest.fixture(scope="module")
def model():
    return tiny_sequence_model()


def words(length):
    return torch.randint(0, 256, (length,)).tolist()


def lesson_of(length=30):
    learn = (torch.rand(length) < 0.6).tolist()
    return Lesson.of(words(length), [*learn[:-1], True], 500, read=True)


def taught(lesson):
    return [token for token, teaches in zip(lesson.ids, lesson.learn, strict=True) if teaches]


@torch.no_grad()
def cache_after(model, lessons):
    """The cache of a model that has read what teaches in ``lessons``, each in one piece."""
    cache = model.new_cache(1)
    for lesson in lessons:
        cache = cache_of(model(torch.tensor([taught(lesson)]), cache=cache))
    return cache


def read(model, lessons, user="ada"):
    """The state after ``lessons`` of a reader that does nothing else."""
    reader = reader_of(model)
    reader.pool.open(user)
    for lesson in lessons:
        for _ in reader.read_in_steps(user, taught(lesson)):
            pass
    return reader.pool.export(user)


def stored(store, user="ada"):
    return ttt.Store(store).get(user).tensors


def assert_close(found, expected):
    assert set(found) == set(expected)
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def alone(model, cache, prompt, count):
    """(tokens, their log probabilities), greedy, read token by token after ``cache``, which is not changed."""
    cache, ids, scores, logits = cache.copy(), [], [], None
    for token in prompt:
        logits = model(torch.tensor([[token]]), cache=cache).logits[0, -1]
    for _ in range(count):
        ids.append(int(logits.argmax()))
        scores.append(float(logits.log_softmax(-1)[ids[-1]]))
        logits = model(torch.tensor([[ids[-1]]]), cache=cache).logits[0, -1]
    return ids, torch.tensor(scores)


def check(model, cache, prompt, tokens, scores):
    wanted, logprobs = alone(model, cache, prompt, len(tokens))
    assert tokens == wanted
    torch.testing.assert_close(torch.tensor(scores), logprobs, rtol=0, atol=2e-3)


@pytest.mark.parametrize("mixers", MIXERS, ids="-".join)
def test_sequences_that_come_and_go_are_each_as_if_alone(mixers):
    """Rows move, join in the middle of others' mini-batches and chunks, and begin with their user's state."""
    model = tiny_sequence_model(mixers)
    pool, caches, ended = StatePool(model, 2), {None: model.new_cache(1)}, []
    for user in ("ada", "bob"):
        caches[user] = cache_after(model, [lesson_of()])
        pool.load(user, caches[user].tensors())
    batch = Batch(StateRows(pool, 4), byte_tokenizer(), prefill=16, ended=ended.append)
    lengths = [(5, 5), (37, 3), (17, 9), (1, 1), (11, 6), (16, 2), (8, 12)]
    waiting = []
    for at, (prompt, count) in enumerate(lengths):
        pieces = []
        sampling = Sampling(max_tokens=count, temperature=0.0, logprobs=0, ignore_eos=True)
        n = 3 if at == 4 else 1
        waiting.append((Request([None, "ada", "bob"][at % 3], words(prompt), sampling, pieces.append, n=n), pieces))
    begun = served_in_random_order(batch, waiting)
    assert len(ended) == len(lengths)
    for request, pieces in begun:
        for index in range(request.n):
            scores = [score for piece in pieces if piece.index == index for score in piece.tokens]
            assert len(scores) == request.sampling.max_tokens
            found = [score.token for score in scores], [score.logprob for score in scores]
            check(model, caches[request.user], request.prompt, *found)
    for user in ("ada", "bob"):  # generating changes no user's state
        assert_same(pool.export(user), caches[user].tensors())
    assert not any(bool(t.any()) for state in batch.cache.states for t in tensors_of(state))


def test_a_turn_is_read_after_the_answer_and_the_next_request_starts_from_it(model, tmp_path):
    service, prompt = states_service(model, tmp_path), words(20)
    lessons = [lesson_of(n) for n in (30, 100, 9)]
    found = [Answer(service, "ada", prompt, lesson, logprobs=0).wait() for lesson in lessons]
    found.append(Answer(service, "ada", prompt, logprobs=0).wait())
    assert [answer.end.learning for answer in found] == ["queued"] * 3 + ["off"]
    assert [answer.end.updates for answer in found] == [0, 1, 2, 3]
    for count, answer in enumerate(found):
        scores = [score.logprob for piece in answer.pieces for score in piece.tokens]
        check(model, cache_after(model, lessons[:count]), prompt, answer.tokens(), scores)
    assert service.drain() == []
    held = stored(tmp_path)
    assert_same(held, read(model, lessons))  # to the bit what reading the turns alone gives
    assert_close(held, cache_after(model, lessons).tensors())
    assert int(held["seen"]) == sum(lesson.tokens for lesson in lessons)
    assert ttt.Store(tmp_path).get("ada").meta["tokens"] == int(held["seen"])


def test_many_users_at_once_each_end_as_if_alone(model, tmp_path):
    """More users than slots: their states come and go while others' are read and generated from."""
    service = states_service(model, tmp_path, slots=2, rows=3)
    lessons = {user: [lesson_of(24) for _ in range(3)] for user in ("ada", "bob", "cy", "dee", "eve")}
    answers = []

    def talk(user):
        for lesson in lessons[user]:
            answers.append(Answer(service, user, words(10), lesson, max_tokens=4, wait=True).wait())

    threads = [threading.Thread(target=talk, args=(user,)) for user in lessons]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert {answer.end.learning for answer in answers} == {"stored"}
    assert len(service.sessions.users) <= 2
    assert service.drain() == []
    for user, read_by_user in lessons.items():
        assert_same(stored(tmp_path, user), read(model, read_by_user, user))
        assert [version.number for version in ttt.Store(tmp_path).history(user)] == [3, 2, 1]


def test_what_was_acknowledged_survives_a_kill(forks, model, tmp_path):
    script = """
        import sys, torch
        sys.path[:0] = [{tests!r}, {serve!r}]
        from tiny_chat_model import Answer
        from tiny_sequence_model import states_service, tiny_sequence_model
        from ttt.serve.teaching import Lesson
        service = states_service(tiny_sequence_model(), {store!r}, lease_seconds=1.0)
        torch.manual_seed(5)
        while True:
            ids = torch.randint(0, 256, (20,)).tolist()
            lesson = Lesson.of(ids, [True] * 20, 99, read=True)
            answer = Answer(service, "ada", ids[:5], lesson, max_tokens=2, wait=True).wait()
            print(answer.end.learning, answer.end.updates, flush=True)
    """
    here = Path(__file__).parent
    code = textwrap.dedent(script).format(tests=str(here.parent), serve=str(here), store=str(tmp_path))
    process = forks.start(["-c", code], stdout=subprocess.PIPE)
    lines = [process.stdout.readline().split() for _ in range(4)]
    process.kill()
    process.wait()
    process.stdout.close()
    assert [learning for learning, _ in lines] == ["stored"] * 4
    found = ttt.Store(tmp_path).get("ada")
    assert found.meta["updates"] >= int(lines[-1][1])
    torch.manual_seed(5)
    said = [torch.randint(0, 256, (20,)).tolist() for _ in range(found.meta["updates"])]
    assert_same(found.tensors, read(model, [Lesson.of(ids, [True] * 20, 99, read=True) for ids in said]))
    with ttt.Store(tmp_path).lease("ada", wait=20):  # another server gets the user when the lease has ended
        pass


def test_going_back_and_forgetting(model, tmp_path):
    service, lessons, prompt = states_service(model, tmp_path), [lesson_of() for _ in range(3)], words(12)
    base = Answer(service, None, prompt, logprobs=0).wait()
    for lesson in lessons:  # each is stored by itself: a slow store may keep two as one version
        service.learn("ada", lesson).result(60).stored.result(60)
    service.rollback("ada", 1).result(60)
    service.learn("ada", lessons[2]).result(60).stored.result(60)
    assert_same(stored(tmp_path), read(model, [lessons[0], lessons[2]]))
    service.forget("ada").result(60)
    with pytest.raises(UnknownUser):
        ttt.Store(tmp_path).get("ada")
    after = Answer(service, "ada", prompt, logprobs=0).wait()
    assert after.pieces == base.pieces
    assert after.end.updates == 0
    service.drain()


@pytest.mark.parametrize("failure", ["raises", "not finite"])
def test_a_turn_that_fails_changes_nothing(model, tmp_path, monkeypatch, failure):
    service = states_service(model, tmp_path)
    service.learn("ada", lesson_of()).result(60).stored.result(60)
    before = service.pool.export("ada")
    forward, calls = model.forward, []

    def failing(*args, **options):
        calls.append(args)
        if failure == "raises" and len(calls) == 3:
            raise MemoryError
        out = forward(*args, **options)
        if failure == "not finite" and len(calls) == 3:
            tensors_of(cache_of(out).layers[-1].state)[-1].fill_(float("nan"))
        return out

    monkeypatch.setattr(model, "forward", failing)
    lesson = Lesson.of(words(100), [True] * 100, 500, read=True)
    with pytest.raises(MemoryError if failure == "raises" else ServerFailure):
        service.learn("ada", lesson).result(60)
    assert len(calls) >= 3
    monkeypatch.undo()
    assert_same(service.pool.export("ada"), before)
    assert_same(stored(tmp_path), before)
    assert Answer(service, "ada", words(5)).wait().end.updates == 1
    service.drain()


def test_the_loss_is_that_of_each_token_before_it_is_read(model, tmp_path):
    service = states_service(model, tmp_path)
    first, second = words(70), words(1)
    learnt = service.learn("ada", Lesson.of(first, [True] * 70, 500, read=True)).result(60)
    with torch.no_grad():
        logits = model(torch.tensor([first])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(first[1:]))
    assert learnt.nll == pytest.approx(float(expected), abs=1e-4)
    assert service.learn("ada", Lesson.of(second, [True], 500, read=True)).result(60).nll is None
    service.drain()
    assert int(stored(tmp_path)["seen"]) == 71


def test_a_state_of_another_model_is_refused(model, tmp_path):
    store = ttt.Store(tmp_path)
    other = tiny_sequence_model(MIXERS[1])
    pair = cache_of(model(torch.randint(0, 256, (2, 3)), use_cache=True)).tensors()
    for user, tensors, meta in (
        ("ada", {"x": torch.zeros(2)}, {"model": "something else"}),
        ("bob", other.new_cache(1).tensors(), {}),
        ("cy", {name: t.detach() for name, t in pair.items()}, {}),
        ("dee", {name: t / 0 if t.is_floating_point() else t for name, t in model.new_cache(1).tensors().items()}, {}),
    ):
        with store.lease(user) as lease:
            store.put(lease, tensors, meta)
    service = states_service(model, store)
    for user, why in (
        ("ada", "another model"),
        ("bob", "missing or unknown"),
        ("cy", "one sequence"),
        ("dee", "finite"),
    ):
        end = Answer(service, user, words(5), lesson_of()).wait().end
        assert isinstance(end, Conflict)
        assert why in end.message
    service.drain()
    assert reader_of(model).name != reader_of(other).name
    assert reader_of(model).name != reader_of(tiny_sequence_model(mini_batch=3)).name
    assert reader_of(model).name == reader_of(tiny_sequence_model()).name
    protected = tiny_sequence_model(protect=4)
    before = reader_of(protected).name
    protected.calibrate(torch.randint(0, 256, (1, 9)))
    assert reader_of(protected).name != before


def test_slots_that_are_taken_and_other_models_are_refused(model):
    pool = StatePool(model, 1)
    pool.open("ada")
    pool.open("ada")
    with pytest.raises(RuntimeError, match="all 1 slots"):
        pool.open("bob")
    with pytest.raises(KeyError, match="'bob' has no slot"):
        pool.export("bob")
    assert pool.users == ("ada",)
    with pytest.raises(TypeError, match="TTTSequenceForCausalLM"):
        StateReader(tiny_chat_model(), slots=1)


def test_the_http_api_of_users_with_states(model, tokenizer, tmp_path):
    service = states_service(model, tmp_path, study_after=0.01)
    text = "I live in Rome."
    with served(service) as url:
        client, users = client_of(url, user="ada", learn="wait"), f"{url}/v1/users/ada"
        fixed = {"model": NAME, "temperature": 0, "max_tokens": 4}
        answer = client.chat.completions.create(messages=CHAT, **fixed)
        assert answer.ttt == {"updates": 1, "version": 1, "learning": "stored"}
        parts = client.chat.completions.create(messages=CHAT, stream=True, **fixed)
        assert [part.ttt for part in parts if part.model_extra][-1]["updates"] == 2
        client.completions.create(prompt="x", **fixed)  # a text of one token is read, too
        learnt = httpx.post(f"{users}/learn", json={"text": text}).json()
        assert (learnt["tokens"], learnt["updates"], learnt["version"]) == (len(text), 4, 4)
        shown = httpx.get(users).json()
        assert (shown["keeps"], shown["drift"], shown["updates"]) == ("state", None, 4)
        assert len(shown["versions"]) == 4
        said = [CHAT[-1]["content"] + tokenizer.eos_token] * 2 + ["x", text]  # words of a chat have an end
        lessons = [Lesson.of(ids, [True] * len(ids), 500, read=True) for ids in map(tokenizer.encode, said)]
        assert_same(stored(tmp_path), read(model, lessons))
        for refused in (
            httpx.post(f"{users}/study", json={}),
            httpx.get(f"{users}/taught"),
            httpx.get(f"{users}/export"),
        ):
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (400, "unsupported")
            assert refused.request.url.path.rsplit("/", 1)[1] in error["message"]
        assert httpx.post(f"{users}/rollback", json={"version": 1}).json()["version"] == 5
        assert_same(stored(tmp_path), read(model, lessons[:1]))
        assert httpx.delete(users).json() == {"id": "ada", "deleted": True}
        assert httpx.get(users).status_code == 404
    with pytest.raises(BadRequest, match="drift"):
        states_service(model, tmp_path).drift("ada")


def test_a_folder_with_such_a_model_is_served(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = ServeOptions(tmp_path / "model", slots=2)
    reader, _ = build_users(options)
    assert isinstance(reader, StateReader)
    assert reader.name == reader_of(model).name
    for changed in ({"rank": 8}, {"lr": 0.1}, {"calibration": tmp_path / "calibration"}, {"guard": 0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(changed))} is for users with weights"):
            build_users(ServeOptions(tmp_path / "model", **changed))
    with pytest.raises(ValueError, match="sequence layers"):
        build_learner(options)


def test_a_loaded_state_is_not_the_callers(model):
    pool, tensors = StatePool(model, 1), model.new_cache(1).tensors()
    pool.load("ada", tensors)
    before = pool.export("ada")
    [t.fill_(1) for t in [*tensors.values(), *pool.export("ada").values()]]
    assert_same(pool.export("ada"), before)
    assert isinstance(pool.cache("ada"), SequenceCache)
