"""The suite "text": a byte-level language model reads kinds of text that it was not trained on."""
