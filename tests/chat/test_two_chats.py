"""Several chats, or a chat and a server, with one user of a store: nothing is lost, and nothing comes back."""

import threading
import time

import pytest
from chats import chat_of, file_of
from tiny_models import assert_same

import ttt
from ttt.chat import session
from ttt.store import CommitUncertain, LeaseHeld, StaleLease, StorageFailure


@pytest.fixture
def told():
    return []


def said_in(chat):
    """What the log of the user holds, as sets of tokens."""
    return {tuple(episode.ids[episode.learn].tolist()) for episode in chat.learner.episodes.of(chat.user)}


def test_what_another_chat_has_learnt_is_kept_by_the_next_turn(base, tmp_path, told):
    one, two = chat_of(base, tmp_path, notice=lambda _: None), chat_of(base, tmp_path, notice=told.append)
    assert one.say("my parrot is called Zephyrine").version == 1
    assert two.say("I work as a glass blower").version == 2
    assert told == ["the newest version in the store is 1 now; it is loaded"]
    assert len(said_in(two)) == 2
    assert said_in(one) < said_in(two)
    assert one.study()[1] == 3  # of both sentences, with one's own chat behind
    assert said_in(one) == said_in(two)
    assert_same(one.pool.export("ada"), chat_of(base, tmp_path).pool.export("ada"))


def test_the_conversation_goes_on_where_another_chat_only_learnt_and_not_where_it_went_back(base, tmp_path, told):
    one, two = chat_of(base, tmp_path, notice=lambda _: None), chat_of(base, tmp_path, notice=told.append)
    one.learner.context = two.learner.context = 400
    two.say("hello")
    one.say("my parrot is called Zephyrine")
    two.say("and so on")
    assert len(two.messages) == 4
    assert told == ["the newest version in the store is 2 now; it is loaded"]
    one.rollback(1)
    two.say("and so on")
    assert len(two.messages) == 2
    assert told[1:] == ["the newest version in the store is 4 now; it is loaded; the conversation begins anew"]


@pytest.mark.parametrize("learn", [True, False])
def test_what_was_forgotten_in_another_chat_does_not_come_back(base, tmp_path, told, learn):
    new = chat_of(base, tmp_path / "other").say("hello")
    one = chat_of(base, tmp_path)
    one.say("my dog is called Biscuit")
    one.study()
    two = chat_of(base, tmp_path, learn=learn, notice=told.append)
    two.messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    one.forget()
    turn = two.say("hello")
    assert told == [
        "the store holds nothing of 'ada' any more: what was learnt is forgotten; the conversation begins anew"
    ]
    assert turn.answer == new.answer
    assert [each["content"] for each in two.messages] == ["hello", new.answer]
    if learn:
        assert (turn.version, turn.nll) == (1, new.nll)
        assert len(said_in(two)) == 1
        one.forget()
        assert two.study()[1] is None
    assert two.versions() == []


def test_what_was_forgotten_while_a_turn_was_answered_or_learnt_does_not_come_back(base, tmp_path, told, monkeypatch):
    one, two = chat_of(base, tmp_path), chat_of(base, tmp_path, notice=told.append)
    two.learner.context = 400
    two.say("my dog is called Biscuit")
    generate = two.model.generate
    monkeypatch.setattr(two.model, "generate", lambda *args, **options: (generate(*args, **options), one.forget())[0])
    assert two.say("hello").version == 1  # of this turn alone
    assert len(said_in(two)) == 1
    assert two.messages == []
    monkeypatch.setattr(two.model, "generate", generate)
    before = two.pool.export("ada")
    put = two.store.put
    monkeypatch.setattr(two.store, "put", lambda *args: (one.forget(), put(*args))[1])
    turn = two.say("good morning")
    assert turn.version is None
    assert isinstance(turn.refused, StaleLease)
    assert_same(before, two.pool.export("ada"))
    assert one.versions() == []
    monkeypatch.setattr(two.store, "put", put)
    two.say("good evening")
    assert len(said_in(two)) == 1
    assert two.messages[0]["content"] == "good evening"
    assert len(told) == 2


def test_a_turn_that_the_store_refuses_is_answered_and_teaches_nothing(base, tmp_path, monkeypatch):
    chat = chat_of(base, tmp_path)
    chat.say("hello")
    before = chat.pool.export("ada")
    observed = []
    observe = chat.learner.observe
    monkeypatch.setattr(chat.learner, "observe", lambda *args, **o: (observed.append(1), observe(*args, **o))[1])
    with ttt.Store(tmp_path).lease("ada"):
        turn = chat.say("my dog is called Biscuit")
        with pytest.raises(LeaseHeld):
            chat.study()
        with pytest.raises(LeaseHeld):
            chat.rollback(1)
    assert turn.answer
    assert (turn.version, turn.tokens) == (None, 0)
    assert isinstance(turn.refused, LeaseHeld)
    assert observed == []  # it was asked before
    assert_same(before, chat.pool.export("ada"))
    assert chat.say("my dog is called Biscuit").version == 2


@pytest.mark.parametrize("error", [StorageFailure("the disk is full"), CommitUncertain("lost"), KeyboardInterrupt()])
@pytest.mark.parametrize("stands", [False, True])
@pytest.mark.parametrize(("act", "known"), [("say", False), ("say", True), ("study", True)])
def test_what_could_not_be_stored_is_not_kept_in_memory(base, tmp_path, monkeypatch, told, error, stands, act, known):
    chat = chat_of(base, tmp_path, notice=told.append)
    if known:
        chat.say("hello")
    else:
        chat.pool.open("ada")
    before = chat.pool.export("ada")

    def fails(*args):
        if stands:
            put(*args)
        raise error

    put = chat.store.put
    with monkeypatch.context() as patch:
        patch.setattr(chat.store, "put", fails)
        if act == "say" and isinstance(error, ttt.store.StoreError):
            assert chat.say("my dog is called Biscuit").refused is error
        else:
            with pytest.raises(type(error)):
                chat.say("my dog is called Biscuit") if act == "say" else chat.study()
    assert_same(before, chat.pool.export("ada"))
    assert chat.say("hello again").version == known + stands + 1  # what stands after all is loaded before
    assert len(said_in(chat)) == known + (stands and act == "say") + 1
    assert len(told) == stands


def test_a_store_that_cannot_be_read_is_said_and_the_answer_comes_all_the_same(base, tmp_path, monkeypatch, told):
    error = StorageFailure("the index failed")

    def fails(user):
        raise error

    for learn in (True, False):
        chat = chat_of(base, tmp_path, learn=learn, notice=told.append)
        with monkeypatch.context() as patch:
            patch.setattr(chat.store, "history", fails)
            turn = chat.say("hello")
        assert turn.answer
        assert turn.refused is (error if learn else None)
    assert told == ["the store cannot be read: the index failed"]
    assert chat.versions() == []


def test_the_lease_is_renewed_for_as_long_as_a_study_takes(base, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "_LEASE", 0.4)
    chat = chat_of(base, tmp_path)
    chat.say("my dog is called Biscuit")
    study, held = chat.learner.study, []

    def slow(user):
        for _ in range(4):
            time.sleep(0.3)
            try:
                ttt.Store(tmp_path).lease("ada", 0.001)
            except LeaseHeld:
                held.append(True)
        return study(user)

    monkeypatch.setattr(chat.learner, "study", slow)
    assert chat.study()[1] == 2
    assert held == [True] * 4
    ttt.Store(tmp_path).lease("ada").release()  # it was released
    ends = time.monotonic() + 10
    while any(each.name == "ttt-chat-lease" for each in threading.enumerate()):
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_the_terminal_says_why_nothing_was_learnt(base, tmp_path, talked, monkeypatch):
    one = chat_of(base, tmp_path)
    one.say("hello")
    with ttt.Store(tmp_path).lease("ada"):
        text = talked(one, "good morning")
    refused = "nothing was learnt: another chat or server has the right to write what this user is learning"
    assert f"{refused} ('ada' is leased for another " in text
    put = one.store.put
    monkeypatch.setattr(one.store, "put", lambda *args: (ttt.Store(tmp_path).forget("ada"), put(*args))[1])
    text = talked(one, "good morning")
    assert "nothing was learnt: another chat or server has taken this user over, or removed them (the lease" in text


def test_damage_is_said_and_the_last_sound_version_is_taken(base, tmp_path, told):
    chat = chat_of(base, tmp_path)
    chat.say("hello")
    one = chat.pool.export("ada")
    chat.say("my dog is called Biscuit")
    file_of(tmp_path, chat.versions()[0]).write_bytes(b"torn")
    later = chat_of(base, tmp_path, notice=told.append)
    (text,) = told
    assert text.startswith("version 2 is damaged (")
    assert text.endswith("); version 1 is loaded in its place")
    assert_same(one, later.pool.export("ada"))
    assert later.say("hello again").version == 3
    assert len(told) == 1
