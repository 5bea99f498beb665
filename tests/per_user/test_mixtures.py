"""Mixtures of experts with users: shared experts see all tokens, and layers that get chosen ones are refused."""

import pytest
import torch
import transformers
from helpers import plain_config
from tiny_models import VOCAB, ids_of
from torch import nn

import ttt


def mixture():
    config = transformers.Qwen2MoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        shared_expert_intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(3)
    return model


def adapted(model, targets="all-linear"):
    config = plain_config(target_modules=targets, lr=0.05, chunk=8, per_user=ttt.LowRank(slots=3, rank=8, window=64))
    with pytest.warns(UserWarning, match="a stack of experts"):
        return ttt.adapt_(model, config)


def test_users_learn_in_shared_experts_side_by_side_as_alone():
    model = mixture()
    twin = mixture()
    twin.load_state_dict(model.state_dict())
    together, alone = ttt.Learner(adapted(model)), ttt.Learner(adapted(twin))
    names = [name for name in ttt.pool_of(model).layers if "shared_expert" in name]
    assert len(names) == 6
    ids = ids_of(3, 30)
    for _ in range(2):
        seen = together.observe(ids, users=["a", None, "b"])
        own = alone.observe(ids[2:], users=["b"])
    torch.testing.assert_close(seen.nll[2:], own.nll, rtol=1e-3, atol=1e-3)
    left, right = ttt.pool_of(model).export("b"), ttt.pool_of(twin).export("b")
    for name in names:
        assert left[f"{name}.a"].any()
        torch.testing.assert_close(left[f"{name}.a"], right[f"{name}.a"], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        with ttt.users(model, ["b", "a", None]):
            mixed = model(ids).logits
        base = model(ids).logits
        with ttt.users(model, ["a"]):
            single = model(ids[1:2]).logits
    torch.testing.assert_close(mixed[1:2], single, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed[2], base[2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed[0], base[0], rtol=1e-3, atol=1e-3)


class Routed(nn.Module):
    """Two experts, which are linear layers that are handed the tokens chosen for them."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        flat, y = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        for i, expert in enumerate(self.experts):
            chosen = flat[:, 0] > 0 if i else flat[:, 0] <= 0
            y[chosen] = expert(flat[chosen])
        return y.view_as(x)


def test_layers_that_get_chosen_tokens_are_refused_by_name():
    model = nn.Sequential(Routed())
    ttt.adapt_(model, plain_config(target_modules="all-linear", per_user=ttt.LowRank(slots=2)))
    x = torch.randn(2, 5, 8)
    x[:, :, 0] = torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0])
    x[0, 1, 0] = -1.0  # 3 tokens for one expert, 7 for the other
    with (
        ttt.users(model, ["a", "b"]),
        pytest.raises(
            ValueError,
            match=r"0\.experts\.0 must get inputs of shape \(2, \.\.\., n\).*chooses some of them.*leave it out",
        ),
    ):
        model(x)
    model(x)  # the base model's
