"""Reference of lm_head_unmask: the logits, then the reference of threshold_unmask."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Backend
from ..threshold_unmask.arguments import Rules
from ..threshold_unmask.reference import threshold_unmask_reference


def lm_head_unmask_reference(hidden: Tensor, lm_head: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of Unmasked."""
    logits = torch.nn.functional.linear(hidden.detach(), lm_head.detach())
    return threshold_unmask_reference(logits, rules)


BACKEND = Backend("reference", lambda *_: None, lm_head_unmask_reference)
