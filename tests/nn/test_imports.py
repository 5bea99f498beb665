"""Imports within `ttt.nn` run one way: layers import helpers, helpers import no layer."""

import ast
import graphlib
from pathlib import Path

import pytest

import ttt.nn

FOLDER = Path(ttt.nn.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
HELPERS = [
    "bnb", "budget", "directions", "feedback", "frozen_weight", "gaussian", "graph_steps", "module_weight", "parallel",
    "rates", "replay_rows", "row_blocks", "update",
]  # fmt: skip


def imported(module):
    """Modules of `ttt.nn` that ``module`` imports, also within functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in MODULES if f"ttt.nn.{name}" in found} | ({"__init__"} if "ttt.nn" in found else set())


def test_imports_have_no_circle():
    order = list(graphlib.TopologicalSorter({module: imported(module) for module in MODULES}).static_order())
    assert order.index("gaussian") < order.index("state") < order.index("linear") < order.index("capture")
    assert "__init__" not in order


@pytest.mark.parametrize("helper", HELPERS)
def test_helpers_import_helpers_only(helper):
    assert imported(helper) <= set(HELPERS)
