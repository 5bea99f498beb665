"""The benchmark of continual learning: suites of scenarios and methods, tuned, run, and compared over seeds.

``python -m bench.learning --help``. A suite is a class like `DigitsSuite`, listed in `SUITES`.
"""

from collections.abc import Callable

from bench.learning.digits.suite import DigitsSuite
from bench.learning.suite import Suite
from bench.learning.text.suite import TextSuite

SUITES: dict[str, Callable[[], Suite]] = {"digits": DigitsSuite, "text": TextSuite}
"""Name -> what makes the suite."""

__all__ = ["SUITES", "DigitsSuite", "Suite", "TextSuite"]
