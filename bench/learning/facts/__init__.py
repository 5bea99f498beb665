"""The suite "facts": what a language model was told in one chat and is asked in another."""
