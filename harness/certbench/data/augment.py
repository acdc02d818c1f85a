"""Random flips, erased rectangles and crops of whole batches, as one gather on the images' device.

The random numbers of an epoch are drawn at once on the CPU (:func:`draw`), one set per image in published order, so that
neither the device nor the batch size changes them. Each kind is drawn whether or not it is used, or after those that
are, so that one setting never shifts another's numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from certbench.recipe import Augmentation

TRIES = 10
"""Rectangles drawn per image; an image none of whose rectangles fits inside it keeps all its pixels."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """What happens to each of N images.

    ``flips``: bool, shape (N,). ``offsets``: int64, shape (N, 2), row and column where the crop begins in the padded
    image; the padding for both leaves the image in place. ``erased``: int64, shape (N, 4), top, left, height and width
    of the erased rectangle in the flipped image, all 0 where nothing is erased; or None.
    """

    flips: Tensor
    offsets: Tensor
    erased: Tensor | None = None

    def to(self, device: torch.device | str) -> Drawn:
        erased = None if self.erased is None else self.erased.to(device)
        return Drawn(self.flips.to(device), self.offsets.to(device), erased)

    def take(self, chosen: Tensor) -> Drawn:
        """What happens to some of the images, in their order."""
        erased = None if self.erased is None else self.erased[chosen]
        return Drawn(self.flips[chosen], self.offsets[chosen], erased)


def draw(count: int, side: tuple[int, int], how: Augmentation, generator: torch.Generator) -> Drawn:
    """Random numbers for ``count`` images of (height, width) ``side``, on the CPU; offsets are uniform."""
    flips = torch.randint(0, 2, (count,), generator=generator).bool()
    offsets = torch.randint(0, 2 * how.crop_padding + 1, (count, 2), generator=generator)
    erased = _rectangles(count, side, how, generator) if how.erase else None
    return Drawn(flips & how.flip, offsets, erased)


def _rectangles(count: int, side: tuple[int, int], how: Augmentation, generator: torch.Generator) -> Tensor:
    """The first rectangle of each image that is smaller than it on both sides (arXiv 1708.04896, algorithm 1)."""
    chance, area, aspect, row, column = torch.rand(5, count, TRIES, generator=generator, dtype=torch.float64)
    area = math.prod(side) * _between(area, *how.erase_area)
    aspect = _between(aspect, *(math.log(end) for end in how.erase_aspect)).exp()
    height, width = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (height < side[0]) & (width < side[1])
    top = (row * (side[0] - height + 1)).long()
    left = (column * (side[1] - width + 1)).long()
    first = fits.int().argmax(1, keepdim=True)
    found = torch.stack([top, left, height, width], 2).gather(1, first[:, :, None].expand(-1, -1, 4))[:, 0]
    happens: Tensor = (fits.any(1) & (chance[:, 0] < how.erase))[:, None]
    return found * happens


def _between(share: Tensor, low: float, high: float) -> Tensor:
    return low + share * (high - low)


def apply(images: Tensor, drawn: Drawn, how: Augmentation) -> Tensor:
    """Flip, erase and crop images of any number type, shape (N, C, H, W), on one device; the shape stays.

    Fills are values of the images themselves, so floating-point pixels in [0, 1] are wanted where there are any.
    """
    height, width = images.shape[2:]
    rows = _source(height, drawn.offsets[:, 0], how.crop_padding)
    columns = _source(width, drawn.offsets[:, 1], how.crop_padding)
    inside_rows, inside_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    unflipped = torch.where(drawn.flips[:, None], width - 1 - inside_columns, inside_columns)
    index = (inside_rows[:, :, None] * width + unflipped[:, None, :]).flatten(1)
    flat = images.flatten(2)
    moved = flat.gather(2, index[:, None, :].expand(flat.shape)).view(images.shape)
    if drawn.erased is not None:
        top, left, high, wide = drawn.erased.T[:, :, None]
        in_rows = (inside_rows >= top) & (inside_rows < top + high)
        in_columns = (inside_columns >= left) & (inside_columns < left + wide)
        moved = moved.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], how.erase_fill)
    if how.crop_padding and how.crop_fill is not None:
        outside = (rows != inside_rows)[:, :, None] | (columns != inside_columns)[:, None, :]
        moved = moved.masked_fill(outside[:, None], how.crop_fill)
    return moved


def _source(length: int, offsets: Tensor, padding: int) -> Tensor:
    """For each position along one side of the crop, its position in the image, outside where padded; shape (N, length)."""
    return torch.arange(length, device=offsets.device) + offsets[:, None] - padding
