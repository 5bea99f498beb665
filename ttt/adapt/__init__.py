"""Learning layers put into a model and taken out, to and from files, shared between models, exchanged with PEFT.

This package itself exports the exchange with PEFT, vLLM and SGLang and `LearntState`; `ttt` exports the rest.
"""

from ttt.adapt.distributed import LearntState
from ttt.adapt.peft_export import RANKS, Exported, export_peft
from ttt.adapt.peft_import import import_peft

__all__ = ["RANKS", "Exported", "LearntState", "export_peft", "import_peft"]
