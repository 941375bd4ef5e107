"""A model and documents small enough for whole runs within a test."""

from __future__ import annotations

import pytest
import torch

from llada_kernels.config import Config
from llada_kernels.model import Model
from llada_kernels.training import Document, PackedDataset

VOCAB, MASK = 61, 60


def tiny_config(**changes):
    values = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "rotary_dim": 8, "rope_theta": 10000.0, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_layers": (False, True), "shared_expert_intermediate_size": 16,
        "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "mask_token_id": MASK, "eos_token_id": 59,
        "max_position_embeddings": 512, "initializer_range": 0.1,
    }  # fmt: skip
    return Config(**{**values, **changes})


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    return Model(tiny_config(**changes))


def tiny_parent(seed=0, **changes):
    return tiny_model(seed, family="bailing_moe_v2", causal=True, **changes)


def tiny_model_for(objective, seed=0):
    return (tiny_parent if objective == "ar" else tiny_model)(seed)


def tiny_data(documents=24, row_tokens=32, prompts=False, seed=0, vocab=59):
    """Documents that can be learnt: arithmetic sequences modulo the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    docs = []
    for _ in range(documents):
        n, start, step = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((5, 30), (0, vocab), (1, 4)))
        tokens = [(start + step * i) % vocab for i in range(n)]
        docs.append(Document(tokens, [i >= n // 2 for i in range(n)] if prompts else None))
    return PackedDataset(docs, row_tokens, seed=seed)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def data():
    return tiny_data()
