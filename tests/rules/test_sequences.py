"""Replay of token sequences while reading: ER, DER, DER++, and text that the anchor wrote."""

import pytest
import torch
from rules_on_text import assert_changes, changes_of, cross_entropy, divergence, double, plain_copy, steps_of
from tiny_models import VOCAB, adapted, assert_same, ids_of, state_of

import ttt
from ttt.adapt.convert import learning_layers
from ttt.learn.protection import anchored
from ttt.learn.stream_rule import Chunk, Segment
from ttt.rules import DarkSequenceReplay, SampledReplay, SequenceReplay


def names_of(model):
    return [name for name, _ in learning_layers(model)]


def drawn_by(rule):
    """Makes ``rule``'s draws visible."""
    drawn, draw = [], rule.draw
    rule.draw = lambda: drawn.append(draw()) or drawn[-1]
    return drawn


def bits(rule):
    """All that the rule holds, for comparison."""
    return {str(i): t.clone() for i, t in enumerate(rule.tensors())}


def shown(rule, ids, learner=None):
    """``rule`` after it was shown ``ids`` (B, T + 1) in chunks of 8."""
    segment = Segment(ids)
    for at in range(0, ids.shape[1] - 1, 8):
        rule.seen(Chunk(segment, at, min(at + 8, ids.shape[1] - 1), torch.empty(0)))


# -- experience replay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [False, True])
def test_er_step_is_autograds_on_the_union(base):
    known = ids_of(3, 14)
    rule = SequenceReplay(20, 2, 6, weight=0.4, base=known if base else None, stream=not base)
    model, learner = double([rule], chunk=16)
    first, ids = ids_of(1, 15), ids_of(2, 12)
    learner.observe(first)
    plain, drawn = plain_copy(model), drawn_by(rule)
    learner.observe(ids)
    (held,) = drawn
    pool = known[:, :13] if base else first[:, :13]
    pieces = {tuple(row[at : at + 7].tolist()) for row in pool for at in (0, 6)}
    assert held["ids"].shape == (2, 7)
    assert {tuple(row.tolist()) for row in held["ids"]} <= pieces
    loss = cross_entropy(plain, ids) + 0.4 * cross_entropy(plain, held["ids"])
    assert_changes(changes_of(model, plain), steps_of(plain, loss, names_of(model)))


def test_replay_begins_its_graph_at_the_lowest_layer_that_learns_and_runs_one_batch():
    rule = SequenceReplay(20, 3, 6, base=ids_of(3, 14))
    model, learner = double([rule], layers=[2])
    graph = []
    learner.observe(ids_of(1, 4), learn=False)  # the first text is preceded by a trial of the model
    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda m, args, out, i=i: graph.append((i, args[0].shape[0], out.requires_grad)))
    learner.observe(ids_of(1, 8))
    assert graph == [(0, 1, False), (1, 1, False), (2, 1, True), (3, 1, True),
                     (0, 3, False), (1, 3, False), (2, 3, True), (3, 3, True)]  # fmt: skip


def test_pieces_are_cut_where_all_tokens_were_learnt():
    rule = SequenceReplay(50, 1, 5)
    _, learner = double([rule], chunk=8)
    ids = ids_of(2, 27)
    mask = torch.ones(2, 27)
    mask[0, 12] = 0
    attend = torch.ones(2, 27)
    attend[1, :3] = 0
    learner.observe(ids, learn_mask=mask, attention_mask=attend)
    expected = {(0, at) for at in (0, 5, 15, 20)} | {(1, at) for at in (5, 10, 15, 20)}
    expected -= {(0, 10)}  # its token 12 may not teach
    held = rule.reservoir.fields["ids"][: len(rule.reservoir)]
    assert {tuple(row.tolist()) for row in held} == {tuple(ids[b, at : at + 6].tolist()) for b, at in expected}
    assert rule.reservoir.seen == 8


@pytest.mark.parametrize("chunk", [3, 8, 11])
def test_pieces_do_not_depend_on_the_chunk_but_for_the_end_of_a_segment(chunk):
    rule = SequenceReplay(50, 1, 5)
    model, _ = double(chunk=chunk)
    learner = ttt.Learner(model, context=33, rules=[rule])
    ids = ids_of(1, 41)
    learner.observe(ids)
    held = rule.reservoir.fields["ids"][: len(rule.reservoir)].long()
    starts = [0, 5, 10, 15, 20, 25, 33]  # the second segment has 33 ... 40, of which the last is a target
    assert torch.equal(held, torch.stack([ids[0, at : at + 6] for at in starts]))


def test_reservoir_of_sequences_is_uniform_over_base_and_stream():
    held, base, stream = torch.zeros(60), torch.arange(20).view(10, 2), torch.arange(20, 61).view(1, 41)
    for seed in range(400):
        rule = SequenceReplay(6, 1, 1, base=base, seed=seed)
        rule.attach(Fake())
        shown(rule, stream)
        held[rule.reservoir.fields["ids"][:, 0].long()] += 1
    # 50 sequences (10 of the base, which begin with even tokens), 6 held: 48 +- 6.5 each; 10 of them 480 +- 20
    assert float(held.sum()) == 2400
    for part in (held[:20:2], *held[20:].split(10)):
        assert abs(float(part.sum()) - 480) < 80
    assert float(held[1:20:2].sum()) == 0


class Fake:
    """What a rule asks of a learner when it is attached."""

    context = 64

    class model:
        parameters = staticmethod(lambda: iter([torch.zeros(1)]))
        get_input_embeddings = staticmethod(lambda: torch.nn.Embedding(1000, 1))


def test_every_and_an_empty_memory():
    rule = SequenceReplay(20, 1, 4, every=3)
    _, learner = double([rule], chunk=5)
    drawn = drawn_by(rule)
    learner.observe(ids_of(1, 41))
    assert rule.steps == 8
    assert len(drawn) == 2  # before the first step there is nothing; then before the fourth and the seventh
    learner.observe(ids_of(1, 41), learn=False)
    assert (rule.steps, len(drawn)) == (8, 2)


RULES = {
    "ER": lambda base: SequenceReplay(4, 2, 5, base=base),
    "DER": lambda base: DarkSequenceReplay(4, 2, 5, beta=0.0, base=base, top=7),
    "DER++": lambda base: DarkSequenceReplay(4, 2, 5, base=base),
    "sampled": lambda base: SampledReplay(4, 2, 5, burn_in=2),
}


@pytest.mark.parametrize("name", RULES)
def test_what_rejection_reading_rollback_and_reset_leave_of_the_memory(name):
    rule = RULES[name](ids_of(2, 12))
    model, _ = adapted(lr=0.02)
    fresh = state_of(model)
    learner = ttt.Learner(model, rules=[rule])
    start, ids = bits(rule), ids_of(1, 33)
    assert len(rule.reservoir) == 4
    learner.observe(ids, learn=False)
    assert_same(start, bits(rule))
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out * float("nan"))
    before = state_of(model)
    assert learner.observe(ids).rejected == 4
    handle.remove()
    assert_same(start, bits(rule))
    assert_same(before, state_of(model))
    assert (rule.steps, rule.reservoir.seen) == (0, 4)

    snapshot = learner.snapshot()
    first = learner.observe(ids).nll
    assert rule.steps == 4
    after, weights = bits(rule), state_of(model)
    assert name == "sampled" or rule.reservoir.seen == 4 + 6
    learner.consolidate()
    assert name != "sampled" or not all(torch.equal(t, after[k]) for k, t in bits(rule).items())
    learner.rollback(snapshot)
    assert_same(start, bits(rule))
    assert torch.equal(learner.observe(ids).nll, first)
    assert_same(after, bits(rule))
    assert_same(weights, state_of(model))

    learner.consolidate()
    learner.observe(ids_of(1, 33))
    learner.reset()
    assert_same(start, bits(rule))
    assert_same(fresh, state_of(model))
    assert rule.steps == 0


@pytest.mark.parametrize("make", RULES.values())
def test_a_replayed_sequence_that_is_not_finite_rejects_the_chunk(make):
    rule = make(ids_of(2, 12))
    model, _ = adapted()
    learner = ttt.Learner(model, rules=[rule])
    learner.observe(ids_of(1, 4), learn=False)  # the first text is preceded by a trial of the model
    before, memory, calls = state_of(model), bits(rule), []

    def second(module, args, out):
        calls.append(1)
        return out * float("inf") if len(calls) == 2 else out

    handle = model.model.layers[-1].register_forward_hook(second)  # the chunk is the first
    seen = learner.observe(ids_of(1, 9))
    handle.remove()
    assert (seen.learned, seen.rejected, len(calls)) == (0, 1, 2)
    assert_same(before, state_of(model))
    assert_same(memory, bits(rule))


def test_rules_compose_with_each_other_and_with_protection():
    rules = [make(ids_of(2, 12)) for make in RULES.values()] + [ttt.rules.LogitDistillation()]
    model, _ = adapted(importance="mas", ewc_lambda=0.01, replay_rows=4)
    learner = ttt.Learner(model, rules=rules)
    learner.calibrate([ids_of(2, 16)])
    ids = ids_of(2, 40)
    scores = [learner.observe(ids).bits for _ in range(6)]
    learner.consolidate()
    assert learner.observe(ids).rejected == 0
    assert scores[-1] < scores[0]


# -- dark experience replay -----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_der_with_all_logits_is_autograds_step_on_the_full_formula(beta):
    """The logits are those from just after the sequence was learnt, read alone."""
    rule = DarkSequenceReplay(20, 2, 6, alpha=0.3, beta=beta, temperature=1.5, top=VOCAB)
    model, learner = double([rule], chunk=14)
    first, ids = ids_of(1, 15), ids_of(2, 12)
    learner.observe(first)  # one chunk, two pieces
    then = plain_copy(model)
    for _ in range(9):
        learner.observe(ids_of(2, 6))  # too short to be remembered, but something is learnt
    plain, drawn = plain_copy(model), drawn_by(rule)
    learner.observe(ids)
    (dark, *labelled) = [held["ids"] for held in drawn]
    assert {tuple(row.tolist()) for row in dark} == {tuple(first[0, at : at + 7].tolist()) for at in (0, 6)}
    said, now = then(dark[:, :-1]).logits.detach(), plain(dark[:, :-1]).logits
    assert float((said - now).abs().max()) > 0.02
    loss = cross_entropy(plain, ids) + 0.3 * divergence(now, said, 1.5)
    for each in labelled:
        loss = loss + beta * cross_entropy(plain, each)
    assert len(labelled) == (beta > 0)
    assert_changes(changes_of(model, plain), steps_of(plain, loss, names_of(model)))


def test_dark_memory_holds_the_logits_of_each_of_its_sequences():
    """Also where the reservoir turns some away, of base text and of the stream."""
    rule = DarkSequenceReplay(5, 1, 4, top=9, temperature=1.5, base=ids_of(3, 14))
    model, _ = double(lr=1e-9)  # so that all were made by one model
    learner, ran = ttt.Learner(model, rules=[rule]), []
    handle = model.register_forward_hook(lambda module, args, out: ran.append(len(out.logits)))
    learner.observe(ids_of(2, 41))
    handle.remove()
    held = rule.reservoir.fields
    assert rule.reservoir.seen == 9 + 20
    with torch.no_grad():
        logp = (model(held["ids"][:, :-1].long()).logits / 1.5).log_softmax(-1)
    values, outputs = logp.sort(-1, descending=True)
    assert torch.equal(held["outputs"].long(), outputs[..., :9])
    torch.testing.assert_close(held["logp"][..., :9], values[..., :9], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(held["logp"][..., 9], values[..., 9:].exp().sum(-1).log(), rtol=1e-5, atol=1e-6)
    size = sum(t.numel() * t.element_size() for t in held.values())
    assert size == 5 * (5 * 4 + 4 * 9 * 4 + 4 * 10 * 8)  # int32 tokens and outputs, float64 of a float64 model


# -- text that the anchor wrote -------------------------------------------------------------------------------


def test_sampled_text_is_learnt_with_the_anchors_labels():
    rule = SampledReplay(6, 3, 7, weight=0.4, temperature=1.5, top=VOCAB, burn_in=3)
    model, learner = double([rule], chunk=16)
    anchor = plain_copy(model)
    learner.observe(ids_of(1, 20).repeat(1, 8))
    plain, drawn, ids = plain_copy(model), drawn_by(rule), ids_of(2, 12)
    learner.observe(ids)
    (held,) = drawn
    text = held["ids"]
    assert text.shape == (3, 8)
    assert bool(held["written"].all())
    said, now = anchor(text[:, :-1]).logits.detach(), plain(text[:, :-1]).logits
    assert float((said - now).abs().max()) > 0.05  # the live model would say other things
    loss = cross_entropy(plain, ids) + 0.4 * divergence(now, said, 1.5)
    assert_changes(changes_of(model, plain), steps_of(plain, loss, names_of(model)))


def test_the_pool_is_written_by_the_anchor_of_the_moment():
    """Transitions of the sampled text follow the anchor's probabilities, not the live model's."""
    rule = SampledReplay(600, 1, 1, start=7)
    model, _ = adapted(lr=0.05, chunk=16)
    learner = ttt.Learner(model, rules=[rule])

    def says():
        with torch.no_grad():
            return model(torch.tensor([[7]])).logits[0, -1].softmax(-1)

    first = says()
    pools = [rule.reservoir.fields["ids"].clone()]
    for _ in range(12):
        learner.observe(torch.tensor([[7, 23] * 10]))
    second = says()
    with anchored(learner.layers):
        torch.testing.assert_close(says(), first, rtol=1e-4, atol=1e-5)
    for call in (learner.consolidate, learner.reset):
        call()
        pools.append(rule.reservoir.fields["ids"].clone())
    likelier = second > first
    for pool, expected in zip(pools, (first, second, first), strict=True):
        assert bool((pool[:, 0] == 7).all())
        p, other = float(expected[likelier].sum()), float((first + second - expected)[likelier].sum())
        deviation = (p * (1 - p) / 600) ** 0.5
        measured = float(likelier[pool[:, 1].long()].double().mean())
        assert abs(measured - p) < 4.5 * deviation < abs(p - other)


def test_only_written_tokens_count_up_to_the_end_of_a_text():
    rule = SampledReplay(64, 64, 12, burn_in=1, top=VOCAB)
    model, _ = double(chunk=16)
    model.generation_config.eos_token_id = 5
    with torch.no_grad():
        model.lm_head.weight[5] = model.lm_head.weight[5] * 3  # it ends some texts
    learner = ttt.Learner(model, rules=[rule])
    held = rule.draw()
    ids, written = held["ids"], held["written"]
    ended = (ids[:, 1:] == 5).cumsum(1)
    assert torch.equal(written, ended - (ids[:, 1:] == 5).long() == 0)
    assert 0 < int(written[:, 1:].sum()) < written[:, 1:].numel()
    plain = plain_copy(model)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.1)
    said = plain(ids[:, :-1]).logits[written]
    now = model(ids[:, :-1]).logits[written]
    rule.draw = lambda: held
    torch.testing.assert_close(rule.loss(), divergence(now, said, 2.0).detach(), rtol=1e-7, atol=1e-9)
    assert learner.rules == [rule]


def test_sampling_is_seeded_by_the_configuration():
    pools = []
    for seed in (3, 3, 4):
        torch.manual_seed(11)
        model, _ = adapted(seed=seed)
        ttt.Learner(model, rules=[rule := SampledReplay(3, 1, 6, burn_in=2)])
        pools.append(rule.reservoir.fields["ids"])
    assert torch.equal(pools[0], pools[1])
    assert not torch.equal(pools[0], pools[2])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SequenceReplay(0), ValueError, "capacity must be"),
        (lambda: SequenceReplay(4, 0), ValueError, "sequences must be"),
        (lambda: SequenceReplay(4, 1, 0), ValueError, "length must be"),
        (lambda: SequenceReplay(4, every=0), ValueError, "every must be"),
        (lambda: SequenceReplay(4, weight=-1.0), ValueError, "weight must be"),
        (lambda: SequenceReplay(4, stream=False), ValueError, "stream must be True where base is None"),
        (lambda: SequenceReplay(4, 1, 8, base=ids_of(2, 8)), ValueError, r"more than length = 8 tokens, got shape \(2"),
        (lambda: SequenceReplay(4, base=torch.zeros(2, 99)), TypeError, "base must be int64"),
        (lambda: SequenceReplay(4, 1, 65), ValueError, "at most the learner's context of 64, got 65"),
        (lambda: SequenceReplay(4, base=torch.full((1, 70), VOCAB)), ValueError, rf"in \[0, {VOCAB}\)"),
        (lambda: DarkSequenceReplay(4, alpha=0.0, beta=0.0), ValueError, "alpha and beta must not both be 0"),
        (lambda: DarkSequenceReplay(4, alpha=-1.0), ValueError, "alpha must be"),
        (lambda: DarkSequenceReplay(4, top=0), ValueError, "top must be"),
        (lambda: DarkSequenceReplay(4, temperature=0.0), ValueError, "temperature must be"),
        (lambda: SampledReplay(0), ValueError, "pool must be"),
        (lambda: SampledReplay(burn_in=0), ValueError, "burn_in must be"),
        (lambda: SampledReplay(length=64), ValueError, "below the learner's context of 64, got 64"),
        (lambda: SampledReplay(length=8, start=VOCAB), ValueError, rf"in \[0, {VOCAB}\)"),
    ],
)
def test_what_is_refused(make, error, message):
    model, _ = adapted()
    before = state_of(model)
    with pytest.raises(error, match=message):
        ttt.Learner(model, rules=[make()])
    assert_same(before, state_of(model))
