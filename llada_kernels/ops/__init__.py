"""The ops: plain functions over tensors, each with several backends (see :mod:`.dispatch`)."""

from .block_attention import block_attention
from .cached_block_attention import cached_block_attention
from .dispatch import explain, use_backend
from .grouped_gemm import grouped_gemm
from .lm_head_unmask import lm_head_unmask
from .lm_loss import LMLoss, lm_loss
from .moe_mlp import moe_mlp
from .moe_routing import Routing, moe_routing
from .quantized_experts import QuantizedExperts
from .rms_norm import rms_norm
from .rope import rope, rope_tables
from .swiglu import swiglu
from .threshold_unmask import Unmasked, threshold_unmask

__all__ = [
    "LMLoss",
    "QuantizedExperts",
    "Routing",
    "Unmasked",
    "block_attention",
    "cached_block_attention",
    "explain",
    "grouped_gemm",
    "lm_head_unmask",
    "lm_loss",
    "moe_mlp",
    "moe_routing",
    "rms_norm",
    "rope",
    "rope_tables",
    "swiglu",
    "threshold_unmask",
    "use_backend",
]
