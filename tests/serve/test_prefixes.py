"""Prompts whose beginning an earlier request has read: the answers of a server that reads them anew."""

import pytest
import torch
from tiny_chat_model import Answer, byte_tokenizer, learner_of, served_in_random_order, service_of
from tiny_sequence_model import states_service, tiny_sequence_model

from ttt.serve.batch import Batch
from ttt.serve.prefixes import Prefixes
from ttt.serve.request import Request
from ttt.serve.row_cache import RowCache
from ttt.serve.sampling import Sampling
from ttt.serve.session import Session
from ttt.serve.teaching import Lesson

MEGABYTE = 2**20


def words(length):
    return torch.randint(0, 256, (length,)).tolist()


class Served:
    """A batch that keeps up to ``most`` bytes, and what it serves."""

    def __init__(self, learner, most=MEGABYTE, rows=4):
        self.sessions = {user: Session(user, None) for user in ("ada", "bob")}
        cache = RowCache(learner.model, learner.pool, rows, 256)
        self.reused = []
        self.prefixes = Prefixes(cache, most, self.sessions.get, self.reused.append) if most else None
        self.batch = Batch(cache, byte_tokenizer(), prefill=16, ended=lambda request: None, prefixes=self.prefixes)

    def ask(self, user, prompt, count=4):
        """(tokens, log probabilities) of a greedy answer."""
        pieces = []
        options = {"max_tokens": count, "temperature": 0.0, "logprobs": 3, "ignore_eos": True}
        self.batch.begin(Request(user, prompt, Sampling(**options), pieces.append))
        while not self.batch.idle:
            self.batch.read_step()
            self.batch.decode_step()
        scores = [score for piece in pieces for score in piece.tokens]
        return [score.token for score in scores], scores


def taught(model):
    learner = learner_of(model)
    for user in ("ada", "bob"):
        learner.observe(torch.randint(0, 256, (1, 60)), users=[user])
    return learner


def test_a_prompt_that_goes_on_reads_only_its_new_tokens_and_gets_the_same_bits(model):
    learner = taught(model)
    prompt = words(48)  # three parts of a prefill, so that what is read anew is read in the same parts
    for user in ("ada", None):
        served, anew = Served(learner), Served(learner, most=0)
        served.ask(user, prompt, 1)
        longer = prompt + words(20)
        assert served.ask(user, longer) == anew.ask(user, longer)
        served.ask(user, longer[:40] + words(30))
        assert served.reused == [48, 40]
        assert served.ask(user, longer)[0] == anew.ask(user, longer)[0]
        assert served.reused[2] == 67  # the last token is always read, for its scores


def test_a_conversation_is_answered_as_one_that_is_read_anew(model):
    learner = taught(model)
    served, anew, said = Served(learner), Served(learner, most=0), words(30)
    for _ in range(4):
        tokens, scores = served.ask("ada", said, 10)
        wanted, exact = anew.ask("ada", said, 10)
        assert tokens == wanted
        found = [torch.tensor([score.logprob for score in each]) for each in (scores, exact)]
        torch.testing.assert_close(*found, rtol=0, atol=1e-4)
        assert len(served.prefixes) == 1  # the newest holds the earlier ones
        said = said + tokens + words(9)
    assert served.reused == [39, 58, 77]  # of the answer's last token nothing was computed


def test_nothing_is_used_for_another_user_or_for_other_weights(model):
    learner = taught(model)
    served, prompt = Served(learner), words(40)
    for user in ("ada", "bob", None):
        assert served.ask(user, prompt) == Served(learner, most=0).ask(user, prompt)
    assert served.reused == []
    assert len(served.prefixes) == 3
    served.sessions["ada"].updates += 1
    served.sessions["bob"] = Session("bob", None)  # opened anew, or forgotten and back, with as many updates
    for user in ("ada", "bob"):
        served.ask(user, prompt)
    assert served.reused == []
    assert len(served.prefixes) == 3
    del served.sessions["ada"]
    served.batch.read_step()
    assert len(served.prefixes) == 2


def test_what_was_not_used_for_the_longest_time_is_dropped_beyond_the_bound(model):
    learner = taught(model)
    first, second, third = (words(40) for _ in range(3))
    once = Served(learner)
    once.ask("ada", first, 1)
    size = once.prefixes.bytes
    assert size == 4 * 2 * 2 * 8 * 40 * 4  # blocks, keys and values, groups, features, tokens, bytes
    served = Served(learner, most=2 * size)
    for prompt in (first, second, first, third):
        served.ask("ada", prompt, 1)
        assert served.prefixes.bytes <= 2 * size
    served.ask("ada", first, 1)
    assert served.reused == [39, 39]
    served.ask("ada", second, 1)
    assert served.reused == [39, 39]
    small = Served(learner, most=size - 1)
    small.ask("ada", first, 1)
    assert (len(small.prefixes), small.prefixes.bytes) == (0, 0)


def test_a_conversation_that_outgrows_the_bound_still_uses_its_beginning(model):
    learner = taught(model)
    once, beginning = Served(learner), words(40)
    once.ask("ada", beginning, 1)
    served = Served(learner, most=once.prefixes.bytes)
    for prompt in (beginning, beginning + words(20), beginning + words(30)):
        served.ask("ada", prompt, 1)
    assert served.reused == [40, 40]
    assert (len(served.prefixes), served.prefixes.bytes) == (1, once.prefixes.bytes)


def test_room_is_made_before_anything_is_copied(model, monkeypatch):
    served, together = Served(taught(model)), []
    served.ask("ada", words(40), 1)
    served.prefixes.most = most = served.prefixes.bytes + 1
    taken = served.prefixes.cache.taken

    def copied(row, length):
        together.append(served.prefixes.bytes + served.prefixes.cache.bytes(length))
        return taken(row, length)

    monkeypatch.setattr(served.prefixes.cache, "taken", copied)
    served.ask("ada", words(40), 1)
    assert together == [most - 1]


def test_sequences_that_come_and_go_are_the_same_with_prefixes(model):
    learner = taught(model)
    served, texts = Served(learner), {user: words(90) for user in ("ada", "bob", None)}
    waiting = []
    for length in (20, 50, 37, 90, 64):
        for user, text in texts.items():
            options = {"max_tokens": 5, "temperature": 0.0, "logprobs": 2, "ignore_eos": True}
            pieces = []
            waiting.append((Request(user, text[:length], Sampling(**options), pieces.append), pieces))
    begun = served_in_random_order(served.batch, waiting)
    assert len(begun) == len(waiting)
    assert served.reused
    for request, pieces in begun:
        wanted, exact = Served(learner, most=0).ask(request.user, request.prompt, 5)
        found = [score for piece in pieces for score in piece.tokens]
        assert [score.token for score in found] == wanted
        close = [torch.tensor([score.logprob for score in each]) for each in (found, exact)]
        torch.testing.assert_close(*close, rtol=0, atol=1e-4)


def test_a_service_keeps_what_was_read_until_the_user_learns_goes_back_or_is_forgotten(model, tmp_path):
    service = service_of(model, tmp_path / "with", prefix_cache=MEGABYTE, prefill=64)
    plain = service_of(model, tmp_path / "without", prefill=64)
    prefixes, prompt = service.batch.prefixes, words(40)

    def both(work):
        return [work(each) for each in (service, plain)]

    def same():
        found = both(lambda each: Answer(each, "ada", prompt).wait())
        assert found[0].text() == found[1].text()
        assert len(prefixes) == 1

    lesson = Lesson(words(30), [False] + 29 * [True])
    for change in (
        lambda each: Answer(each, "ada", prompt, lesson=lesson, wait=True).wait(),
        lambda each: each.learn("ada", lesson).result(60),
        lambda each: each.rollback("ada", 1).result(60),
        lambda each: each.forget("ada").result(60),
    ):
        same()
        both(change)
        for _ in range(200):
            if not len(prefixes):
                break
            Answer(service, "bob", words(3)).wait()  # a step: what has become stale goes with the next one
        assert len(prefixes) == 0
    same()
    both(lambda each: each.drain(30))


def test_states_keep_no_prefixes(tmp_path):
    with pytest.raises(ValueError, match="prefix_cache must be 0 for a model of sequence layers"):
        states_service(tiny_sequence_model(), tmp_path / "store", prefix_cache=MEGABYTE)
