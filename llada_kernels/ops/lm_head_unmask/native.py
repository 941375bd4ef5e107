"""Native CPU backend of lm_head_unmask: csrc/lm_head_unmask."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from .._common import native_reason
from ..dispatch import Backend
from ..threshold_unmask.arguments import Rules


def _supports(hidden: Tensor, lm_head: Tensor, rules: Rules) -> str | None:
    return native_reason(hidden, lm_head, rules.tokens)


def _native(hidden: Tensor, lm_head: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    hidden, lm_head = hidden.detach(), lm_head.detach()
    result: tuple[Tensor, Tensor, Tensor]
    if rules.temperature is None:
        result = torch.ops.llada_kernels.lm_head_unmask(hidden.contiguous(), lm_head.contiguous(), *rules.greedy())
    else:  # drawing needs the logits several times
        result = torch.ops.llada_kernels.threshold_unmask(torch.nn.functional.linear(hidden, lm_head), *rules)
    return result


if _library.load_error is None:

    @torch.library.register_fake("llada_kernels::lm_head_unmask")
    def _fake(hidden, lm_head, tokens, *_):  # type: ignore[no-untyped-def]
        rows, length = tokens.shape
        return (
            torch.empty_like(tokens),
            tokens.new_empty((rows, length), dtype=torch.float32),
            tokens.new_empty((rows, 2), dtype=torch.int32),
        )


BACKEND = Backend("native", _supports, _native)
