"""A study leaves out the blocks that would compute the same again: against studies in which all blocks run."""

import copy
import re
import threading
from collections import Counter

import pytest
import torch
from studying import flat, learner_of, told, words
from tiny_models import VOCAB, tiny

import ttt
from ttt.adapt.training import other_hooks
from ttt.learn import blocks as blocks_module
from ttt.learn.blocks import KnownBlocks
from ttt.ops import backends


def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Gemma3TextConfig(
        vocab_size=VOCAB, **sizes, head_dim=8, num_key_value_heads=2, bos_token_id=0, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2, final_logit_softcapping=20.0,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def learner_with(model, users):
    config = ttt.TTTConfig(
        ["down_proj"], layers="last:0.5", protect=[ttt.KroneckerFisher(directions=3)], window=8, chunk=8,
        per_user=None if users is None else ttt.LowRank(slots=users, rank=40, window=8),
    )  # fmt: skip
    learner = ttt.Learner(ttt.adapt_(model, config), episodes=ttt.EpisodeLog())
    learner.calibrate([words(2, 24)])
    return learner


def whole(learner):
    """A copy of ``learner`` whose studies run all blocks."""
    other = copy.deepcopy(learner)
    other.model.register_forward_hook(lambda module, args, output: None)
    return other


def tell(learner, lengths, share=0.6):
    for length in lengths:
        ids = words(1, length)
        learn = torch.rand(ids.shape) < share
        learn[:, -1] = True
        told(learner, ids, learn)


def assert_close(one, two, users):
    states = [flat(la.snapshot() if users is None else la.pool.export("ada")) for la in (one, two)]
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-4, atol=1e-5)


def counting(learners, patch):
    """How often each block of ``learners`` runs from now on, by its place; no hooks are used."""
    found, stacks = Counter(), [blocks_module.blocks_of(la.model, la.access.layers, None)[0] for la in learners]
    places = {block: at for stack in stacks for at, block in enumerate(stack)}
    forward = type(stacks[0][0]).forward

    def counted(self, *args, **kwargs):
        found[places[self]] += 1
        return forward(self, *args, **kwargs)

    patch.setattr(type(stacks[0][0]), "forward", counted)
    return found


def reported():
    return {(backend, why): n for (op, backend, why), n in backends.calls.items() if op == "study"}


@pytest.mark.parametrize("users", [None, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3"])
def test_the_result_is_that_of_running_all_blocks(family, users, monkeypatch):
    learner = learner_with(gemma3(), users) if family == "gemma3" else learner_of(users, family=family)
    tell(learner, [9, 5, 17, 9])
    user = None if users is None else "ada"
    other, found = whole(learner), []
    ran = counting((learner, other), monkeypatch)
    for each in (learner, other):
        monkeypatch.setattr(backends, "calls", Counter())
        ran.clear()
        found.append(each.study(user, passes=10, lr=0.02, until=0.0))
        calls = reported()
        if each is learner:
            # A part of a step has all episodes; of the texts there are 8 groups.
            assert calls == {("all blocks", ""): 1 + 8, ("upper blocks", ""): 10 + 10, ("head", ""): 2}
            assert ran[3] - ran[0] == calls["upper blocks", ""] + 1  # and when it is tried
        else:
            assert calls == {("all blocks", "the model has hooks"): 10 + 1 + 20}
            assert ran[0] == ran[3]
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-5)
    assert found[0].moved == pytest.approx(found[1].moved, rel=1e-3, abs=1e-7)
    assert found[0].after == pytest.approx(found[1].after, rel=1e-5)
    assert_close(learner, other, users)


def test_more_episodes_than_a_step_takes_are_read_in_changing_company(monkeypatch):
    learner = learner_of()
    tell(learner, [int(torch.randint(3, 30, ())) for _ in range(50)], share=1.0)
    other = whole(learner)
    monkeypatch.setattr(backends, "calls", Counter())
    found = [each.study(passes=6, lr=0.02, until=0.0, rehearse=0) for each in (learner, other)]
    assert reported()["all blocks", ""] == 2  # the parts of the first pass
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-5)
    assert_close(learner, other, None)


def test_hidden_states_are_kept_up_to_a_limit(monkeypatch):
    learner = learner_of()
    tell(learner, [20, 21])
    other = whole(learner)
    monkeypatch.setattr(blocks_module, "_LIMIT", 20 * 32 * 4)
    monkeypatch.setattr(backends, "calls", Counter())
    assert learner.study(passes=3, rehearse=0).losses == pytest.approx(other.study(passes=3, rehearse=0).losses)
    assert reported()["all blocks", "there are more than 0 MB of hidden states"] > 0
    assert_close(learner, other, None)


@pytest.mark.parametrize("users", [None, 1])
def test_a_study_that_is_interrupted_leaves_no_block_out(users, monkeypatch):
    learner = learner_of(users, lr=0.05)
    ids, user = words(1, 12), None if users is None else "ada"
    learner.observe(ids, users=users and ["ada"])
    with torch.no_grad():
        before = learner.model(input_ids=ids).logits

    class Interrupted(Exception):
        pass

    run, calls = learner.head.run, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 3:
            raise Interrupted
        return run(*args)

    monkeypatch.setattr(learner.head, "run", interrupted)
    steps = learner.study_in_steps(user, passes=5)

    def take_all():
        for _ in steps:
            assert_as_it_was(learner.model)  # also between the steps

    with pytest.raises(Interrupted):
        take_all()
    assert_as_it_was(learner.model)
    with torch.no_grad():
        assert torch.equal(learner.model(input_ids=ids).logits, before)


def assert_as_it_was(model):
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not other_hooks(module)


def known(model, ids, layers=None):
    """The blocks of ``model``, of which the upper half learns, after they were tried on ``ids``."""
    found = KnownBlocks(model, layers or [block.mlp.down_proj for block in model.model.layers[2:]], model.lm_head)
    found.check(ids[0])
    return found


@torch.no_grad()
def test_padding_and_other_threads_change_nothing():
    model, ids = tiny().eval(), words(3, 11)
    lengths = [11, 7, 1]
    blocks, expected = known(model, ids), model(input_ids=ids, use_cache=False).logits
    for every in (False, True):
        for at in (0, 1):
            ids[1, 7:], ids[2, 1:] = at + 1, at + 2
            with blocks.reading(ids, lengths, every=every):
                found, elsewhere = model(input_ids=ids, use_cache=False).logits, []
                thread = threading.Thread(target=lambda at=elsewhere: at.append(logits_of(model, words(2, 5, seed=1))))
                thread.start()
                thread.join()
            for row, length in enumerate(lengths):
                torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=1e-5, atol=1e-5)
            assert torch.equal(elsewhere[0], logits_of(model, words(2, 5, seed=1)))


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def test_what_was_kept_of_other_weights_is_dropped():
    model, ids = tiny().eval(), words(2, 9)
    blocks = known(model, ids)
    for _ in range(2):
        with blocks.reading(ids, [9, 9]):
            logits_of(model, ids)
    model.get_input_embeddings().weight.normal_()
    with blocks.reading(ids, [9, 9]):
        found = logits_of(model, ids)
    assert torch.equal(found, logits_of(model, ids))


def _passes_notes(model):
    """Upper blocks read what a lower one leaves at the model beside its hidden state."""
    first, last = model.model.layers[0], model.model.layers[3]

    class Leaving(type(first)):
        def forward(self, hidden_states, *args, **kwargs):
            model.note = hidden_states.mean() + len(getattr(model, "read", []))
            return super().forward(hidden_states, *args, **kwargs)

    class Taking(type(last)):
        def forward(self, hidden_states, *args, **kwargs):
            note, model.note = model.note, None
            return super().forward(hidden_states + note, *args, **kwargs)

    first.__class__, last.__class__ = Leaving, Taking


def _runs_twice(model):
    layers = model.model.layers
    first, forward = layers[0], type(layers[0]).forward

    class Twice(type(first)):
        def forward(self, hidden_states, *args, **kwargs):
            return forward(self, layers[1](hidden_states, *args, **kwargs), *args, **kwargs)

    first.__class__ = Twice


def _returns_more(model):
    class More(type(model.model.layers[1])):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs), 0

    class Fewer(type(model.model.layers[2])):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states[0], *args, **kwargs)

    model.model.layers[1].__class__, model.model.layers[2].__class__ = More, Fewer


def _counts_calls(model):
    class Counting(type(model.model.layers[3])):
        def forward(self, hidden_states, *args, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(hidden_states, *args, **kwargs).roll(self.calls, -1)

    model.model.layers[3].__class__ = Counting


@pytest.mark.parametrize(("change", "why"), [
    (_passes_notes, r"need more of those below than a hidden state \(TypeError\)"),
    (_runs_twice, "each of its blocks once"),
    (_returns_more, "the hidden state of each token, and nothing else"),
    (_counts_calls, "compute something else without those below"),
    (lambda model: model.register_forward_pre_hook(lambda module, args: None), "the model has hooks"),
    (lambda model: model.compile(), "the model is compiled"),
])  # fmt: skip
@torch.no_grad()
def test_all_blocks_run_where_one_needs_more_than_a_hidden_state(change, why, monkeypatch):
    model, ids = tiny().eval(), words(2, 9)
    layers = [block.mlp.down_proj for block in model.model.layers[2:]]
    change(model)
    blocks = known(model, ids, layers)
    assert re.search(why, blocks.why)
    monkeypatch.setattr(backends, "calls", Counter())
    with blocks.reading(ids, [9, 9], every=True):
        pass
    assert reported() == {("all blocks", blocks.why): 1}
    assert f"study on all blocks: {blocks.why}" in ttt.info(None)["slow_calls"]
