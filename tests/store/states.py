"""States for tests, compared by name, dtype, shape and bit; and a search for bytes in files."""

import torch


def bits(t):
    """Dtype, shape and bytes of a tensor."""
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


def files_with(folder, secrets):
    """Names of the files under ``folder`` whose content or path contains one of ``secrets`` (bytes)."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if any(secret in content or secret in str(path).encode() for secret in secrets):
            found.append(path.name)
    return found
