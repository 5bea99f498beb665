"""`ttt.ops.sequence.memory` as the memory of Titans, against titans-pytorch, which is in the extra ``test``."""

import itertools

import pytest
import torch

from ttt.ops import sequence as ops

WIDTH, INNER, TOKENS = 6, 10, 23


class Layers(torch.nn.Module):
    """Linear layers with GELU between them: the memory, in the form in which titans-pytorch takes it."""

    def __init__(self, depth):
        super().__init__()
        self.depth = depth
        for n, (i, o) in enumerate(itertools.pairwise([WIDTH, *[INNER] * (depth - 1), WIDTH])):
            self.register_parameter(f"w{n}", torch.nn.Parameter(torch.randn(i, o) * 0.3))
            self.register_parameter(f"b{n}", torch.nn.Parameter(torch.randn(1, o) * 0.3))

    def forward(self, x):
        for n in range(self.depth):
            x = torch.nn.functional.gelu(x, approximate="tanh") if n else x
            x = x @ getattr(self, f"w{n}") + getattr(self, f"b{n}")
        return x


@pytest.mark.parametrize("form", ["chunk", "reference"])
@pytest.mark.parametrize("mini_batch", [1, 4, 7])
@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_the_memory_of_titans_is_that_of_titans_pytorch(depth, mini_batch, form):
    """There a rate, a gate and a momentum are shared by a chunk, and weights for gradients by a batch: chunks of one
    token, in batches of b, are mini-batches of b here. Its loss is the mean over features, ours half of the sum."""
    titans = pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed (it is in the extra 'test')")
    other = titans.NeuralMemory(
        WIDTH, chunk_size=1, batch_size=mini_batch, model=Layers(depth), pre_rmsnorm=False,
        mem_model_norm_add_residual=False, default_step_transform_max_lr=0.5, init_decay_bias=-4.0,
    ).double()  # fmt: skip
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    expected, state = other(x)
    q, k, v = (project(x).unsqueeze(2) for project in (other.to_queries, other.to_keys, other.to_values))
    rate = other.adaptive_step_transform(other.to_adaptive_step(x)).unsqueeze(-1) * 2 / WIDTH
    gate, momentum = 1 - other.to_decay_factor(x).sigmoid(), other.to_momentum(x)[0].sigmoid()
    names = other.memory_model_parameter_names
    first = dict(zip(names, other.memory_model_parameters, strict=True))
    out, final = ops.memory(
        q, k, v, rate, [first[name] if name[0] == "w" else first[name][:, 0] for name in names], gate=gate,
        momentum=momentum, mini_batch=mini_batch, output_final_state=True, form=form,
    )  # fmt: skip

    def close(found, wanted):
        torch.testing.assert_close(found, wanted.reshape(found.shape), rtol=1e-8, atol=1e-10)

    close(out[:, :, 0], expected)
    weights, velocity = state.states
    for name, w, m in zip(names, final.weights, final.velocity, strict=True):
        close(w[:, 0], weights[name])
        close(m[:, 0], velocity[name][0])
