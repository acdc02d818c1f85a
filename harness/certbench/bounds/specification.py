"""The property: the label's logit is above every other logit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from certbench.bounds.box import Box


def difference_rows(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """C, shape (batch, classes - 1, classes): rows ``one_hot(y) - one_hot(j)``, j ascending over the wrong classes."""
    eye = torch.eye(classes, dtype=dtype, device=labels.device)
    wrong = ~F.one_hot(labels, classes).bool()
    rows = eye[labels][:, None, :] - eye
    return rows[wrong].view(len(labels), classes - 1, classes)


def merged_margins(features: Box, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """``C W c + C b - |C W| r``, shape (batch, classes - 1), for features (batch, d) and weight (classes, d)."""
    C = difference_rows(labels, weight.shape[0], weight.dtype)
    W_C = C @ weight  # (batch, classes - 1, d)
    margins = (W_C @ features.center[:, :, None] - W_C.abs() @ features.radius[:, :, None]).squeeze(-1)
    return margins if bias is None else margins + C @ bias


def separate_margins(logits: Box, labels: Tensor) -> Tensor:
    """``lower_y - upper_j``: for networks that do not end in a linear layer. Sound, and looser."""
    classes = logits.shape[1]
    wrong = ~F.one_hot(labels, classes).bool()
    lower = logits.lower.gather(1, labels[:, None])
    return lower - logits.upper[wrong].view(len(labels), classes - 1)
