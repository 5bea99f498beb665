"""`Evidence`: a sum of log-likelihood ratios that tells when another explanation of a stream becomes the better one."""

from __future__ import annotations


class Evidence:
    """One-sided CUSUM of a log-likelihood ratio (Page 1954; optimal for a known change by Lorden 1971):

        S <- max(0, S + bits - slack tokens)

    Args:
        slack: bits per token by which the other explanation must be better to count.

    Attributes:
        sum: S, bits.
        since: number of tokens since S was 0, which is the most probable time of the change.
    """

    def __init__(self, slack: float) -> None:
        self.slack = slack
        self.clear()

    def clear(self) -> None:
        """Set the sum to 0."""
        self.sum, self.since = 0.0, 0

    def add(self, bits: float, tokens: int) -> float:
        """Add ``tokens`` tokens on which the other explanation is better by ``bits`` bits in total. Returns S."""
        self.sum = max(0.0, self.sum + bits - self.slack * tokens)
        self.since = self.since + tokens if self.sum else 0
        return self.sum
