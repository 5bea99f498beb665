"""A chat with a language model that learns what its user says, and the command ``ttt chat``."""

from ttt.chat.session import Chat, Turn

__all__ = ["Chat", "Turn"]
