"""The demo: a byte-level language model, trained on Python sources, that learns from other text as it reads."""

from ttt.demo.model import load_model

__all__ = ["load_model"]
