"""Exchange with PEFT, vLLM and SGLang: what was learnt as a LoRA adapter, and a LoRA adapter as a user's state."""

from ttt.adapt.peft_export import RANKS, Exported, export_peft
from ttt.adapt.peft_import import import_peft

__all__ = ["RANKS", "Exported", "export_peft", "import_peft"]
