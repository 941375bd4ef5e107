"""Training: AR pre-training and its conversion to block diffusion."""

from .checkpoint import average_checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint
from .data import Batch, Document, PackedDataset
from .noise import Noise, draw_noise
from .objectives import Objective, ar_perplexity, elbo_perplexity, loss_terms, prepare, unigram_perplexity
from .schedule import LearningRate, Plan, Stage, wsd_plan
from .trainer import TrainConfig, Trainer

__all__ = [
    "Batch", "Document", "LearningRate", "Noise", "Objective", "PackedDataset", "Plan", "Stage", "TrainConfig", "Trainer",
    "ar_perplexity", "average_checkpoints", "draw_noise", "elbo_perplexity", "latest_checkpoint", "load_checkpoint",
    "loss_terms", "prepare", "save_checkpoint", "unigram_perplexity", "wsd_plan",
]  # fmt: skip
