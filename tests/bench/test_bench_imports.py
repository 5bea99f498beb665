"""The imports of `bench` and `ttt.demo`: no circles, and the package does not import the benchmarks."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def modules(package):
    """Name -> path of all modules of ``package``."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imported(path, known):
    """The modules of ``known`` that the file ``path`` imports anywhere, also in functions and for type checking."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & known.keys() or {node.module}
    return names & known.keys()


def test_there_is_no_circle_among_the_modules():
    known = modules("bench") | modules("ttt/demo")
    graph = {name: imported(path, known) for name, path in known.items()}
    assert graph["bench.kernels.case"] >= {"bench.kernels.ceilings", "bench.kernels.contender"}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(known)


def test_the_package_does_not_import_the_benchmarks():
    benchmarks = modules("bench")
    assert benchmarks
    for name, path in modules("ttt").items():
        assert not imported(path, benchmarks), name
