"""Random flips and crops of whole batches, as one gather on the images' device."""

from __future__ import annotations

import torch


def draw(
    count: int, padding: int, flip: bool, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random flips (bool, shape (count,)) and crop offsets (int64, shape (count, 2): row, column), on the CPU.

    Offsets are uniform on 0 .. 2 * padding. Both are always drawn, so that one setting never shifts the other's
    random numbers.
    """
    flips = torch.randint(0, 2, (count,), generator=generator).bool()
    offsets = torch.randint(0, 2 * padding + 1, (count, 2), generator=generator)
    return flips & flip, offsets


def flip_and_crop(
    images: torch.Tensor, flips: torch.Tensor, offsets: torch.Tensor, padding: int
) -> torch.Tensor:
    """Flip some images left to right, repeat the edge ``padding`` pixels outwards, and crop back to the old size.

    ``images``: any dtype, shape (N, C, H, W). ``flips``: bool, shape (N,). ``offsets``: int64, shape (N, 2), row and
    column where the crop begins in the padded image; ``padding`` for both leaves the image in place. All lie on one
    device; the result has the images' shape.
    """
    height, width = images.shape[2:]
    rows = _source(height, offsets[:, 0], padding)
    columns = _source(width, offsets[:, 1], padding)
    columns = torch.where(flips[:, None], width - 1 - columns, columns)
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    flat = images.flatten(2)
    return flat.gather(2, index[:, None, :].expand(flat.shape)).view(images.shape)


def _source(length: int, offsets: torch.Tensor, padding: int) -> torch.Tensor:
    """For each position along one side of the crop, the position in the image it is taken from; shape (N, length)."""
    positions = torch.arange(length, device=offsets.device) + offsets[:, None] - padding
    return positions.clamp(0, length - 1)
