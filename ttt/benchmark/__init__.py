"""The benchmark of continual learning: suites of scenarios and methods, tuned, run, and compared over seeds.

``python -m ttt benchmark --help``. A suite is a class like `DigitsSuite`, listed in `SUITES`.
"""

from collections.abc import Callable

from ttt.benchmark.digits_suite import DigitsSuite
from ttt.benchmark.suite import Suite
from ttt.benchmark.text_suite import TextSuite

SUITES: dict[str, Callable[[], Suite]] = {"digits": DigitsSuite, "text": TextSuite}
"""Name -> what makes the suite."""

__all__ = ["SUITES", "DigitsSuite", "Suite", "TextSuite"]
