"""Language models of sequence layers, for transformers (in a clone: ``pip install -e '.[hf]'``).

Importing this package registers them: ``AutoModelForCausalLM.from_pretrained(folder)`` then loads what
``save_pretrained`` wrote.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ttt.sequence_models.cache import SequenceCache
from ttt.sequence_models.config import TTTSequenceConfig
from ttt.sequence_models.model import TTTSequenceForCausalLM, TTTSequenceModel

__all__ = ["SequenceCache", "TTTSequenceConfig", "TTTSequenceForCausalLM", "TTTSequenceModel"]

AutoConfig.register(TTTSequenceConfig.model_type, TTTSequenceConfig, exist_ok=True)
AutoModel.register(TTTSequenceConfig, TTTSequenceModel, exist_ok=True)
AutoModelForCausalLM.register(TTTSequenceConfig, TTTSequenceForCausalLM, exist_ok=True)
