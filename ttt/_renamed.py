"""Old names of public things, kept for one release: each still works, and warns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any


def old_names(module: str, names: Mapping[str, str], namespace: Mapping[str, Any]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for old names of things that it still holds under new ones.

    Args:
        module: the module's name, for the warning.
        names: old name -> new name.
        namespace: the module's ``globals()``.
    """

    def getattr_(name: str) -> Any:
        if name in names:
            new = names[name]
            warnings.warn(f"{module}.{name} is now {module}.{new}", DeprecationWarning, stacklevel=2)
            return namespace[new]
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattr_
