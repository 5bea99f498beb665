"""Continuous batching: every sequence as if it were alone, with its user's weights."""

import pytest
import torch
from tiny_chat_model import Answer, byte_tokenizer, learner_of, served_in_random_order, service_of, tiny_chat_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

import ttt
from ttt.serve.batch import Batch
from ttt.serve.request import Request
from ttt.serve.row_cache import RowCache
from ttt.serve.sampling import Sampling


def words(length):
    return torch.randint(0, 256, (length,)).tolist()


def alone(learner, user, prompt, count):
    """(tokens, their log probabilities), greedy, by plain forward passes over the whole text."""
    ids, scores = list(prompt), []
    for _ in range(count):
        with torch.no_grad(), ttt.users(learner.model, [user]):
            logits = learner.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        scores.append(float(logits.log_softmax(-1)[ids[-1]]))
    return ids[len(prompt) :], scores


def batch_of(learner, rows=4, prefill=16, capacity=128):
    ended = []
    cache = RowCache(learner.model, learner.pool, rows, capacity)
    return Batch(cache, byte_tokenizer(), prefill=prefill, ended=ended.append), ended


def request_of(user, prompt, pieces, **sampling):
    options = {"max_tokens": 6, "temperature": 0.0, "logprobs": 2, "ignore_eos": True, **sampling}
    return Request(user, prompt, Sampling(**options), pieces.append)


def check(learner, request, pieces):
    tokens = [score for piece in pieces for score in piece.tokens]
    wanted, scores = alone(learner, request.user, request.prompt, request.sampling.max_tokens)
    assert [score.token for score in tokens] == wanted
    torch.testing.assert_close(torch.tensor([s.logprob for s in tokens]), torch.tensor(scores), rtol=0, atol=1e-4)
    for score in tokens:
        assert score.top[0] == (score.token, pytest.approx(score.logprob))
        assert score.top[1][1] <= score.top[0][1]


@pytest.fixture
def taught(model):
    """A learner two of whose users have learnt."""
    learner = learner_of(model)
    for user in ("ada", "bob"):
        learner.observe(torch.randint(0, 256, (1, 60)), users=[user])
    return learner


def test_sequences_that_come_and_go_are_each_as_if_alone(taught):
    batch, ended = batch_of(taught)
    lengths = [(5, 9), (40, 3), (17, 12), (1, 1), (33, 7), (16, 2), (8, 20), (60, 4)]
    waiting = []
    for at, (prompt, count) in enumerate(lengths):
        pieces = []
        waiting.append((request_of([None, "ada", "bob"][at % 3], words(prompt), pieces, max_tokens=count), pieces))
    begun = served_in_random_order(batch, waiting)
    assert len(ended) == len(lengths)
    for request, pieces in begun:
        check(taught, request, pieces)


def test_several_continuations_of_one_prompt(taught):
    batch, ended = batch_of(taught)
    first, pieces = [], []
    batch.begin(request_of("ada", words(20), first, max_tokens=30))
    while batch.reading:
        batch.read_step()
    request = request_of("bob", words(37), pieces, temperature=1.0, seed=7, max_tokens=5)
    request.n = 3
    assert batch.fits(request)
    batch.begin(request)
    assert not batch.fits(request)
    while not batch.idle:
        batch.read_step()
        batch.decode_step()
    check(taught, next(request for request in ended if request.user == "ada"), first)
    texts = [[score.token for piece in pieces if piece.index == at for score in piece.tokens] for at in range(3)]
    assert all(len(text) == 5 for text in texts)
    assert len({tuple(text) for text in texts}) > 1
    again = []
    repeated = request_of("bob", request.prompt, again, temperature=1.0, seed=7, max_tokens=5)
    repeated.n = 3
    batch.begin(repeated)
    while not batch.idle:
        batch.read_step()
        batch.decode_step()
    assert [p.text for p in again if p.index == 1] == [p.text for p in pieces if p.index == 1]


def test_one_users_values_that_are_not_finite_end_only_that_users_request(taught):
    batch, ended = batch_of(taught)
    sick, well = [], []
    for layer in taught.pool.layers.values():
        layer.b[taught.pool.slot("bob")].fill_(float("nan"))
    for user, pieces in (("bob", sick), ("ada", well)):
        batch.begin(request_of(user, words(20), pieces, max_tokens=4))
        while batch.reading:
            batch.read_step()
    while not batch.idle:
        batch.decode_step()
    assert len(ended) == 2
    assert "not finite" in sick[-1].message
    check(taught, ended[-1], well)
    # The rows that held them are clean for the next sequence.
    for layer in batch.cache.layers:
        assert all(bool(torch.isfinite(held).all()) for held in layer.held)


def test_a_sequence_that_takes_a_row_inherits_no_values_that_are_not_finite(taught):
    batch, ended = batch_of(taught)
    found = []
    # The last one, the shortest, takes the row of the first, and the second keeps the steps wide.
    for user, length in (("bob", 30), (None, 60), ("ada", 5)):
        pieces = []
        found.append((request_of(user, words(length), pieces, max_tokens=20), pieces))
        batch.begin(found[-1][0])
        while batch.reading:
            batch.read_step()
    batch.decode_step()
    for layer in taught.pool.layers.values():
        layer.b[taught.pool.slot("bob")].fill_(float("inf"))
    while not batch.idle:
        batch.decode_step()
    (sick, heard), *well = found
    assert ended[0] is sick
    assert len(ended) == 3
    assert "not finite" in heard[-1].message
    for request, pieces in well:
        check(taught, request, pieces)
    for layer in batch.cache.layers:
        assert not any(bool(held.any()) for held in layer.held)


def test_a_cancelled_request_leaves_and_the_others_go_on(taught):
    batch, ended = batch_of(taught)
    kept, dropped = [], []
    for pieces in (dropped, kept):
        request = request_of("ada", words(10), pieces, max_tokens=9)
        batch.begin(request)
        while batch.reading:
            batch.read_step()
    first, second = batch.requests
    first.cancelled = True
    while not batch.idle:
        batch.decode_step()
    assert ended == [first, second]
    check(taught, second, kept)
    assert len(dropped) < 9


def counted(batch):
    """The shapes of the tokens that the model reads from now on."""
    shapes, run = [], batch.cache.run

    def counting(users, ids, *args, **options):
        shapes.append(tuple(ids.shape))
        return run(users, ids, *args, **options)

    batch.cache.run = counting
    return shapes


def test_short_prompts_are_read_together_each_as_if_alone(taught):
    batch, ended = batch_of(taught, rows=5, prefill=40)
    shapes, found = counted(batch), []
    # The third ends with its first token, so that rows move while the others are taken; the last one finds no room.
    for user, length, count in (("ada", 9, 6), ("bob", 5, 4), (None, 10, 1), ("ada", 1, 7), ("bob", 8, 3)):
        pieces = []
        request = request_of(user, words(length), pieces, max_tokens=count)
        found.append((request, pieces))
        if len(found) == 5:
            assert not batch.fits(request)  # 5 times 10 tokens are more than 40
            break
        assert batch.fits(request)
        batch.begin(request)
    assert len(batch.requests) == 4
    assert batch.read_step() == 9 + 5 + 10 + 1
    assert shapes == [(4, 10)]
    assert not batch.reading
    assert ended == [found[2][0]]
    batch.begin(found[4][0])
    while not batch.idle:
        batch.read_step()
        batch.decode_step()
    for request, pieces in found:
        check(taught, request, pieces)
    assert len(ended) == 5


def test_what_cannot_be_read_together_is_read_alone(taught):
    batch, _ = batch_of(taught, rows=4, prefill=40)
    short = request_of("ada", words(5), [])
    several, scored, long = (request_of("bob", words(length), []) for length in (5, 5, 21))
    several.n, scored.score_prompt = 2, True
    for first in (several, scored, long):
        assert batch.fits(first)
        batch.begin(first)
        assert not batch.fits(short)
        batch.fail_all(RuntimeError())
        batch.begin(short)
        assert not batch.fits(first)
        batch.fail_all(RuntimeError())
    begun = request_of("bob", words(60), [])  # in parts
    batch.begin(begun)
    batch.read_step()
    assert not batch.fits(short)
    batch.fail_all(RuntimeError())
    assert batch.idle


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("how", ["cancelled", "not finite", "drawing fails"])
def test_one_of_those_that_are_read_together_leaves_and_the_others_go_on(taught, monkeypatch, which, how):
    batch, ended = batch_of(taught, rows=4, prefill=64)
    other = []
    batch.begin(request_of("ada", words(7), other, max_tokens=20))
    while batch.reading:
        batch.read_step()
    found = []
    taught.pool.open("eve")
    if how == "not finite":
        for layer in taught.pool.layers.values():
            layer.rows[taught.pool.slot("eve")] = 1
            layer.b[taught.pool.slot("eve")].fill_(float("nan"))
    for at in range(3):
        pieces = []
        user = "eve" if at == which else ("ada", "bob", None)[at]
        found.append((request_of(user, words(6 + 3 * at), pieces, max_tokens=5), pieces))
        batch.begin(found[-1][0])
    gone, heard = found.pop(which)
    if how == "cancelled":
        gone.cancelled = True
    elif how == "drawing fails":
        gone.sampling = None
    batch.read_step()
    while not batch.idle:
        batch.decode_step()
    assert gone in ended
    assert len(ended) == 4
    if how == "not finite":
        assert "not finite" in heard[-1].message
    check(taught, ended[-1], other)
    for request, pieces in found:
        check(taught, request, pieces)
    for layer in batch.cache.layers:
        assert not any(bool(held.any()) for held in layer.held)  # nothing of a sequence is kept


def test_when_reading_together_fails_all_of_them_hear_of_it(taught):
    batch, ended = batch_of(taught, rows=4, prefill=64)
    found = [[] for _ in range(3)]
    for pieces in found:
        batch.begin(request_of("ada", words(5), pieces))
    run = batch.cache.run

    def failing(*args, **options):
        raise MemoryError

    batch.cache.run = failing
    assert batch.read_step() == 0
    assert batch.idle
    assert len(ended) == 3
    assert ["MemoryError" in pieces[-1].message for pieces in found] == [True] * 3
    batch.cache.run = run
    again = []
    batch.begin(request_of("bob", words(5), again))
    while not batch.idle:
        batch.read_step()
        batch.decode_step()
    check(taught, ended[-1], again)


@pytest.mark.parametrize("family", ["sliding", "gemma"])
def test_models_with_sliding_windows(family):
    common = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
    if family == "gemma":
        config = Gemma3TextConfig(**common, num_hidden_layers=3, head_dim=8, sliding_window=9,
                                  layer_types=["sliding_attention", "full_attention", "sliding_attention"])  # fmt: skip
        model = Gemma3ForCausalLM(config)
    else:
        config = Qwen2Config(**common, num_hidden_layers=4, sliding_window=9, use_sliding_window=True,
                             max_window_layers=2)  # fmt: skip
        model = Qwen2ForCausalLM(config)
    learner = learner_of(model.eval())
    learner.observe(torch.randint(0, 256, (1, 30)), users=["ada"])
    batch, ended = batch_of(learner)
    found = []
    for user, length in (("ada", 30), (None, 4)):
        pieces = []
        found.append((request_of(user, words(length), pieces, max_tokens=15), pieces))
        batch.begin(found[-1][0])
        while batch.reading:
            batch.read_step()
    while not batch.idle:
        batch.decode_step()
    for request, pieces in found:
        check(learner, request, pieces)
    assert len(ended) == 2


def test_attention_that_cannot_be_kept_is_refused(model):
    changed = tiny_chat_model()
    changed.config.layer_types = ["linear_attention"] * 4
    with pytest.raises(ValueError, match="linear_attention"):
        RowCache(changed, None, 2, 64)


def test_a_stop_text_ends_a_sequence_and_is_no_part_of_it(model, tmp_path):
    service = service_of(model, tmp_path)
    prompt = [97 + i % 26 for i in range(20)]
    whole = Answer(service, None, prompt, max_tokens=30, logprobs=0).wait()
    text = whole.text()
    for cut in (3, 11):
        stop = text[cut : cut + 4]
        at = text.index(stop)
        found = Answer(service, None, prompt, max_tokens=30, stop=(stop,)).wait()
        assert found.text() == text[:at]
        assert found.pieces[-1].finish == "stop"
    assert whole.pieces[-1].finish == "length"
    assert whole.end.completion_tokens == 30
    # What was generated is scored as the prompt is.
    rescored = Answer(service, None, prompt + whole.tokens(), max_tokens=0, logprobs=0).wait()
    assert rescored.text() == ""
    scores = [score.logprob for piece in whole.pieces for score in piece.tokens]
    assert [score.logprob for score in rescored.prompt_scores][19:] == pytest.approx(scores, abs=1e-4)
    service.drain()
