"""Block-diffusion MoE language models (LLaDA2.0, LLaDA2.1, LLaDA-MoE): kernels, model, generation, training."""

from .config import Config
from .masks import DiffusionMask
from .model import Model
from .ops.dispatch import explain, use_backend

__all__ = ["Config", "DiffusionMask", "Model", "explain", "use_backend"]
