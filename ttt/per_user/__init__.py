"""Weights of every user's own: the pool that gives users their slots, and what protects all of them alike."""
