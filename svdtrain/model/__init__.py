"""The GPT and its generation."""

from svdtrain.model.generate import generate
from svdtrain.model.gpt import GPT
from svdtrain.model.gpt_config import GPTConfig
from svdtrain.model.hardware import hardware_dtype
from svdtrain.model.kv_cache import KVCache

__all__ = ["GPT", "GPTConfig", "KVCache", "generate", "hardware_dtype"]
