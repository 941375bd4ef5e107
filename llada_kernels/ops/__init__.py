"""The ops: plain functions over tensors, each with several backends (see :mod:`llada_kernels.ops.dispatch`)."""

from .dispatch import explain, use_backend

__all__ = ["explain", "use_backend"]
