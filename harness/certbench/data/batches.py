"""Training batches from images that stay on the device: shuffled, augmented, and the same on every device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from certbench.data.augment import draw, flip_and_crop
from certbench.data.catalog import DatasetInfo
from certbench.data.dataset import Split, to_pixels
from certbench.errors import UsageError
from certbench.seeding import derive_seed


class Batches:
    """Batches of one split, epoch by epoch.

    The uint8 images are kept on ``device``. All random numbers of an epoch come from CPU generators seeded by
    ``seed`` and the epoch's number alone, so that a CPU and a GPU see the same batches, and an epoch can be repeated
    without those before it.

    Every image comes exactly once per epoch. The last batch may be smaller; but a single image left over joins the
    batch before it, because batch normalisation cannot train on one image. ``len()`` counts the batches so formed.

    Raises:
        UsageError: fewer than two images, or a batch size below two.
    """

    def __init__(
        self,
        split: Split,
        info: DatasetInfo,
        batch_size: int,
        seed: int,
        augment: bool,
        device: torch.device | str,
    ) -> None:
        if len(split) < 2 or batch_size < 2:
            raise UsageError(
                f"training batches need at least two images each; got {len(split)} images and batch size {batch_size}"
            )
        self._split = split.to(device)
        self._info = info
        self._seed = seed
        self._augment = augment and (info.flip or info.crop_padding > 0)
        self._bounds = _batch_bounds(len(split), batch_size)

    def __len__(self) -> int:
        return len(self._bounds)

    def epoch(self, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of epoch ``number``: pixels, float32 in [0, 1], shape (B, C, H, W); labels, int64, shape (B,)."""
        images, labels, info = self._split.images, self._split.labels, self._info
        order = torch.randperm(len(labels), generator=self._generator("shuffle", number)).to(images.device)
        if self._augment:
            generator = self._generator("augment", number)
            flips, offsets = draw(len(labels), info.crop_padding, info.flip, generator)
            flips, offsets = flips.to(images.device), offsets.to(images.device)
        for start, stop in self._bounds:
            chosen = order[start:stop]
            batch = images[chosen]
            if self._augment:
                batch = flip_and_crop(batch, flips[chosen], offsets[chosen], info.crop_padding)
            yield to_pixels(batch, info.levels), labels[chosen]

    def _generator(self, purpose: str, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self._seed, purpose, epoch))


def _batch_bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    """Start and stop of every batch; see :class:`Batches` for the last one."""
    starts = list(range(0, count, batch_size))
    if count - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))
