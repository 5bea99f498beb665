"""The suites of the benchmark, by name."""

from __future__ import annotations

from collections.abc import Callable

from bench.learning.digits.suite import DigitsSuite
from bench.learning.facts.suite import FactsSuite
from bench.learning.language.suite import StreamsSuite
from bench.learning.suite import Suite
from bench.learning.text.suite import TextSuite

SUITES: dict[str, Callable[[], Suite]] = {
    "digits": DigitsSuite,
    "text": TextSuite,
    "streams": StreamsSuite,
    "facts": FactsSuite,
}
"""Name -> function that makes the suite."""
