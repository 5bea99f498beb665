"""Rules for streams of text, which a `ttt.Learner` takes: they add terms to the loss of every chunk that teaches."""
