"""The published augmentation of CIFAR-10: flip, erase, crop, filled with mid-grey.

The release augments after normalising, where its fill value 0 is mid-grey; on raw pixels that is one half.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

FILL = 0.5
PADDING = 4
AREA = (0.04, 0.2)
ASPECT = (0.5, 2.0)
"""Of the erased rectangle, half the images have one; its logarithm is uniform."""


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Raw pixels (batch, C, H, W) as they are shown to the network in training; ``generator`` is the CPU's."""
    numbers = torch.rand(6, len(images), generator=generator)
    offsets = torch.randint(0, 2 * PADDING + 1, (2, len(images)), generator=generator)
    flip, *erase = numbers.to(images.device)
    images = torch.where((flip < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
    return _crop(images.masked_fill(_rectangles(erase, images), FILL), offsets.to(images.device))


def _rectangles(numbers: list[Tensor], images: Tensor) -> Tensor:
    """Which pixels are erased, (batch, 1, H, W); a rectangle that does not fit is none."""
    happens, area, aspect, top, left = numbers
    height, width = images.shape[2:]
    size = (AREA[0] + (AREA[1] - AREA[0]) * area) * height * width
    ratio = torch.exp(math.log(ASPECT[0]) + (math.log(ASPECT[1]) - math.log(ASPECT[0])) * aspect)
    h, w = (size * ratio).sqrt().round(), (size / ratio).sqrt().round()
    fits = (h < height) & (w < width) & (happens < 0.5)
    rows = _within((top * (height - h + 1)).floor(), torch.where(fits, h, 0), height)
    columns = _within((left * (width - w + 1)).floor(), w, width)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _within(start: Tensor, length: Tensor, size: int) -> Tensor:
    place = torch.arange(size, device=start.device)
    return (place >= start[:, None]) & (place < (start + length)[:, None])


def _crop(images: Tensor, offsets: Tensor) -> Tensor:
    """Back to the old size out of a margin of ``PADDING`` filled pixels."""
    height, width = images.shape[2:]
    wide = F.pad(images, (PADDING,) * 4, value=FILL)
    rows = offsets[0][:, None] + torch.arange(height, device=images.device)
    columns = offsets[1][:, None] + torch.arange(width, device=images.device)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return wide[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
