"""Losses on certified margins."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def robust_cross_entropy(margins: Tensor) -> Tensor:
    """``mean log(1 + sum_j exp(-m_j))`` over the batch, for margins (batch, classes - 1).

    Cross entropy of the logits ``[0, -m]`` with target 0: an upper bound of the worst cross entropy in the box
    (arXiv 2103.17268, section 3.3 of the paper's setting; arXiv 1810.12715).
    """
    return robust_cross_entropies(margins, "mean")


def robust_cross_entropies(margins: Tensor, reduction: str = "none") -> Tensor:
    """The same of each image, shape (batch,)."""
    logits = F.pad(-margins, (1, 0))
    target = torch.zeros(len(margins), dtype=torch.long, device=margins.device)
    return F.cross_entropy(logits, target, reduction=reduction)
