"""Weights for each domain: a learner that keeps a low-rank column for every kind of text that it meets."""
