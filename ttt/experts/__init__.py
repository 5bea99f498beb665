"""Weights for each domain: a learner with a low-rank column for every kind of text that it meets."""
