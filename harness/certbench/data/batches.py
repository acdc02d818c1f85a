"""Training batches from images that stay on the device: shuffled, augmented, and the same on every device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from certbench.data.augment import apply, draw
from certbench.data.dataset import Dataset, Split, to_pixels
from certbench.data.info import DatasetInfo
from certbench.errors import UsageError
from certbench.recipe import Augmentation
from certbench.seeding import derive_seed


class Epochs(Protocol):
    """Batches of the training images, epoch by epoch."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of epoch ``number``: pixels, float32 in [0, 1], shape (B, C, H, W); labels, int64, shape (B,)."""


def training_batches(
    dataset: Dataset, batch_size: int, seed: int, augment: bool | Augmentation, device: torch.device | str
) -> Epochs:
    """Batches of a data set's training images, resident on the device or streamed as the set is."""
    if isinstance(dataset.train, Split):
        return Batches(dataset.train, dataset.info, batch_size, seed, augment, device)
    from certbench.data.stream import StreamedBatches

    return StreamedBatches(dataset.train, dataset.info, batch_size, seed, augment, device)


class Batches:
    """Batches of one split, epoch by epoch.

    The uint8 images are kept on ``device``. All random numbers of an epoch come from CPU generators seeded by
    ``seed`` and the epoch's number alone, so that a CPU and a GPU see the same batches, and an epoch can be repeated
    without those before it. ``augment``: as the data set was published, not at all, or as given.

    Every image comes exactly once per epoch. The last batch may be smaller; but a single image left over joins the
    batch before it, because batch normalisation cannot train on one image. ``len()`` counts the batches so formed.

    Raises:
        UsageError: fewer than two images, a batch size below two, or a resized crop of images that are stored small.
    """

    def __init__(
        self,
        split: Split,
        info: DatasetInfo,
        batch_size: int,
        seed: int,
        augment: bool | Augmentation,
        device: torch.device | str,
    ) -> None:
        self._how = chosen_augmentation(info, augment)
        if self._how.resized_crop:
            raise UsageError(
                f"{info.name} is stored at its own size; train.augmentation.resized_crop says nothing to it"
            )
        self._bounds = batch_bounds(len(split), batch_size)
        self._split = split.to(device)
        self._info = info
        self._seed = seed

    def __len__(self) -> int:
        return len(self._bounds)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`Epochs.epoch` says."""
        images, labels, info, how = self._split.images, self._split.labels, self._info, self._how
        order = shuffled(len(labels), self._seed, number).to(images.device)
        changes = how.flip or how.crop_padding or how.erase
        if changes:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "augment", number))
            drawn = draw(len(labels), info.shape[1:], how, generator).to(images.device)
        fills = how.erase or how.crop_fill is not None
        for start, stop in self._bounds:
            chosen = order[start:stop]
            batch = images[chosen]
            if changes and not fills:  # moving bytes is faster than moving float32
                batch = apply(batch, drawn.take(chosen), how)
            batch = to_pixels(batch, info.levels)
            if changes and fills:
                batch = apply(batch, drawn.take(chosen), how)
            yield batch, labels[chosen]


def chosen_augmentation(info: DatasetInfo, augment: bool | Augmentation) -> Augmentation:
    """What a recipe's ``train.augment`` or ``train.augmentation`` stands for."""
    if isinstance(augment, Augmentation):
        return augment
    return info.augmentation if augment else Augmentation()


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch, a function of the three numbers alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, "shuffle", epoch)))


def batch_bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    """Start and stop of every batch; see :class:`Batches` for the last one.

    Raises:
        UsageError: fewer than two images, or a batch size below two.
    """
    if count < 2 or batch_size < 2:
        raise UsageError(
            f"training batches need at least two images each; got {count} images and batch size {batch_size}"
        )
    starts = list(range(0, count, batch_size))
    if count - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))
