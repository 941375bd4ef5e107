"""Reference of lm_head_unmask: the logits, then the reference of threshold_unmask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend
from ..threshold_unmask.reference import threshold_unmask_reference


def lm_head_unmask_reference(hidden: Tensor, lm_head: Tensor, *rules: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of Unmasked."""
    logits = torch.nn.functional.linear(hidden.detach(), lm_head.detach())
    return threshold_unmask_reference(logits, *rules)


BACKEND = Backend("reference", lambda *_: None, lm_head_unmask_reference)
