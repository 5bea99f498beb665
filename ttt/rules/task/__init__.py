"""Rules for sequences of tasks with labelled samples, and the `Trainer` that composes them."""
