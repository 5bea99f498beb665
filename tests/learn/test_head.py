"""The output head: scores and gradients against float64, the bound on what is left out, and the ways to autograd."""

import re

import pytest
import torch
from helpers import assert_close, plain_config
from tiny_models import TARGETS, adapted, assert_same, ids_of, state_of, tiny
from transformers import LlamaConfig, LlamaForCausalLM

import ttt
from ttt.adapt.convert import learning_layers
from ttt.adapt.training import other_hooks
from ttt.learn.head import _places, input_gradient, mean_row, score
from ttt.ops import backends, cpu


@pytest.fixture(params=["kernels", "torch"])
def way(request, monkeypatch):
    """Scores and gradients by the C++ kernels, and as where these do not apply."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "takes", lambda *tensors: False)


def exact_gradient(logits, targets, weight, wanted=None):
    """d(summed loss)/dh in float64, written out."""
    p = logits.double().softmax(-1)
    p[torch.arange(len(p)), targets] -= 1
    if wanted is not None:
        p = p * wanted.unsqueeze(1)
    return p @ weight.double()


def peaked(count, vocabulary, slope=2.5):
    """Logits whose probabilities fall as a power of the rank, in an order that differs from token to token."""
    ranks = torch.rand(count, vocabulary).argsort(1).argsort(1) + 1
    return -slope * ranks.float().log() + 3 * torch.randn(count, 1)


def ways():
    return {(b, why): n for (op, b, why), n in backends.calls.items() if op == "head_gradient"}


def taken(before):
    return {key for key, n in ways().items() if n != before.get(key, 0)}


@pytest.mark.parametrize(("count", "vocabulary"), [(1, 1), (1, 61), (7, 33), (16, 127), (33, 1000), (70, 64)])
@pytest.mark.usefixtures("way")
def test_scores_and_exact_gradient(count, vocabulary):
    logits, weight = 20 * torch.randn(count, vocabulary) + 100, torch.randn(vocabulary, 9)
    targets = torch.randint(0, vocabulary, (count,))
    wanted = torch.rand(count) < 0.7
    exact_nll = -logits.double().log_softmax(-1)[torch.arange(count), targets]
    plain_nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    p = logits.softmax(-1)
    p[torch.arange(count), targets] -= 1
    for mask in (None, wanted):
        scores = score(logits.clone(), targets)
        # Rounding of logits of size 100 is the error that both make; a likely token's nll is small beside it.
        assert float((scores.nll.double() - exact_nll).abs().max()) <= max(
            2 * float((plain_nll.double() - exact_nll).abs().max()), 2**-16
        )
        plain = (p if mask is None else p * mask.unsqueeze(1)) @ weight
        ours = input_gradient(scores, weight, mask)
        assert_close(ours, exact_gradient(logits, targets, weight, mask), plain, "gradient")
        if mask is not None:
            assert float(ours[~mask].abs().sum()) == 0


@pytest.mark.usefixtures("way")
def test_scoring_leaves_16_bit_logits_alone_and_the_target_is_not_lost_in_rounding():
    logits = torch.zeros(3, 50, dtype=torch.bfloat16)
    logits[:, 4] = 16.0  # p = 1 - 5e-6: in bfloat16, 1
    kept = logits.clone()
    weight = torch.randn(50, 8).bfloat16()
    targets = torch.tensor([4, 4, 7])
    ours = input_gradient(score(logits, targets), weight)
    assert torch.equal(logits, kept)
    p = logits.float().softmax(-1)
    p[torch.arange(3), targets] -= 1
    plain = p.bfloat16() @ weight
    assert_close(ours, exact_gradient(logits, targets, weight), plain, "gradient")


@pytest.mark.parametrize(("count", "vocabulary"), [(1, 8), (3, 5), (5, 24), (2, 4100), (64, 4096)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_places_are_those_of_nonzero_in_the_same_order(count, vocabulary, share):
    keep = torch.rand(count, vocabulary) < share
    assert all(torch.equal(*pair) for pair in zip(_places(keep), keep.nonzero(as_tuple=True), strict=True))


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("mass", [0.001, 0.02, 0.2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("way")
def test_left_out_rows_obey_the_bound(count, mass, masked):
    vocabulary = 6000
    logits, weight = peaked(count, vocabulary), torch.randn(vocabulary, 5) * torch.rand(vocabulary, 1)
    targets = torch.randint(0, vocabulary, (count,))  # mostly words that are hardly probable
    wanted = torch.rand(count) < 0.6 if masked else None
    before = ways()
    ours = input_gradient(score(logits.clone(), targets), weight, wanted, mass).double()
    assert taken(before) == {("rows", "")}
    exact = exact_gradient(logits, targets, weight, wanted)
    off = (ours - exact).norm(dim=1)
    largest = float((weight - weight.mean(0)).norm(dim=1).max())
    assert float(off.max()) <= mass * largest + 1e-5 * float(exact.norm(dim=1).max())
    if wanted is None or bool(wanted.any()):
        assert float(off.max()) > 0.01 * mass * float(weight.norm(dim=1).mean()) / vocabulary**0.5  # some are left out
    if wanted is not None:
        assert float(ours[~wanted].abs().sum()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.usefixtures("way")
def test_left_out_rows_obey_the_bound_in_other_dtypes(dtype):
    logits, weight = peaked(9, 6000).to(dtype), torch.randn(6000, 7).to(dtype)
    targets = logits.argmax(1)
    before = ways()
    ours = input_gradient(score(logits.clone(), targets), weight, None, 1e-3)
    assert taken(before) == {("rows", "")}
    assert ours.dtype == dtype
    p = logits.double().softmax(-1)
    p[torch.arange(9), targets] -= 1
    plain = p.to(dtype) @ weight
    exact = p @ weight.double()
    largest = float(weight.double().norm(dim=1).max())
    rounding = 2 * float((plain.double() - exact).norm(dim=1).max()) + 1e-6
    assert float((ours.double() - exact).norm(dim=1).max()) <= 1e-3 * largest + rounding


@pytest.mark.usefixtures("way")
def test_the_targets_row_is_never_left_out():
    logits, weight = torch.full((1, 5000), -30.0), torch.zeros(5000, 2)
    logits[0, 10] = 0.0
    weight[17, 0] = 1.0
    ours = input_gradient(score(logits, torch.tensor([17])), weight, None, 0.4)
    torch.testing.assert_close(ours, torch.tensor([[-1.0, 0.0]]))


@pytest.mark.parametrize("vocabulary", [300, 5000])
@pytest.mark.usefixtures("way")
def test_flat_or_small_vocabularies_take_the_exact_product(vocabulary):
    logits, weight = 0.1 * torch.randn(20, vocabulary), torch.randn(vocabulary, 6)
    targets = torch.randint(0, vocabulary, (20,))
    before = ways()
    approximate = input_gradient(score(logits.clone(), targets), weight, None, 0.01)
    assert {backend for backend, _ in taken(before)} == {"dense"}
    assert torch.equal(approximate, input_gradient(score(logits.clone(), targets), weight))


@pytest.mark.usefixtures("way")
def test_a_sample_that_misleads_is_noticed():
    """All of the probability that matters sits on words that the search for a threshold does not look at."""
    vocabulary = 3 * 2048
    logits, weight = torch.full((2, vocabulary), -25.0), torch.randn(vocabulary, 4)
    logits[:, 1 : 3 * 300 : 3] = -torch.rand(300)  # every third word is looked at, these are the next ones
    targets = torch.tensor([0, 5])
    ours = input_gradient(score(logits.clone(), targets), weight, None, 0.01).double()
    off = (ours - exact_gradient(logits, targets, weight)).norm(dim=1)
    assert float(off.max()) <= 0.01 * float(weight.norm(dim=1).max())


def test_words_that_are_chosen_apart_do_not_depend_on_other_tokens(monkeypatch):
    """Neither where so many words matter that the exact product would take less time."""
    logits, weight = torch.cat([peaked(3, 5000), 0.1 * torch.randn(20, 5000)]), torch.randn(5000, 6)
    targets = torch.randint(0, 5000, (23,))
    before = ways()
    together = input_gradient(score(logits, targets), weight, None, 0.01, apart=True)
    alone = [input_gradient(score(logits[t : t + 1], targets[t : t + 1]), weight, None, 0.01) for t in range(23)]
    assert taken(before) == {("rows", "")}
    assert torch.equal(together, torch.cat(alone))
    monkeypatch.setattr(cpu, "takes", lambda *tensors: False)
    before = ways()
    without = input_gradient(score(logits.clone(), targets), weight, None, 0.01, apart=True)
    assert taken(before) == {("dense", "no kernel")}
    assert torch.equal(without, input_gradient(score(logits.clone(), targets), weight))


def wide_model(vocabulary=5000):
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=None,
                         pad_token_id=0)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 1.5)  # a peaked distribution
    return model


def changes(model, ids, **options):
    options = {"target_modules": ["down_proj"], "lr": 1e-3, "chunk": 16, "window": 1, "ewc_lambda": 0.0,
               "replay_rows": 0, **options}  # fmt: skip
    ttt.adapt_(model, plain_config(**options))
    output = ttt.Learner(model).observe(ids)
    assert output.rejected == 0
    return [(layer.weight - layer.anchor).double() for _, layer in learning_layers(model)], output.nll


@pytest.mark.usefixtures("way")
def test_learning_with_rows_left_out_is_near_the_exact_way():
    torch.manual_seed(3)
    first = wide_model()
    second = wide_model()
    second.load_state_dict(first.state_dict())
    ids = torch.randint(0, 5000, (1, 17))
    before = ways()
    exact, exact_nll = changes(first, ids, head_mass=0.0)
    assert taken(before) == {("dense", "")}
    before = ways()
    close, close_nll = changes(second, ids, head_mass=0.01)
    assert taken(before) == {("rows", "")}
    assert torch.equal(exact_nll, close_nll)
    for a, b in zip(exact, close, strict=True):
        assert 0 < float((a - b).norm()) < 0.02 * float(a.norm())


class Scaled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30) * 0.7
        return out


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.7)
    return model


def pre_hooked(model):
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.7,))
    return model


def custom_head(model):
    class Head(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0.7

    head = Head(32, 61, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def scaled(model):
    model.__class__ = Scaled
    return model


@pytest.mark.parametrize(
    ("change", "why"),
    [(scaled, "changes the logits"), (hooked, "has hooks"), (pre_hooked, "has hooks"),
     (custom_head, "is Head, not torch.nn.Linear")],
)  # fmt: skip
def test_heads_that_cannot_be_split_learn_by_autograd_and_info_reports_it(change, why):
    base = tiny()
    plain = change(tiny())
    plain.load_state_dict(base.state_dict())
    ids = ids_of(2, 15)
    loss = torch.nn.functional.cross_entropy(
        plain(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    model = ttt.adapt_(change(base), plain_config(target_modules=["down_proj"], lr=0.01, chunk=64, window=1,
                                                   ewc_lambda=0.0, replay_rows=0))  # fmt: skip
    before = ways()
    output = ttt.Learner(model).observe(ids)
    assert float(output.nll.sum()) == pytest.approx(loss.item(), rel=1e-4)
    ((backend, reason),) = taken(before)
    assert backend == "autograd"
    assert re.search(why, reason)
    assert any(reason in line for line in ttt.info(file=None)["slow_calls"])
    for name, layer in learning_layers(model):
        expected = (-0.01 * plain.get_submodule(name).weight.grad).detach()
        torch.testing.assert_close(layer.weight - layer.anchor, expected, rtol=1e-3, atol=2e-5)


def test_parameters_that_require_grad_cost_nothing_and_keep_their_flags():
    model, learner = adapted(layers=[2])
    other, twin = adapted(layers=[2])
    other.load_state_dict(model.state_dict())
    twin.reset()
    for layer, (_, source) in zip(twin.layers, learning_layers(model), strict=True):
        layer.load_state(source.state())
    asked = [model.model.embed_tokens.weight, model.lm_head.weight, model.model.norm.weight]
    for p in asked:
        p.requires_grad_(True)
    needs = {}
    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda m, a, out, i=i: needs.update({i: out.requires_grad}))
    ids = ids_of(1, 20)
    output = learner.observe(ids)
    assert needs == {0: False, 1: False, 2: True, 3: True}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if any(p is q for q in asked)
    ]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(output.nll, twin.observe(ids).nll)
    assert_same(state_of(other), state_of(model))


def test_nothing_is_left_on_the_model():
    model, learner = adapted("gpt2")
    assert TARGETS["gpt2"] == ["mlp.c_proj"]
    learner.observe(ids_of(1, 20))
    learner.generate(ids_of(1, 5), max_new_tokens=5, learn_output=True, learn_every=2)
    for module in model.modules():
        assert not other_hooks(module)
        assert "forward" not in vars(module)


@pytest.mark.usefixtures("way")
def test_what_rows_have_in_common_is_not_left_out():
    """Rows with a large mean: without it in place of what is left out, errors of all tokens would add up."""
    vocabulary, count, mass = 6000, 40, 0.02
    logits, weight = peaked(count, vocabulary), torch.randn(vocabulary, 16) + 3
    targets = torch.randint(0, vocabulary, (count,))
    exact = exact_gradient(logits, targets, weight).sum(0)
    ours = input_gradient(score(logits.clone(), targets), weight, None, mass).double().sum(0)
    common = count * mass * float(weight.mean(0).norm())  # of what is left out
    assert float((ours - exact).norm()) < 0.2 * common


def test_the_mean_row_follows_the_weight():
    weight = torch.nn.Parameter(torch.randn(50, 7, dtype=torch.float64))
    assert torch.allclose(mean_row(weight), weight.detach().mean(0))
    assert mean_row(weight) is mean_row(weight)
    with torch.no_grad():
        weight[3] += 5
    assert torch.allclose(mean_row(weight), weight.detach().mean(0))
    with torch.inference_mode():
        made = torch.randn(4, 3)
        assert torch.equal(mean_row(made), made.mean(0))


@pytest.mark.skipif(cpu._C is None, reason="needs the C++ kernels")
def test_kernels_take_the_heads_parameter():
    """A head's weight is a Parameter, which tests with plain tensors would not notice."""
    head = torch.nn.Linear(8, 5000, bias=False)
    logits, targets = 4 * torch.randn(3, 5000), torch.tensor([1, 2, 3])
    scores = score(logits, targets)
    assert scores.logits is not None
    exact = exact_gradient(logits, targets, head.weight.detach())
    found = input_gradient(scores, head.weight, None, 0.01, apart=True)  # without kernels all words would be taken
    assert not torch.allclose(found.double(), exact, rtol=1e-6, atol=1e-7)
    assert torch.equal(found, input_gradient(score(logits, targets), head.weight.detach(), None, 0.01, apart=True))
    before = mean_row(head.weight)
    head.to(torch.bfloat16)
    assert mean_row(head.weight).dtype == torch.bfloat16
    assert before.dtype == torch.float32
