"""The ops: plain functions over tensors, each with several backends (see :mod:`.dispatch`)."""

from .dispatch import explain, use_backend
from .grouped_gemm import grouped_gemm
from .moe_mlp import moe_mlp
from .moe_routing import Routing, moe_routing
from .swiglu import swiglu

__all__ = [
    "Routing",
    "explain",
    "grouped_gemm",
    "moe_mlp",
    "moe_routing",
    "swiglu",
    "use_backend",
]
