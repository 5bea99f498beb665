"""`LearningExperts`: the experts of a mixture, each of whose matrices learns from the tokens that are routed to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ttt.config import TTTConfig
from ttt.nn.base import absent
from ttt.nn.linear import Linear
from ttt.nn.many_forward import outputs_of

STACKS = ("gate_up_proj", "down_proj")
"""The 3-D parameters of transformers' experts: (E, 2 i, h) and (E, h, i) for E experts."""


def is_stack(module: nn.Module) -> bool:
    """Whether ``module`` is a stack of gated experts as most mixtures of transformers have them."""
    held = dict(module.named_parameters())
    if tuple(held) != STACKS or any(p.ndim != 3 for p in held.values()) or not hasattr(module, "act_fn"):
        return False
    (count, outer, inner), down = held["gate_up_proj"].shape, held["down_proj"].shape
    return down == (count, inner, outer // 2) and outer % 2 == 0


@torch.no_grad()
def why_not_gated(module: Any) -> str:
    """Why ``module``, a stack of experts, does not compute what `LearningExperts` would; empty if it does.

    It is tried with a few tokens. Some mixtures have the same parameters, but clip, scale or norm what is between them.
    """
    up, down = (getattr(module, stack).detach() for stack in STACKS)
    if absent(up) or absent(down):
        return "is not in memory"
    count, _, width = up.shape
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(5)]).to(up.device)
    weights = torch.rand(chosen.shape, generator=generator).to(up)
    for size in (1.0, 100.0):
        x = (size * torch.randn((len(chosen), width), generator=generator)).to(up)
        try:
            found = module(x, chosen, weights)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            return f"cannot be tried ({error})"
        wanted = torch.zeros_like(x)
        for t, experts in enumerate(chosen.tolist()):
            for e, weight in zip(experts, weights[t], strict=True):
                gate, other = nn.functional.linear(x[t], up[e]).chunk(2)
                wanted[t] += weight * nn.functional.linear(module.act_fn(gate) * other, down[e])
        tolerance = 1e-3 if up.itemsize > 2 else 5e-2
        if not float((found - wanted).float().norm()) <= tolerance * float(wanted.float().norm()):
            return "computes something else than down(act(gate(x)) * up(x))"
    return ""


class LearningExperts(nn.Module):
    """In place of a stack of experts: y_t = sum over its experts e of w_te D_e (act(G_e x_t) * U_e x_t).

    Every matrix is a `ttt.nn.Linear`, which gets the rows of the tokens routed to its expert, and learns from
    these. The weights share the memory of the stack, until they are moved or converted. `state_dict` has the stacks as
    the original module has them.

    Args:
        module: a stack of gated experts (`is_stack`, `why_not_gated`).
        config: how the matrices learn.
        name: of the module, for the random draws of its layers.
    """

    def __init__(self, module: Any, config: TTTConfig, name: str) -> None:
        super().__init__()
        self.act_fn = module.act_fn
        for stack in STACKS:
            weights = getattr(module, stack).detach()
            layers = [
                Linear.from_weight(nn.Parameter(weight, requires_grad=False), None, config, f"{name}.{stack}.{e}")
                for e, weight in enumerate(weights)
            ]
            for layer in layers:
                layer.routed = True
            setattr(self, stack, nn.ModuleList(layers))
        self.register_state_dict_post_hook(_stacked)
        self.register_load_state_dict_pre_hook(_unstacked)

    @property
    def layers(self) -> list[Linear]:
        """All its learning layers."""
        return [layer for stack in STACKS for layer in getattr(self, stack)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, h) -> (T, h).

        Args:
            top_k_index: (T, k) int64: the experts of each token; E and above for none.
            top_k_weights: (T, k), their weights.
        """
        found, chosen = torch.zeros_like(hidden_states), top_k_index.flatten()
        ups, downs = (list(getattr(self, stack)) for stack in STACKS)
        counts = torch.bincount(chosen, minlength=len(ups))[: len(ups)].tolist()
        experts = [e for e, count in enumerate(counts) if count]
        if not experts:
            return found
        counts = [counts[e] for e in experts]
        # The rows of the first expert, in the order of the tokens, then those of the next; what goes to none is last.
        order = chosen.argsort(stable=True)[: sum(counts)]
        tokens = order // top_k_index.shape[1]
        gate, up = outputs_of([ups[e] for e in experts], hidden_states[tokens], counts, tokens).chunk(2, dim=-1)
        y = outputs_of([downs[e] for e in experts], self.act_fn(gate) * up, counts, tokens)
        return found.index_add(0, tokens, (y * top_k_weights.flatten()[order].unsqueeze(1)).to(found.dtype))


def _stacked(module: LearningExperts, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Put the stacks into ``state`` in place of the matrices of each expert."""
    for stack in STACKS:
        names = [f"{prefix}{stack}.{e}.weight" for e in range(len(getattr(module, stack)))]
        state[f"{prefix}{stack}"] = torch.stack([state.pop(name) for name in names])


def _unstacked(module: LearningExperts, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Put the matrices of each expert into ``state``, which is to be loaded, in place of the stacks."""
    for stack in STACKS:
        if (weights := state.pop(f"{prefix}{stack}", None)) is not None:
            state.update({f"{prefix}{stack}.{e}.weight": weight for e, weight in enumerate(weights)})
