"""Modules that hold weights but are no linear layers are refused by name, and beside them linear layers learn."""

import copy

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers import plain_config
from tiny_models import VOCAB, ids_of, tiny
from torch import nn

import ttt
from ttt.adapt.convert import learning_layers, left_out


class Tagger(nn.Module):
    """Embedding, LSTM, attention and a linear layer."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCAB, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.look = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, ids):
        states = self.rnn(self.words(ids))[0]
        return self.out(self.look(states, states, states)[0])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("words", r"words is torch\.nn\.modules\.sparse\.Embedding; only torch\.nn\.Linear"),
        ("rnn", r"rnn is torch\.nn\.modules\.rnn\.LSTM; only torch\.nn\.Linear"),
        ("look", r"look is torch\.nn\.modules\.activation\.MultiheadAttention; only"),
        ("look.out_proj", r"look\.out_proj is .*NonDynamicallyQuantizableLinear; only"),
        ("weight_hh_l0", r"rnn\.weight_hh_l0 is a bare parameter of shape \(32, 8\), not a linear layer"),
        ("in_proj_weight", r"look\.in_proj_weight is a bare parameter of shape \(24, 8\), not a linear layer"),
    ],
)
@pytest.mark.parametrize("users", [None, ttt.LowRank(slots=2)])
def test_a_module_that_is_no_linear_layer_is_refused_by_name(target, message, users):
    model = Tagger()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    for targets in ([target], [target, "out"]):
        with pytest.raises(ValueError, match=message):
            ttt.adapt_(model, plain_config(target_modules=targets, per_user=users))
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_beside_them_linear_layers_learn():
    model = ttt.adapt_(Tagger(), plain_config(target_modules="all-linear", lr=0.05, window=4))
    assert [name for name, _ in learning_layers(model)] == ["out"]
    assert set(left_out(model)) == {"look.out_proj"}
    ids, tags = ids_of(3, 7), torch.randint(0, 5, (3, 7))
    frozen = {name: t.clone() for name, t in model.state_dict().items() if not name.startswith("out.")}

    def loss():
        return nn.functional.cross_entropy(model(ids).flatten(0, 1), tags.flatten(), reduction="sum")

    with torch.no_grad():
        first = float(loss())
    for _ in range(5):
        with ttt.learning(model):
            loss().backward()
    with torch.no_grad():
        assert float(loss()) < first
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in frozen.items())


def test_a_router_beside_a_gates_other_parts_is_left_out():
    class TopGate(nn.Module):
        def __init__(self):
            super().__init__()
            self.wg = nn.Linear(4, 2)

    class GatedMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 4)

    model = nn.ModuleDict({"top": TopGate(), "mlp": GatedMLP()})
    ttt.adapt_(model, plain_config(target_modules="all-linear"))
    assert [name for name, _ in learning_layers(model)] == ["mlp.gate"]
    assert left_out(model) == {"top.wg": "router of experts"}


def recurrent_gemma():
    config = transformers.RecurrentGemmaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, lru_width=32, attention_window_size=16, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    return transformers.RecurrentGemmaForCausalLM(config).eval()


def test_a_model_that_returns_no_cache_is_refused_and_learns_from_a_loss():
    model = ttt.adapt_(recurrent_gemma(), plain_config(target_modules=["down_proj"], lr=0.05, window=4))
    ids = ids_of(2, 12)
    with pytest.raises(ValueError, match=r"returned CausalLMOutput, which holds no cache; ttt\.learning learns"):
        ttt.Learner(model).observe(ids)
    assert all(layer.pending == 0 for _, layer in learning_layers(model))

    def loss():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    with torch.no_grad():
        first = float(loss())
    for _ in range(3):
        with ttt.learning(model):
            loss().backward()
    with torch.no_grad():
        assert float(loss()) < first


@pytest.mark.parametrize("users", [None, ttt.LowRank(slots=2, rank=4, window=64)])
def test_gemma3n_learns_alone_for_users_and_padded(users):
    config = transformers.Gemma3nTextConfig(
        vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        laurel_rank=4, num_kv_shared_layers=2, layer_types=["full_attention"] * 4, altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Gemma3nForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(2)
    options = plain_config(target_modules="all-linear", lr=0.02, chunk=8, per_user=users)
    learner, ids = ttt.Learner(ttt.adapt_(model, options), context=64), ids_of(2, 30)
    named = {} if users is None else {"users": ["a", "b"]}
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    padded = learner.observe(ids, attention_mask=mask, learn=False, **named)
    alone = learner.observe(ids[:1, 7:], learn=False, **{key: value[:1] for key, value in named.items()})
    torch.testing.assert_close(padded.nll[:1, 7:], alone.nll, rtol=1e-3, atol=1e-3)
    first = learner.observe(ids, attention_mask=mask, **named)
    assert first.rejected == 0
    assert learner.observe(ids, attention_mask=mask, learn=False, **named).bits < first.bits


@pytest.mark.parametrize("users", [None, ["ada", None]])
def test_the_stages_of_a_device_map_learn_as_one_model(users):
    """Each block has the hook with which accelerate moves its inputs to the block's device, here to where they are."""
    per_user = None if users is None else ttt.LowRank(slots=1, rank=4, window=4)
    config = plain_config(target_modules=["down_proj"], chunk=8, lr=1e-3, per_user=per_user)
    whole = tiny().double()
    staged = copy.deepcopy(whole)
    for block in staged.model.layers:
        for module in (block, block.mlp.down_proj):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    one, two = (ttt.Learner(ttt.adapt_(model, config)) for model in (whole, staged))
    ids, later = ids_of(2, 30), ids_of(2, 20)
    frozen = one.observe(later, users=users, learn=False).nll
    assert torch.allclose(one.observe(ids, users=users).nll, two.observe(ids, users=users).nll, rtol=0, atol=1e-12)
    found, wanted = (learner.observe(later, users=users, learn=False).nll for learner in (two, one))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    assert float((wanted - frozen).abs().max()) > 1e-6
