"""Exchange with PEFT, vLLM and SGLang: what was learnt as a LoRA adapter, and a LoRA adapter as a user's state."""

from ttt.exchange.export import RANKS, Exported, export_peft
from ttt.exchange.load import import_peft

__all__ = ["RANKS", "Exported", "export_peft", "import_peft"]
