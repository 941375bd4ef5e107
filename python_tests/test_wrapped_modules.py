"""Adapters, wrappers, hooks and quantised stand-ins: no module is bypassed unless it is the plain one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from llada_kernels import DiffusionMask
from llada_kernels.nn import RMSNorm
from llada_kernels.nn.plain import is_plain

from .models import LLADA2, VARIANTS, random_model

CONFIG = replace(LLADA2, mask_token_id=318, eos_token_id=317)
MASK = DiffusionMask.block_diffusion([0, 11, 20], 4)
IDS = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(5))


class LoRA(nn.Module):
    """An adapter as the common libraries build it: beside a frozen layer whose weight it also shows."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.randn(base.out_features, rank))

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T

    def merged(self):
        head = nn.Linear(self.base.in_features, self.base.out_features, bias=False)
        head.weight = nn.Parameter(self.base.weight + self.b @ self.a)
        return head


def test_an_adapter_on_the_lm_head_counts():
    m = random_model(CONFIG)
    before = m(IDS).logits
    adapter = m.lm_head = LoRA(m.lm_head)
    logits = m(IDS).logits
    assert not torch.allclose(logits, before, atol=0.1)
    logits.sum().backward()
    assert adapter.b.grad.abs().sum() > 0
    assert not m.plain_lm_head
    with pytest.raises(ValueError, match="lm_head: expected a plain nn.Linear without bias or hooks .*got LoRA: merge an adapter"):
        _ = m.lm_head_weight
    options = {"gen_length": 12, "block_length": 4, "eos_id": -1}
    adapted = m.generate([1, 2, 3], **options)
    m.lm_head = adapter.base
    plain = m.generate([1, 2, 3], **options)
    m.lm_head = adapter.merged()
    assert m.plain_lm_head
    assert adapted[0].tolist() == m.generate([1, 2, 3], **options)[0].tolist() != plain[0].tolist()


def test_a_bias_of_the_lm_head_counts():
    m = random_model(CONFIG)
    m.lm_head.bias = nn.Parameter(torch.zeros(CONFIG.vocab_size))
    m.lm_head.bias.data[7] = 1e4
    assert not m.plain_lm_head
    assert m.generate([1, 2, 3], gen_length=8, block_length=4)[0].tolist() == [7] * 8


@pytest.mark.parametrize("config", [CONFIG, VARIANTS["biases"], VARIANTS["all_dense"]])
def test_training_and_inference_see_the_same_adapters(config):
    """A training step leaves out what the last layer's queries of the clean tokens would be."""
    m = random_model(config)
    plain = m.backbone(IDS, mask=MASK)[:20]
    attention = m.layers[-1].attention
    adapter = attention.qkv = LoRA(attention.qkv)
    whole, fewer = m.backbone(IDS, mask=MASK)[:20], m.backbone(IDS, mask=MASK, num_outputs=20)
    torch.testing.assert_close(fewer, whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, plain, atol=1e-2)
    fewer.square().sum().backward()
    assert adapter.b.grad.abs().sum() > 0


def test_a_wrapped_mlp_is_called_as_the_mlp_was():
    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return 2 * self.inner(*args)

    m = random_model(CONFIG)
    before = m(IDS).logits
    for layer in (0, 1):
        m.layers[layer].mlp = Twice(m.layers[layer].mlp)
        out = m(IDS, output_router_logits=True)
        assert not torch.allclose(out.logits, before, atol=1e-2) and len(out.router_logits) == 2
        before = out.logits


@pytest.mark.parametrize("num_outputs", [None, 20])
def test_hooks_fire_on_every_module(num_outputs):
    m, called = random_model(CONFIG), set()
    expected = m.backbone(IDS, mask=MASK, num_outputs=num_outputs), m(IDS, mask=MASK).logits
    leaves = {name: module for name, module in m.named_modules() if not list(module.children())}
    for name, module in leaves.items():
        module.register_forward_hook(lambda module, args, out, name=name: called.add(name))
    got = m.backbone(IDS, mask=MASK, num_outputs=num_outputs)
    assert leaves.keys() - called == {"lm_head"}
    torch.testing.assert_close(got, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(m(IDS, mask=MASK).logits, expected[1], atol=1e-4, rtol=1e-4)
    assert leaves.keys() == called
    called.clear()
    m.generate([1, 2, 3], gen_length=4, block_length=4)
    assert leaves.keys() == called


def test_a_hook_may_change_what_the_norms_give():
    m = random_model(CONFIG)
    for name in ("attention.q_norm", "attention.k_norm", "post_attention_layernorm"):
        before = m(IDS).logits
        handle = m.layers[1].get_submodule(name).register_forward_hook(lambda module, args, out: out * 3)
        assert not torch.allclose(m(IDS).logits, before, atol=1e-3), name
        handle.remove()
        assert torch.equal(m(IDS).logits, before)


class Packed(nn.Module):
    """What PyTorch's dynamic quantisation puts in the place of every nn.Linear: ``weight`` is a method."""

    def __init__(self, linear):
        super().__init__()
        self.packed = (linear.weight, linear.bias)

    def weight(self):
        return self.packed[0]

    def bias(self):
        return self.packed[1]

    def forward(self, x):
        return nn.functional.linear(x, *self.packed)


def test_linears_whose_weight_is_a_method():
    m = random_model(VARIANTS["biases"])
    m.config = replace(m.config, mask_token_id=318, eos_token_id=317)
    expected = m(IDS, mask=MASK).logits, m.backbone(IDS, mask=MASK, num_outputs=20), m.generate([1, 2], gen_length=8, block_length=4)
    for name, module in list(m.named_modules()):
        if type(module) is nn.Linear:
            m.set_submodule(name, Packed(module))
    assert isinstance(m.lm_head, Packed) and isinstance(m.layers[0].attention.qkv, Packed)
    got = m(IDS, mask=MASK).logits, m.backbone(IDS, mask=MASK, num_outputs=20), m.generate([1, 2], gen_length=8, block_length=4)
    for a, b in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert got[2][0].tolist() == expected[2][0].tolist()


def test_what_is_plain():
    norm = RMSNorm(8, 1e-6)
    assert is_plain(norm, RMSNorm) and not is_plain(None, RMSNorm) and not is_plain(norm, nn.Linear)
    register = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook")
    for name in register:
        handle = getattr(norm, name)(lambda *args: None)
        assert not is_plain(norm, RMSNorm), name
        handle.remove()
        everywhere = name.replace("register", "register_module")
        handle = getattr(nn.modules.module, everywhere)(lambda *args: None)
        assert not is_plain(norm, RMSNorm), everywhere
        handle.remove()
    assert is_plain(norm, RMSNorm)
    norm.forward = lambda x: x  # type: ignore[method-assign]
    assert not is_plain(norm, RMSNorm)
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    assert not is_plain(linear, nn.Linear)
