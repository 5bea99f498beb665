"""The demo: a byte-level language model, trained on Python sources, learns from other text while it reads it."""

from ttt.demo.model import load_model

__all__ = ["load_model"]
