"""Says why the C++ kernels cannot be imported, from what `setup.py` reported when it built them."""

from __future__ import annotations

import json
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def why_not_built(error: ImportError, package: Path = PACKAGE) -> str:
    """One line for `ttt.info()`: why ``ttt._C`` cannot be imported, and what to do.

    Args:
        error: what ``from ttt import _C`` raised. If the file is missing, Python takes ``_C`` for a name that
            ``ttt/__init__.py`` has yet to define, and speaks of a circular import; the build report knows better.
        package: the folder of the package ``ttt``.
    """
    if any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return f"the C++ extension ttt._C cannot be imported ({error}); reinstall with a C++ compiler"
    if reason := _reported_reason(package / "_build.json"):
        return f"the C++ kernels were not built when ttt was installed: {reason}"
    if others := sorted(path.name for path in package.glob("_C.*.so")):
        return f"the C++ kernels were built for another Python ({', '.join(others)}); reinstall ttt with this one"
    return f"the C++ kernels have not been built in {package}; pip install --editable . builds them"


def _reported_reason(report: Path) -> str:
    """The ``reason`` of a build that failed; empty if the build succeeded, or left no report that can be read."""
    try:
        return str(json.loads(report.read_text()).get("reason") or "")
    except (OSError, ValueError, AttributeError):
        return ""
