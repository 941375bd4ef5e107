"""Block-diffusion MoE language models (LLaDA2.0, LLaDA2.1, LLaDA-MoE): kernels, model, generation, training."""

from typing import Any

from .config import Config
from .masks import DiffusionMask
from .model import Model
from .ops.dispatch import explain, use_backend

__all__ = ["Config", "DiffusionMask", "Model", "explain", "use_backend"]

__version__: str


def __getattr__(name: str) -> Any:
    """What is looked up when it is first asked for: the installed version, and ``training``, which most programs do not need."""
    import importlib.metadata

    if name == "training":
        return importlib.import_module(f".{name}", __name__)
    if name == "__version__":
        return importlib.metadata.version("llada-kernels")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
