"""Rules for streams: what a `ttt.Learner` makes of their terms, and distillation from the anchor."""

import copy

import pytest
import torch
from rules_on_text import PLAIN, assert_changes, changes_of, cross_entropy, divergence, double, plain_copy, steps_of
from tiny_models import adapted, assert_same, ids_of, state_of, tiny

import ttt
from ttt.adapt.convert import learning_layers
from ttt.ops import backends
from ttt.rules import LogitDistillation, LwF, StreamRule, distillation, top_distillation, top_logits


class Term(StreamRule):
    """A rule of any function of the chunk."""

    def __init__(self, of):
        self.of, self.calls = of, []

    def term(self, chunk):
        return self.of(chunk)

    def seen(self, chunk):
        self.calls.append((chunk.start, chunk.end))


@pytest.mark.parametrize("window", [1, 5, 64])
def test_terms_join_the_step_of_the_chunk(window):
    """A term of the chunk's logits and one of another sequence, against autograd on the sum."""
    other = ids_of(2, 12)
    squares = Term(lambda chunk: 0.01 * chunk.logits.square().sum())
    more = Term(lambda chunk: 0.5 * cross_entropy(more.learner.model, other))
    model, _ = double([squares, more], window=window, chunk=16)
    plain, ids = plain_copy(model), ids_of(2, 10)
    loss = (
        cross_entropy(plain, ids) + 0.01 * plain(ids[:, :-1]).logits.square().sum() + 0.5 * cross_entropy(plain, other)
    )
    seen = squares.learner.observe(ids)
    assert (seen.learned, squares.calls, more.calls) == (1, [(0, 9)], [(0, 9)])
    expected = steps_of(plain, loss, [name for name, _ in learning_layers(model)])
    assert_changes(changes_of(model, plain), expected)


def test_terms_where_the_head_is_left_to_autograd():
    """A hook on the head makes its gradient autograd's."""
    rule = Term(lambda chunk: 0.01 * chunk.logits.pow(3).sum())
    model, learner = adapted(**PLAIN, chunk=16)
    learner = ttt.Learner(model, rules=[rule])
    model.lm_head.register_forward_hook(lambda module, args, out: out * 1.5)
    plain, ids = tiny(), ids_of(1, 10)
    plain.load_state_dict(model.state_dict())
    logits = plain(ids).logits[:, :-1] * 1.5
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss = loss + 0.01 * logits.pow(3).sum()
    backends.calls.clear()
    learner.observe(ids)
    assert backends.calls["head_gradient", "autograd", "the output head or the model has hooks"] > 0
    names = [name for name, _ in learning_layers(model)]
    for name, step in steps_of(plain, loss, names).items():
        layer = model.get_submodule(name)
        torch.testing.assert_close(layer.effective_weight() - layer.anchor, step, rtol=1e-3, atol=2e-5)


def test_masks_hold_for_the_chunk_and_not_for_what_is_replayed():
    other = ids_of(1, 9)
    rule = Term(lambda chunk: cross_entropy(rule.learner.model, other))
    model, learner = double([rule], chunk=32)
    start, ids = learner.snapshot(), ids_of(3, 20)
    mask = torch.ones(3, 20)
    mask[1] = 0
    learner.observe(ids, learn_mask=mask)
    masked = state_of(model)
    learner.rollback(start)
    learner.observe(ids[[0, 2]])
    for key, value in state_of(model).items():
        torch.testing.assert_close(masked[key], value, rtol=1e-9, atol=1e-12)
    assert rule.calls == [(0, 19)] * 2
    before = state_of(model)
    learner.observe(ids, learn_mask=torch.zeros(3, 20))
    learner.observe(ids, learn=False)
    assert_same(before, state_of(model))
    assert rule.calls == [(0, 19)] * 2


def test_replayed_rows_have_no_part_in_a_mas_trace():
    other, traces = ids_of(1, 9), []
    rules: list[Term] = [Term(lambda chunk: None), Term(lambda chunk: cross_entropy(rules[1].learner.model, other))]
    for rule in rules:
        torch.manual_seed(5)
        model, learner = double([rule], importance="mas", ewc_lambda=0.1, chunk=32, window=64)
        learner.observe(torch.arange(1, 21).view(1, 20))
        learner.flush()
        traces.append([layer.trace for _, layer in learning_layers(model)])
    for alone, beside in zip(*traces, strict=True):
        assert float(alone.sum()) > 0
        torch.testing.assert_close(alone, beside, rtol=1e-9, atol=0)


def test_a_term_that_is_not_finite_rejects_the_chunk_and_changes_nothing():
    bad = [True]
    rule = Term(lambda chunk: chunk.logits.sum() * (float("nan") if bad[0] else 1.0))
    hidden = Term(lambda chunk: torch.where(chunk.logits > 1e9, chunk.logits, 0.0).sum() * 1.0)
    model, learner = double([rule, hidden])
    before = state_of(model)
    seen = learner.observe(ids_of(2, 17))
    assert (seen.learned, seen.rejected) == (0, 2)
    assert bool(torch.isfinite(seen.nll).all())
    assert_same(before, state_of(model))
    assert rule.calls == hidden.calls == []
    bad[0] = False
    assert learner.observe(ids_of(2, 17)).learned == 2
    assert rule.calls == [(0, 8), (8, 16)]


def test_what_cannot_work_is_refused():
    rule = Term(lambda chunk: None)
    model, learner = double([rule])
    with pytest.raises(ValueError, match="Term serves a learner already"):
        ttt.Learner(model, rules=[rule])
    with pytest.raises(TypeError, match=r"rules must be ttt\.rules.StreamRule, which learn from text, got LwF"):
        ttt.Learner(model, rules=[LwF()])
    with pytest.raises(ValueError, match=r"learner must have no rules.*got \['Term'\]"):
        ttt.GraphedLearner(learner, graph=False)
    assert all(layer.capturable is None for layer in learner.layers)
    with pytest.raises(ValueError, match="learn_output cannot be True for a learner with rules"):
        learner.generate(ids_of(1, 5), max_new_tokens=2, learn_output=True)
    learner.generate(ids_of(1, 20), max_new_tokens=2)
    assert rule.calls == [(0, 8), (8, 16), (16, 19)]
    before = state_of(model)
    with pytest.raises(ValueError, match=r"rules \['Term'\], got \[\]; nothing was changed"):
        learner.rollback(ttt.Learner(model).snapshot())
    assert_same(before, state_of(model))
    for options, message in (({"weight": -1.0}, "weight must be"), ({"temperature": 0.0}, "temperature must be")):
        with pytest.raises(ValueError, match=message):
            LogitDistillation(**options)


# -- distillation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", [None, "left"])
def test_the_teacher_is_the_anchor_in_the_same_context(family, side):
    """Also after segments, chunks that teach nothing, a consolidation, and a rollback."""
    rule = LogitDistillation(0.7, temperature=3.0)
    model, _ = adapted(family, **{**PLAIN, "lr": 0.05})
    learner = ttt.Learner(model, context=24, rules=[rule])
    pristine, found = copy.deepcopy(model), []
    told = rule.teacher_logits
    rule.teacher_logits = lambda chunk: found.append((chunk, told(chunk))) or found[-1][1]

    def read(anchor):
        ids, mask = ids_of(2, 43), torch.ones(2, 43, dtype=torch.long)
        if side:
            mask[0, :5] = 0
        learn = torch.ones_like(mask)
        learn[:, 3:19] = 0  # all of the second chunk
        found.clear()
        learner.observe(ids, attention_mask=mask if side else None, learn_mask=learn)
        assert [(c.segment.start, c.start, c.end) for c, _ in found] == [
            (0, 0, 8), (0, 16, 24), (24, 0, 8), (24, 8, 16), (24, 16, 18)
        ]  # fmt: skip
        for chunk, logits in found:
            span = slice(chunk.segment.start, chunk.segment.start + chunk.end)
            inputs = {"attention_mask": mask[:, span]} if side else {}
            if side:
                inputs["position_ids"] = (mask[:, span].cumsum(1) - 1).clamp_min(0)
            with torch.no_grad():
                expected = anchor(ids[:, span], **inputs).logits[:, chunk.start :]
            attended = mask[:, span][:, chunk.start :].bool()
            torch.testing.assert_close(logits[attended], expected[attended], rtol=1e-3, atol=1e-3)
        del chunk
        found.clear()
        assert list(rule.tensors()) == []  # the text's cache went with the text

    read(pristine)
    before = learner.snapshot()
    learner.flush()
    learner.consolidate()
    moved = copy.deepcopy(model)
    assert float((moved(ids_of(1, 8)).logits - pristine(ids_of(1, 8)).logits).abs().max()) > 0.01
    read(moved)
    learner.rollback(before)
    read(pristine)
    learner.reset()
    read(pristine)


def test_distillation_is_the_step_that_autograd_takes():
    rule = LogitDistillation(0.7, temperature=3.0)
    model, learner = double([rule], chunk=16)
    teacher = plain_copy(model)
    learner.observe(ids_of(1, 20).repeat(1, 8))
    plain, ids = plain_copy(model), ids_of(2, 14)
    assert float((plain(ids).logits - teacher(ids).logits).abs().max()) > 0.05
    loss = cross_entropy(plain, ids) + 0.7 * divergence(
        plain(ids[:, :-1]).logits, teacher(ids[:, :-1]).logits.detach(), 3.0
    )
    learner.observe(ids)
    assert_changes(changes_of(model, plain), steps_of(plain, loss, [name for name, _ in learning_layers(model)]))


def test_at_the_anchor_there_is_nothing_to_distil():
    alone, learner = double(chunk=16)
    ids = ids_of(1, 12)
    model = ttt.adapt_(plain_copy(alone), learner.config)
    ttt.Learner(model, rules=[LogitDistillation(100.0)]).observe(ids)
    assert learner.observe(ids).learned == 1
    for key, value in state_of(model).items():
        torch.testing.assert_close(value, state_of(alone)[key], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("top", [None, 5])
def test_the_gradient_tends_to_a_constant_in_the_temperature(top):
    """With the factor T^2: to that of the centred logits' squared error, for all outputs."""
    z, s = (torch.randn(4, 9, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    grads = []
    for temperature in (1e2, 1e3, 1e4):
        if top is None:
            loss = distillation(s, z, temperature, [slice(None)])
        else:
            loss = top_distillation(s, top_logits(z, top, temperature), temperature)
        grads.append(torch.autograd.grad(loss, s)[0])
    assert float(grads[-1].norm()) > 0.1
    assert float((grads[1] - grads[2]).norm() / grads[2].norm()) < 2e-2
    assert float((grads[1] - grads[2]).norm()) < 0.2 * float((grads[0] - grads[2]).norm())
    if top is None:
        centred = [t - t.mean(-1, keepdim=True) for t in (s.detach(), z)]
        torch.testing.assert_close(grads[2], (centred[0] - centred[1]) / 9, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("top", [1, 4, 8, 9, 30])
def test_top_distillation_against_the_sums_written_out(top):
    z, s = (2 * torch.randn(3, 2, 9, dtype=torch.float64) for _ in range(2))
    kept = top_logits(z, top, 2.0)
    assert kept.outputs.shape == (3, 2, min(top, 9))
    total = torch.zeros((), dtype=torch.float64)
    for student, teacher in zip(s.flatten(0, 1), z.flatten(0, 1), strict=True):
        p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
        order = p.argsort(descending=True)
        for word in order[:top]:
            total += 4 * p[word] * (p[word] / q[word]).log()
        if top < 9:
            rest = order[top:]
            total += 4 * p[rest].sum() * (p[rest].sum() / q[rest].sum()).log()
    found = top_distillation(s, kept, 2.0)
    torch.testing.assert_close(found, total, rtol=1e-10, atol=1e-12)
    full = divergence(s, z, 2.0)
    if top >= 8:  # one word left is no choice
        torch.testing.assert_close(found, full, rtol=1e-10, atol=1e-12)
    else:
        assert float(found) < float(full)
