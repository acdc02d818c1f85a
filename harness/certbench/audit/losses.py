"""What an attack increases, and the margin that tells whether it has won. All per image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 1e-12
"""Keeps the ratio finite where the first and third logit are equal."""


def smallest_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``z_y - max_{j != y} z_j``, shape (batch,), for logits (batch, classes); an image holds only where it is > 0."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """The difference-of-logits ratio of Croce and Hein 2020: ``-(z_y - max_{j != y} z_j) / (z_1st - z_3rd)``.

    It is invariant to shifting and scaling the logits, so it keeps its gradient where cross-entropy saturates. With
    two classes there is no third logit, and the bare difference is used.
    """
    margin = smallest_margin(logits, labels)
    if logits.shape[1] < 3:
        return -margin
    ranked = logits.topk(3, dim=1).values
    return -margin / (ranked[:, 0] - ranked[:, 2] + SMALLEST)


LOSSES = {"ce": cross_entropy, "dlr": logits_ratio}
