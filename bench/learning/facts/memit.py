"""A closed-form edit of several layers in the manner of MEMIT (Meng et al., ICLR 2023), for sentences of any form.

MEMIT edits (subject, relation, object) triples. Nobody marks these in a chat, so here every token t that a person says
is an edit. Its target z_t is the residual stream behind the last edited layer plus an offset that makes the next token
probable; the layers l = 1 ... L, each with the keys K (inputs of `down_proj` at these tokens) as they are then, share
what is missing of the targets:

    dW_l = R_l K_l^T (weight C_l + K_l K_l^T)^-1        R_l = (z - h) / (L - l + 1),  C_l: second moment of the inputs
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttt.demo.questions import padded

STEPS, RATE, DECAY = 25, 0.5, 0.5  # of Adam for the offsets, in units of the residual stream's norm; as MEMIT's code


def blocks_of(model: Any) -> Any:
    """The decoder's blocks, a list of modules."""
    return model.base_model.layers


@torch.no_grad()
def second_moments(model: Any, layers: Sequence[int], texts: Tensor) -> list[Tensor]:
    """Mean x x^T of the inputs x of each layer's `down_proj` on ``texts`` (N, T): (n, n) float64 each."""
    found = []
    with _inputs(model, layers) as seen:
        for row in texts.split(4):
            model(input_ids=row)
    for at in layers:
        rows = torch.cat(seen[at]).flatten(0, 1).double()
        found.append(rows.T @ rows / len(rows))
    return found


def edit(
    model: Any,
    turns: Sequence[tuple[list[int], list[bool]]],
    layers: Sequence[int],
    moments: Sequence[Tensor],
    weight: float,
) -> None:
    """Write ``turns``, each tokens and which of them count, into `down_proj` of the blocks ``layers`` of ``model``.

    Args:
        moments: from `second_moments`.
        weight: of what the layers do on other inputs.
    """
    device = next(model.parameters()).device
    ids = padded([tokens for tokens, _ in turns], device)
    counts = padded([said for _, said in turns], device)[:, 1:] != 0  # of the token before each one that counts
    ids, wanted = ids[:, :-1], ids[:, 1:]
    targets = _targets(model, ids, wanted, counts, layers[-1])
    with torch.no_grad():
        for done, (at, moment) in enumerate(zip(layers, moments, strict=True)):
            with _inputs(model, layers) as seen, _outputs(model, layers[-1]) as out:
                model(input_ids=ids)
            missing = (targets - out[0][counts].double()) / (len(layers) - done)
            keys = seen[at][0][counts].double()
            change = torch.linalg.solve(weight * moment + keys.T @ keys, keys.T @ missing).T
            matrix = blocks_of(model)[at].mlp.down_proj.weight
            matrix += change.to(matrix.dtype)


def _targets(model: Any, ids: Tensor, wanted: Tensor, counts: Tensor, last: int) -> Tensor:
    """What should stand behind block ``last`` at the tokens that count: (K, d) float64."""
    with torch.no_grad(), _outputs(model, last) as out:
        model(input_ids=ids)
    plain = out[0][counts]
    scale = plain.norm(dim=1, keepdim=True)
    offset = torch.zeros_like(plain, requires_grad=True)
    adam = torch.optim.Adam([offset], lr=RATE / plain.shape[1] ** 0.5)

    def moved(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.masked_scatter(counts.unsqueeze(-1), hidden[counts] + scale * offset)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = blocks_of(model)[last].register_forward_hook(moved)
    try:
        for _ in range(STEPS):
            logits = model(input_ids=ids).logits[counts].float()
            loss = functional.cross_entropy(logits, wanted[counts]) + DECAY * offset.square().sum(1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    finally:
        handle.remove()
    return (plain + scale * offset.detach()).double()


@contextlib.contextmanager
def _inputs(model: Any, layers: Sequence[int]) -> Iterator[dict[int, list[Tensor]]]:
    """Inside, the inputs (B, T, n) of each layer's `down_proj` are kept."""
    seen: dict[int, list[Tensor]] = {at: [] for at in layers}
    with contextlib.ExitStack() as stack:
        for at in layers:
            module = blocks_of(model)[at].mlp.down_proj
            handle = module.register_forward_pre_hook(lambda module, args, at=at: seen[at].append(args[0].detach()))
            stack.callback(handle.remove)
        yield seen


@contextlib.contextmanager
def _outputs(model: Any, at: int) -> Iterator[list[Tensor]]:
    """Inside, the residual stream (B, T, d) behind block ``at`` is kept."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach())

    handle = blocks_of(model)[at].register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
