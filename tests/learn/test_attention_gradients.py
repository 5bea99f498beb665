"""Attention in a learning step: transformers' outputs to the bit, gradients from the kernel, and the ways to torch."""

import contextlib
import copy
import threading

import pytest
import torch
from helpers import assert_close
from tiny_models import adapted, ids_of, state_of, tiny
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ttt
from ttt.learn import attention, head
from ttt.learn.huggingface import cache_of, cached
from ttt.ops import backends, cpu

pytestmark = pytest.mark.skipif(cpu._C is None, reason="needs the C++ kernels")
OWN = ALL_ATTENTION_FUNCTIONS["sdpa"]


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is OWN
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def ways():
    return {(b, why): n for (op, b, why), n in backends.calls.items() if op == "attention_backward"}


@contextlib.contextmanager
def counted():
    """Yields a dict that afterwards holds the calls since: (backend, reason) -> number."""
    before, found = ways(), {}
    yield found
    found.update({key: n - before.get(key, 0) for key, n in ways().items() if n != before.get(key, 0)})


def gradient_at_inputs(model, ids, seen, attention_mask=None, kernel=True):
    """(logits, gradient at the embeddings) of the tokens of ``ids`` after the first ``seen``, which are cached."""
    masks = [{} if attention_mask is None else {"attention_mask": attention_mask[:, :n]} for n in (seen, ids.shape[1])]
    model.requires_grad_(False)
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids[:, :seen], **masks[0], **cached(model, None))) if seen else None
        embedded = model.get_input_embeddings()(ids[:, seen:])
    embedded.requires_grad_(True)
    with attention.kernel_attention() if kernel else contextlib.nullcontext():
        logits = model(inputs_embeds=embedded, **masks[1], **cached(model, cache)).logits
    weight = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits).sin()
    logits.backward(weight.to(logits.dtype))
    return logits.detach(), embedded.grad


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("seen", "padded"), [(0, False), (11, False), (0, True), (11, True)])
def test_gradients_through_a_model(family, dtype, seen, padded):
    model, ids = tiny(family).to(dtype), ids_of(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    given = ids, seen, mask if padded else None
    with counted() as calls:
        logits, found = gradient_at_inputs(model, *given)
    assert calls == {("cpu", ""): 4}
    plain_logits, plain = gradient_at_inputs(model, *given, kernel=False)
    assert torch.equal(logits, plain_logits)
    _, exact = gradient_at_inputs(copy.deepcopy(model).double(), *given, kernel=False)
    assert_close(found, exact, plain, "gradient")


def test_no_gradients_are_computed_for_what_comes_from_a_cache(monkeypatch):
    first = []
    kernel = cpu.attention_backward
    monkeypatch.setattr(
        cpu, "attention_backward", lambda *given, **options: first.append(options["first"]) or kernel(*given, **options)
    )
    _, learner = adapted(chunk=8)
    learner.observe(ids_of(1, 33))
    assert first == [0, 8, 16, 24]  # of the last block: the one below learns, so that no gradient goes further down


def test_a_learner_scores_the_same_and_learns_the_same(monkeypatch):
    ids = ids_of(2, 33)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for given in ({}, {"attention_mask": mask}):
        torch.manual_seed(1)
        model, learner = adapted()
        torch.manual_seed(1)
        other, plain = adapted()
        with counted() as calls:
            ours = learner.observe(ids, **given)
        assert calls == {("cpu", ""): 4}
        with monkeypatch.context() as patch, counted() as calls:
            patch.setattr(head, "kernel_attention", contextlib.nullcontext)
            right = plain.observe(ids, **given)
        assert not calls
        assert torch.equal(ours.nll[:, :8], right.nll[:, :8])
        torch.testing.assert_close(ours.nll, right.nll, rtol=1e-4, atol=1e-4)
        for (name, a), b in zip(state_of(model).items(), state_of(other).values(), strict=True):
            if a.is_floating_point():
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_reading_alone_does_not_call_it():
    _, learner = adapted()
    with counted() as calls:
        learner.observe(ids_of(1, 20), learn=False)
    assert not calls


def test_other_threads_get_what_they_got_before():
    model, ids, found = tiny(), ids_of(1, 12), []

    def other():
        with counted() as calls:
            found.append(gradient_at_inputs(model, ids, 0, kernel=False))
        found.append(dict(calls))

    with attention.kernel_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not OWN
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with attention.kernel_attention():
            pass
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not OWN
        with counted() as calls:
            gradient_at_inputs(model, ids, 0, kernel=False)
    (logits, _), calls_of_other = found
    assert calls_of_other == {}
    assert calls == {("cpu", ""): 4}
    assert torch.equal(logits, gradient_at_inputs(model, ids, 0)[0])


def test_an_error_inside_leaves_the_table_as_it_was():
    with pytest.raises(KeyError), attention.kernel_attention():
        raise KeyError


def test_a_function_that_a_user_has_put_in_place_is_used():
    calls = []

    def own(*args, **kwargs):
        calls.append(1)
        return OWN(*args, **kwargs)

    _, learner = adapted()
    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        with counted() as found:
            learner.observe(ids_of(1, 9))
        assert found == {("torch", "another function has replaced transformers' attention"): 1}
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert calls


def through(query, key, value, mask=None, module=None, **options):
    """transformers' function inside of the block, differentiated: (its output, the gradient at the queries)."""
    with attention.kernel_attention():
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out, _ = function(module or torch.nn.Module(), query, key, value, mask, **options)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), query, retain_graph=True)
    return out, gradient


def rows(heads=2, tokens=5, width=4, dtype=torch.float32):
    return torch.randn(1, heads, tokens, width).to(dtype).requires_grad_(True)


def test_what_the_kernel_does_not_compute_is_left_to_torch():
    given = rows(), rows(), rows()
    cases = {
        "queries, keys and values of torch.float64, torch.float64, torch.float64": ([t.double() for t in given], {}),
        "dropout, a bias of positions or a softcap": (given, {"dropout": 0.5}),
        "a mask that is not of bool": (given, {"mask": torch.zeros(1, 1, 5, 5)}),
        "a mask of another shape": (given, {"mask": torch.ones(5, 5, dtype=torch.bool)}),
        "a scale that is no number above 0": (given, {"scaling": -0.5}),
    }
    for why, (tensors, options) in cases.items():
        tensors = [t.detach().requires_grad_() for t in tensors]
        with counted() as calls:
            through(*tensors, **options)
        assert calls == {("torch", why): 1}
    with counted() as calls, torch.autocast("cpu", torch.bfloat16):
        through(*given)
    assert calls == {("torch", "autocast"): 1}


def test_the_arguments_mean_what_they_mean_to_transformers():
    """Causal or not, said by the module or by the call; the scale; queries that see all keys of a longer text."""
    query, key, value = rows(4, 5), rows(2, 7), rows(2, 7)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    for is_causal in (True, False):
        for options in ({}, {"is_causal": True}, {"is_causal": False}, {"scaling": 0.1}):
            module.is_causal = is_causal
            with counted() as calls:
                out, found = through(query, key, value, module=module, **options)
            assert calls == {("cpu", ""): 1}
            right, _ = OWN(module, query, key, value, None, **options)
            assert torch.equal(out, right)
            exact, _ = OWN(module, *(t.double() for t in (query, key, value)), None, **options)
            plain, wanted = (torch.autograd.grad(o.square().sum(), query)[0] for o in (right, exact))
            assert_close(found, wanted, plain, "gradient")


def test_a_compiled_model_computes_the_same():
    torch._dynamo.reset()
    model, ids = tiny(), ids_of(1, 12)
    right = gradient_at_inputs(model, ids, 0)
    compiled = torch.compile(model, backend="eager")
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    with attention.kernel_attention():
        logits = compiled(inputs_embeds=embedded).logits
    weight = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits).sin()
    logits.backward(weight.to(logits.dtype))
    torch.testing.assert_close(logits, right[0])
    torch.testing.assert_close(embedded.grad, right[1], rtol=1e-3, atol=1e-4)


def test_info_shows_the_calls():
    _, learner = adapted()
    learner.observe(ids_of(1, 9))
    assert ttt.info()["calls"]["attention_backward on cpu"] > 0
