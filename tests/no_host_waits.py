"""`no_host_waits`: fails where the host reads a tensor, for which it would wait on a GPU."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist", "numpy", "cpu", "__array__")
_METHODS = {getattr(torch.Tensor, name) for name in READS}
_ATEN = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}


class _Methods(TorchFunctionMode):
    """Refuses methods that read a tensor; tensors on the CPU answer some of them without an operator."""

    inside_op = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _METHODS and not self.inside_op:
            raise AssertionError(f"the host reads a tensor: Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Refuses operators that wait for the device; an op of ttt is not looked into: its CUDA kernels are others."""

    def __init__(self, methods):
        super().__init__()
        self.methods = methods

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if name in _ATEN or by_mask:
            raise AssertionError(f"the host waits for a tensor: {func}")
        self.methods.inside_op = name.startswith("ttt::")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.methods.inside_op = False


@contextlib.contextmanager
def no_host_waits():
    """Raise AssertionError where the host reads a tensor, or calls an operator whose result it must wait for.

    On a GPU such calls synchronise (``torch.cuda.set_sync_debug_mode`` finds them there), and cannot be captured.
    """
    with _Methods() as methods, _Operators(methods):
        yield
