"""Triton's interpreter without work that it repeats; what it computes is the same.

Before every call of a device function the interpreter replaces the operations of Triton's language by its own, which it
has just done for the kernel. Every program of a launch draws the same few random words again, with about a hundred
operations of the language. And each operation makes the type of its result anew, which takes longer than the operation.
"""

import numpy
from triton import language as tl
from triton.runtime import interpreter

MOST_BYTES = 4096
"""Words are kept where the arguments from which they were drawn take up to this many bytes."""

replaced: set[int] = set()
"""The globals of functions, by id, for which the launch under way has replaced the language."""
drawn: dict[tuple, tuple] = {}
"""Random words that Triton's own function drew, by its arguments."""

types: dict[tuple, dict] = {}
"""The attributes of block types, by the identity of the type of the elements, which they keep alive, and the shape."""
numpy_types: dict[str, numpy.dtype] = {}
"""numpy's types, by the name of Triton's."""

triton_launch = interpreter.GridExecutor.__call__
triton_call = interpreter.InterpretedFunction.__call__
triton_replace = interpreter._patch_lang
triton_block_type = tl.block_type.__init__
triton_tensor = tl.tensor.__init__
triton_equal = tl.dtype.__eq__
triton_numpy_type = interpreter._get_np_dtype


def work_once():
    """Make the interpreter replace the language once for a launch, and draw the same few words and make types once."""
    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = call
    interpreter._patch_lang = replace
    interpreter._get_np_dtype = numpy_type
    tl.block_type.__init__ = make_block_type
    tl.tensor.__init__ = make_tensor
    tl.dtype.__eq__ = equal


def launch(self, *args, **kwargs):
    replaced.clear()
    try:
        return triton_launch(self, *args, **kwargs)
    finally:
        replaced.clear()  # a launch takes back what it has replaced


def replace(function):
    """Replace the language as ``function`` names it, unless this launch has done so.

    Returns what takes it back. Only the kernel of a launch, which comes first, needs that.
    """
    names = id(function.__globals__)
    if names in replaced:
        return None
    replaced.add(names)
    return triton_replace(function)


def call(self, *args, **kwargs):
    """Call a device function; if it is the generator of random words, once for the same arguments."""
    if self is not tl.philox:
        return triton_call(self, *args, **kwargs)
    key = *map(value_of, args), *((name, value_of(arg)) for name, arg in sorted(kwargs.items()))
    if sum(len(part[-1]) for part in key if isinstance(part[-1], bytes)) > MOST_BYTES:
        return triton_call(self, *args, **kwargs)
    if key not in drawn:
        drawn[key] = tuple(triton_call(self, *args, **kwargs))
    return tl.tuple([copied(word) for word in drawn[key]])


def make_block_type(self, element_ty, shape):
    """``tl.block_type.__init__``: what follows from the arguments is computed once."""
    sizes = shape.values if isinstance(shape, tl.tuple) else shape
    key = id(element_ty), *(size.value if isinstance(size, tl.constexpr) else size for size in sizes)
    if key not in types:
        triton_block_type(self, element_ty, shape)
        of_tensors = tl.tuple([tl.constexpr(size) for size in self.shape]), tl.constexpr(self.numel)
        types[key] = {**vars(self), "of_tensors": of_tensors}
    vars(self).update(types[key])


def make_tensor(self, handle, type):
    """``tl.tensor.__init__``, with the shape that the type keeps for its tensors."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensors if type.is_block() else (NO_SIZES, ONE)


NO_SIZES, ONE = tl.tuple([]), tl.constexpr(1)


def equal(self, other):
    """``tl.dtype.__eq__``."""
    return self is other or triton_equal(self, other)


def numpy_type(type):
    """``interpreter._get_np_dtype``, which makes a table of all types for each call."""
    scalar = type.element_ty if isinstance(type, tl.block_type) else type
    if scalar.name not in numpy_types:
        numpy_types[scalar.name] = triton_numpy_type(type)
    return numpy_types[scalar.name]


def value_of(arg):
    """What tells values of an argument apart: the type, shape and bytes of a tensor, the type and value of a number."""
    arg = arg.value if isinstance(arg, tl.constexpr) else arg
    if not isinstance(arg, tl.tensor):
        return type(arg), arg
    data = arg.handle.data
    return str(arg.type), data.shape, data.dtype.str, data.tobytes()


def copied(tensor):
    return tl.tensor(interpreter.TensorHandle(tensor.handle.data.copy(), tensor.handle.dtype), tensor.type)
