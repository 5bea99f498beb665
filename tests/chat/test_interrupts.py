"""Ctrl-C in a chat: it stops an answer or a study, nothing is half learnt, and the chat goes on."""

import signal

import pytest
from chats import chat_of
from tiny_models import assert_same

import ttt


@pytest.fixture(autouse=True)
def handler():
    """Python's own handler of SIGINT, which processes that run tests may have replaced."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class InterruptAt:
    """Sends SIGINT at the nth call, as a streamer, as a hook, or around a function."""

    def __init__(self, nth):
        self.left = nth

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)

    put = __call__

    def end(self):
        pass

    def around(self, function):
        def called(*args, **options):
            self()
            return function(*args, **options)

        return called


def same_as(chat, other, words="and I live in York"):
    """Whether two chats go on alike."""
    assert chat.messages == other.messages
    one, two = chat.say(words), other.say(words)
    assert (one.answer, one.nll, one.tokens) == (two.answer, two.nll, two.tokens)
    assert_same(chat.pool.export("ada"), other.pool.export("ada"))


def chats(base, tmp_path):
    """A chat to be interrupted, and one that goes the same way without."""
    found = chat_of(base, tmp_path / "one"), chat_of(base, tmp_path / "two")
    for chat in found:
        chat.learner.context = 400
        chat.say("my dog is called Biscuit")
    return found


@pytest.mark.parametrize("nth", [1, 3])
def test_an_answer_is_stopped_and_was_not_said(base, tmp_path, talked, nth):
    chat, other = chats(base, tmp_path)
    text = talked(chat, "hello", streamer=InterruptAt(nth))
    assert "stopped: what you said is not part of the conversation, and nothing was learnt from it" in text
    assert [each.number for each in chat.versions()] == [1]
    same_as(chat, other)


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_turn_that_is_being_learnt_is_stopped_and_teaches_nothing(base, tmp_path, talked, monkeypatch, nth):
    chat, other = chats(base, tmp_path)
    words = "my dog is called Biscuit, and he is two years old and likes to run"  # of several chunks
    observe, steps = chat.learner.observe, []

    def interrupted(*args, **options):
        at = InterruptAt(nth)
        hook = chat.model.register_forward_hook(lambda *_: (steps.append(1), at())[1])
        try:
            return observe(*args, **options)
        finally:
            hook.remove()

    with monkeypatch.context() as patch:
        patch.setattr(chat.learner, "observe", interrupted)
        text = talked(chat, words)
    assert "stopped: what you said is not part of the conversation, and nothing was learnt from it" in text
    assert len(steps) >= nth
    assert [each.number for each in chat.versions()] == [1]
    ttt.Store(tmp_path / "one").lease("ada").release()  # it was released
    same_as(chat, other)


@pytest.mark.parametrize("nth", [1, 10, 30])
def test_a_study_is_stopped_and_changes_nothing(base, tmp_path, talked, nth):
    chat, other = chats(base, tmp_path)
    hook = chat.model.register_forward_hook(InterruptAt(nth))
    text = talked(chat, "/study")
    hook.remove()
    assert "stopped: /study has changed nothing" in text
    assert "studied" not in text
    assert [each.number for each in chat.versions()] == [1]
    assert chat.study()[1] == other.study()[1] == 2
    same_as(chat, other)


@pytest.mark.parametrize("line", ["hello", "/study"])
def test_a_lease_that_is_being_taken_is_released(base, tmp_path, talked, monkeypatch, line):
    chat, other = chats(base, tmp_path)
    acquire, at = chat.store.index.acquire, InterruptAt(1)
    with monkeypatch.context() as patch:
        patch.setattr(chat.store.index, "acquire", lambda *args: (acquire(*args), at())[0])
        assert "stopped: " in talked(chat, line)
    ttt.Store(tmp_path / "one").lease("ada").release()
    same_as(chat, other)


@pytest.mark.parametrize("line", ["hello", "/study"])
def test_a_version_that_is_being_written_is_written_first(base, tmp_path, talked, monkeypatch, line):
    chat = chats(base, tmp_path)[0]
    put = chat.store.put
    with monkeypatch.context() as patch:
        patch.setattr(chat.store, "put", InterruptAt(1).around(put))
        assert "stopped; version 2 was stored before" in talked(chat, line)
    assert_same(chat.pool.export("ada"), chat_of(base, tmp_path / "one").pool.export("ada"))
    assert chat.say("good evening").version == 3


def test_the_question_before_forgetting_is_answered_with_no(base, tmp_path, talked, monkeypatch):
    chat = chats(base, tmp_path)[0]
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    text = talked(chat, "/forget", KeyboardInterrupt())
    assert "nothing was removed" in text
    assert len(chat.versions()) == 1


def test_forgetting_that_is_stopped_is_completed_by_another_call(base, tmp_path, talked, monkeypatch):
    chat = chats(base, tmp_path)[0]
    with monkeypatch.context() as patch:
        patch.setattr(chat.store, "forget", InterruptAt(1).around(chat.store.forget))
        assert "stopped: something may be left; /forget! completes it" in talked(chat, "/forget!")
    assert "everything that was learnt is removed" in talked(chat, "/forget!")
    assert chat.say("hello").version == 1


def test_at_the_prompt_it_ends_the_chat(base, tmp_path, talked):
    chat = chats(base, tmp_path)[0]
    with pytest.raises(KeyboardInterrupt):
        talked(chat, KeyboardInterrupt(), "hello")
    assert len(chat.versions()) == 1
