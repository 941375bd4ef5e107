"""The layers of the model, written with the ops."""

from .attention import Attention
from .block import Block
from .moe import GatedMLP, MoE, Router, RouterOutput
from .norm import RMSNorm

__all__ = ["Attention", "Block", "GatedMLP", "MoE", "RMSNorm", "Router", "RouterOutput"]
