"""Low-rank weights for each user: the pool of slots, the protections that all users share, and a guard per user."""
