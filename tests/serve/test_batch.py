"""Continuous batching: every sequence as if it were alone, with its user's weights."""

import pytest
import torch
from tiny_chat_model import Answer, byte_tokenizer, learner_of, served_in_random_order, service_of, tiny_chat_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

import ttt
from ttt.serve.batch import Batch, Request
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
