"""Draws of tokens on a GPU; collected where there is one."""

import torch

from ttt.learn.draw import draw_tokens


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_on_a_gpu_it_draws_what_a_generator_of_the_cpu_draws():
    p = torch.rand(300, 5000, dtype=torch.float64) * (torch.rand(5000) < 0.5)
    found = draw_tokens(p.cuda(), seeded(7)).cpu()
    assert bool((p.gather(1, found.unsqueeze(1)) > 0).all())
    assert (found == draw_tokens(p, seeded(7))).float().mean() > 0.99
    generator = torch.Generator(device="cuda").manual_seed(1)
    first = draw_tokens(p.cuda(), generator)
    assert torch.equal(draw_tokens(p.cuda(), generator.manual_seed(1)), first)
