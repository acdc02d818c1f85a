"""Gaussian noise for training, as a function of seed, step and purpose alone."""

from __future__ import annotations

import torch
from torch import Tensor

from certbench.seeding import derive_seed
from certbench.training.fit import Step


def gaussian_noise(
    images: Tensor, sigma: float, seed: int, step: Step, copies: int = 1, purpose: str = "noise"
) -> Tensor:
    """``copies`` independent draws of N(0, sigma^2) for a batch: shape (copies, *images.shape), on its device.

    ``images.repeat(copies, 1, 1, 1) + noise.flatten(0, 1)`` is the noisy batch, copy after copy. A resumed training
    draws the same again; CPU and GPU draw differently.
    """
    generator = torch.Generator(images.device).manual_seed(derive_seed(seed, purpose, step.batch))
    shape = (copies, *images.shape)
    return torch.randn(shape, generator=generator, device=images.device, dtype=images.dtype) * sigma
