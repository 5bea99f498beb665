"""Learning from any loss and from text: `Learner`, output head, guard, and what they share."""
