"""Block-diffusion MoE language models (LLaDA2.0, LLaDA2.1, LLaDA-MoE): kernels, model, generation, training."""

from .ops.dispatch import explain, use_backend

__all__ = ["explain", "use_backend"]
