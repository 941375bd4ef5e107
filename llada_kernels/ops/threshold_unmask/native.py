"""Native backend of threshold_unmask: csrc/threshold_unmask."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from .._common import native_reason
from ..dispatch import Backend
from .arguments import Rules


def _supports(logits: Tensor, rules: Rules) -> str | None:
    return native_reason(logits, rules.tokens, cuda="threshold_unmask")


def _native(logits: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.detach() if logits.requires_grad else logits
    # The overload by name: finding it took 6 of the 90 us of a call behind one that filled the caches.
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.llada_kernels.threshold_unmask.default(logits.contiguous(), *rules)
    return result


if _library.load_error is None:

    @torch.library.register_fake("llada_kernels::threshold_unmask")
    def _fake(logits, tokens, *_):  # type: ignore[no-untyped-def]
        rows, length = tokens.shape
        return (
            torch.empty_like(tokens),
            tokens.new_empty((rows, length), dtype=torch.float32),
            tokens.new_empty((rows, 2), dtype=torch.int32),
        )


BACKEND = Backend("native", _supports, _native)
