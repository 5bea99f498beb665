"""The old name of what is now in `ttt.adapt`; kept for one release."""

import warnings

from ttt.adapt import RANKS, Exported, export_peft, import_peft

__all__ = ["RANKS", "Exported", "export_peft", "import_peft"]

warnings.warn("ttt.exchange is now ttt.adapt", DeprecationWarning, stacklevel=2)
