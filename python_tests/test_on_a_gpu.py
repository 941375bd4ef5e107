"""The model as a whole on a GPU against the reference backend on a CPU: forward, generation, gradients of a training step."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from llada_kernels import use_backend
from llada_kernels.generation import generate
from llada_kernels.training.data import PackedDataset
from llada_kernels.training.objectives import Objective, loss_terms, prepare

from .models import LLADA2, random_model

#: Heads of a size that the Triton kernels serve.
CONFIG = replace(LLADA2, head_dim=64, rotary_dim=32, mask_token_id=319)

on_devices = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def models(where):
    """The same weights on a CPU and on the device."""
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = random_model(CONFIG)
    return model, copy.deepcopy(model).to(where)


@on_devices
def test_forward(where):
    there = models(where)
    ids = torch.randint(0, CONFIG.vocab_size - 5, (2, 70))
    padding = torch.ones_like(ids)
    padding[1, 50:] = 0
    for mask in (None, padding):
        with torch.no_grad():
            ours = there[1](ids.to(where), attention_mask=None if mask is None else mask.to(where)).logits
            with use_backend("reference"):
                expected = there[0](ids, attention_mask=mask).logits
        assert ours.device.type == where
        torch.testing.assert_close(ours.cpu(), expected, atol=1e-3, rtol=1e-3)


@on_devices
@pytest.mark.parametrize("options", [{}, {"editing_threshold": 0.3}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}])
def test_generation(where, options):
    here, there = models(where)
    prompts = [torch.randint(0, CONFIG.vocab_size - 5, (n,)) for n in (5, 19)]
    settings = {"gen_length": 24, "block_length": 8, "threshold": 0.2, "eos_id": -1, **options}
    ours = generate(there, [p.to(where) for p in prompts], **settings)
    with use_backend("reference"):
        expected = generate(here, prompts, **settings)
    assert ours.num_forwards == expected.num_forwards
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


@on_devices
def test_training_step(where):
    data = PackedDataset([torch.randint(0, CONFIG.vocab_size - 5, (n,)) for n in (40, 9, 33)], 100)
    losses, gradients = [], []
    for model, backend in zip(models(where), ("reference", None), strict=True):
        model.requires_grad_(True).train()
        model.gradient_checkpointing = backend is None
        with use_backend(backend):
            part = prepare(data.batch(0, 1).to(model.device), Objective("diffusion", 8), CONFIG.mask_token_id, seed=0, step=0)
            loss = loss_terms(model, part, embedding_sigma=0.1, confidence=True).loss / part.count
            loss.backward()
        losses.append(loss.detach().cpu())
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-3 * expected.norm() + 1e-6, name
