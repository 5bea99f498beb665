"""States that tests put, and how they are compared: by name, dtype, shape and bit."""

import torch


def bits(t):
    """What must be equal for two tensors to be the same."""
    return t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).tolist() if t.numel() else []


def assert_same_state(actual, expected):
    assert set(actual) == set(expected)
    for name in expected:
        assert bits(actual[name]) == bits(expected[name].cpu()), name


def small_state(seed):
    """A small state that is a function of ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.a": torch.randn(3, 7, generator=generator),
        "layers.0.b": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "step": torch.tensor([seed]),
    }


def put(store, user, seed, meta=None):
    """A new version of ``user`` that is ``small_state(seed)``; its number."""
    with store.lease(user) as lease:
        return store.put(lease, small_state(seed), {"seed": seed} if meta is None else meta)


def blob_paths(store, user):
    """Paths of a user's blobs in a local store, newest version first."""
    return [store.blobs.root / version.key for version in store.history(user)]
