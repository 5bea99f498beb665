"""A launch differs from an earlier one of the same shapes in values only, not in the variant of the kernel it needs.

A variant that is first met while a CUDA graph is captured would be loaded there, which breaks the capture. Variants are
compared in a process of its own, because here the kernels may be interpreted.
"""

import json
import os
import subprocess
import sys

import pytest

SHAPES = {
    "m", "n", "width", "keys", "values", "width_a", "width_b", "first", "g_stride", "s_stride", "inputs", "outputs",
}  # fmt: skip
"""Integers that may choose a variant: they follow from the shape of a layer, which a graph's launches share."""
SEEDS = (0, 1, 7, 16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 5)


def found():
    """Print variants by seed and by gate, the numbers that choose a variant, and unaligned pointers."""
    import torch

    from ttt.ops.triton import aot, aot_calls, reservoir
    from ttt.ops.triton import commit as fused

    def commit(gate, tokens=16):
        weight, step = aot_calls._meta(64, 128, dtype=torch.bfloat16), aot_calls._meta(1, dtype=torch.int64)
        x, delta = (aot_calls._meta(tokens, k, dtype=torch.bfloat16) for k in (128, 64))
        eta, memory = aot_calls._meta(tokens, dtype=torch.float32), aot_calls._meta(32, 128, dtype=torch.bfloat16)
        fused.commit(weight, weight, weight, weight, x, delta, eta, None, memory, step, step, 0, 4, 0.3, 1e-3, 1.0, 1.0,
                     "fisher", 1, gate)  # fmt: skip

    def launches(seed):
        with torch.no_grad():
            for k in (
                lambda: aot_calls._commit(torch.bfloat16, torch.bfloat16, "fisher", 16, 1.0, every=4, seed=seed),
                lambda: aot_calls._commit(torch.bfloat16, torch.bfloat16, "fisher", 16, 1.0, 2048, 4, seed=seed),
                lambda: aot_calls._compress(torch.bfloat16, 32, 16, 64, 1.0, 4, seed=seed),
                lambda: aot_calls._insert(torch.bfloat16, seed=seed),
                lambda: reservoir.reservoir_draw(*[aot_calls._meta(1, dtype=torch.int64)] * 2, 9, 16, seed),
            ):
                yield from aot.launches(k)

    seen = [(k.kernel.__name__, seed, repr(aot.variant(k))) for seed in SEEDS for k in launches(seed)]
    counters = aot_calls._meta(3, dtype=torch.int64)
    gates = [
        [repr(aot.variant(launch)) for launch in aot.launches(lambda g=gate: commit(g))]
        for gate in (counters[:1], counters[1:2])  # the second is `WindowCounter.full`
    ]
    numbers, unaligned = {}, []
    for _, call in aot_calls.calls(everything=False):
        for kernel, args, options, _ in aot.launches(call):
            values = dict(zip(kernel.arg_names, args, strict=False)) | options
            for p in kernel.params:
                kind = type(values[p.name]).__name__
                if not p.is_constexpr and kind in ("int", "float") and not p.do_not_specialize:
                    numbers.setdefault(kind, set()).add(p.name)
    for _, call in aot_calls.calls(everything=True):
        for kernel, args, options, _ in aot.launches(call):
            for name, t in (dict(zip(kernel.arg_names, args, strict=False)) | options).items():
                if torch.is_tensor(t) and t.storage_offset() * t.element_size() % 16:
                    unaligned.append((kernel.__name__, name))
    print(json.dumps([seen, gates, {kind: sorted(names) for kind, names in numbers.items()}, unaligned]))


@pytest.fixture(scope="module")
def compiled():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    command = [sys.executable, "-c", "import test_launch_variants as this; this.found()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_seed_needs_another_variant(compiled):
    variants, drawing = {}, set()
    for kernel, seed, variant in compiled[0]:
        variants.setdefault((kernel, seed), set()).add(variant)
        if "'i64', None" in variant:
            drawing.add(kernel)
    assert {"_commit", "_products", "_drift", "_factors", "_cross", "_renew", "_insert", "_draw"} <= drawing
    for (kernel, seed), used in variants.items():
        assert used == variants[kernel, 0], f"{kernel}: seed {seed} needs another variant than seed 0"


def test_only_the_shape_of_a_layer_chooses_a_variant(compiled):
    """An integer that is 1 or a multiple of 16 has a variant of its own, unless its kernel says otherwise."""
    assert set(compiled[2]["int"]) <= SHAPES


def test_a_gate_at_any_address_needs_the_same_variant(compiled):
    assert compiled[1][0] == compiled[1][1]


def test_launchers_hand_over_aligned_pointers(compiled):
    """By 16 bytes, as wide loads and other libraries' kernels require; allocations themselves are."""
    assert compiled[3] == []
