"""`Evidence`: log-likelihood ratios of a stream, added up until one of two explanations is the better one."""

from __future__ import annotations


class Evidence:
    """One-sided CUSUM of a log-likelihood ratio (Page 1954; optimal for a known change by Lorden 1971)::

        S <- max(0, S + bits - slack tokens)

    Attributes:
        sum: S, bits.
        since: tokens since S was 0: where the change is likeliest to have been.
    """

    def __init__(self, slack: float) -> None:
        self.slack = slack
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.sum, self.since = 0.0, 0

    def add(self, bits: float, tokens: int) -> float:
        """Take ``tokens`` tokens on which the other explanation is better by ``bits`` bits in all; returns S."""
        self.sum = max(0.0, self.sum + bits - self.slack * tokens)
        self.since = self.since + tokens if self.sum else 0
        return self.sum
