"""The attack inside a training step; audits have one of their own, which shares no code with this."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from certbench.bounds.box import input_box


def projected_gradient(
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    eps: float,
    steps: int,
    step_size: float,
    seed: int,
) -> Tensor:
    """Points of the ball around each image at which the cross entropy is large (Madry et al., arXiv 1706.06083).

    From a random point of the ball, ``steps`` times along the sign of the gradient and back into the ball.

    Args:
        logits: the network as the step sees it; must not update anything.
        images: raw pixels in [0, 1], shape (batch, channels, height, width).
        eps: the ball's radius in raw pixel units; it is cut at [0, 1].
        step_size: as a share of ``eps``.
        seed: of the random points, drawn on the CPU so that every device begins alike.
    """
    box = input_box(images, eps)
    start = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed), dtype=images.dtype)
    x = torch.lerp(box.lower, box.upper, start.to(images.device))
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(logits(x), labels, reduction="sum"), x)
        x = (x + step_size * eps * slope.sign()).maximum(box.lower).minimum(box.upper)
    return x.detach()
