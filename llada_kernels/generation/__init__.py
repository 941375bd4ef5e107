"""Block-wise generation: decoding rules, a paged KV cache, the batched engine and the plain loops beside it."""

from .api import generate
from .engine import Engine, Finished, GenerationModel, WindowEngine, engine_for
from .kv_cache import KVCache
from .output import GenerationOutput, OnStep, StepRecorder
from .rules import DecodingRule, LLaDA20, LLaDA21, LowConfidence

__all__ = [
    "DecodingRule",
    "Engine",
    "Finished",
    "GenerationModel",
    "GenerationOutput",
    "KVCache",
    "LLaDA20",
    "LLaDA21",
    "LowConfidence",
    "OnStep",
    "StepRecorder",
    "WindowEngine",
    "engine_for",
    "generate",
]
