"""Training images that are too many for memory: read, decoded and cropped by worker processes, ahead of the training.

The uint8 crops arrive in pinned memory and become pixels on the device. Each crop is drawn from a generator seeded by
seed, epoch and the image's index alone, so that neither the number of workers nor the device changes a batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from certbench.data.batches import batch_bounds, chosen_augmentation, shuffled
from certbench.data.dataset import Split, to_pixels
from certbench.data.images import decode_image
from certbench.data.info import DatasetInfo
from certbench.data.manifest import Manifest
from certbench.errors import DataError, UsageError
from certbench.recipe import Augmentation
from certbench.seeding import derive_seed

Crop = tuple[Tensor, int]
PREFETCH = 4
"""Batches that each worker prepares ahead."""
SHORTER_SIDE = 256 / 224
"""Of a test photograph, as a multiple of the side of the crop in its middle."""


@dataclass(frozen=True, eq=False)
class Stream:
    """Encoded images in published order, read one by one.

    ``positions``, int64, says which images of the manifest these are; ``labels``: int64, shape (N,). ``side`` is that
    of the square crops.
    """

    manifest: Manifest
    positions: np.ndarray
    side: int

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.manifest.labels[self.positions])

    def __len__(self) -> int:
        return len(self.positions)

    def image(self, index: int) -> Image.Image:
        """The photograph in RGB, at its stored size.

        Raises:
            DataError: it is missing or broken; names the file.
        """
        position = int(self.positions[index])
        return decode_image(self.manifest.where(position), self.manifest.read(position))

    def test_split(self) -> Split:
        """All images as a network is tested on them: scaled, and the middle cut out; uint8 (N, 3, side, side)."""
        images = torch.empty(len(self), 3, self.side, self.side, dtype=torch.uint8)

        def fill(index: int) -> None:
            images[index] = middle(self.image(index), self.side)

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding does not hold the interpreter's lock
            for _ in pool.map(fill, range(len(self))):
                pass
        return Split(images, self.labels)

    def hold_out(self, chosen: np.ndarray) -> tuple[Stream, Stream]:
        """The other images, and the chosen ones."""
        rest = np.setdiff1d(np.arange(len(self)), chosen)
        return replace(self, positions=self.positions[rest]), replace(self, positions=self.positions[chosen])


def middle(image: Image.Image, side: int) -> Tensor:
    """The image scaled to a shorter side of 256/224 of ``side``, and its middle; uint8 (3, side, side)."""
    from torchvision.transforms import v2

    scaled = v2.functional.resize(image, [round(side * SHORTER_SIDE)])
    cut: Tensor = v2.functional.pil_to_tensor(v2.functional.center_crop(scaled, [side, side]))
    return cut


class StreamedBatches:
    """Batches of a stream, epoch by epoch, with the order and the rules of :class:`~certbench.data.batches.Batches`.

    Args:
        workers: processes that decode; by default one per core that this process may use. 0 decodes in this process.

    Raises:
        UsageError: an augmentation that needs images resident in memory, or too few images or too small batches.
    """

    def __init__(
        self,
        stream: Stream,
        info: DatasetInfo,
        batch_size: int,
        seed: int,
        augment: bool | Augmentation,
        device: torch.device | str,
        workers: int | None = None,
    ) -> None:
        self._how = chosen_augmentation(info, augment)
        if self._how.crop_padding or self._how.erase:
            raise UsageError(
                f"{info.name} is streamed: train.augmentation takes flip and resized_crop there, nothing else"
            )
        self._bounds = batch_bounds(len(stream), batch_size)
        self._stream, self._info, self._seed = stream, info, seed
        self._device = torch.device(device)
        self._workers = _cores() if workers is None else workers

    def __len__(self) -> int:
        return len(self._bounds)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`~certbench.data.batches.Epochs.epoch` says.

        Raises:
            DataError: an image is missing or broken; names the file.
        """
        order = shuffled(len(self._stream), self._seed, number).tolist()
        loader: DataLoader[Crop] = DataLoader(
            _Crops(self._stream, self._how, self._seed, number),  # type: ignore[arg-type]  # a map-style data set by its methods
            batch_sampler=[order[start:stop] for start, stop in self._bounds],
            num_workers=self._workers,
            prefetch_factor=PREFETCH if self._workers else None,
            collate_fn=_collate,
            generator=torch.Generator(),  # else the loader would draw from the global one
            pin_memory=self._device.type == "cuda",
        )
        for batch in loader:
            if isinstance(batch, str):
                raise DataError(batch)
            images, labels = (part.to(self._device, non_blocking=True) for part in batch)
            yield to_pixels(images, self._info.levels), labels


class _Crops:
    """Runs in the workers. What goes wrong comes back as text, since exceptions lose their class on the way."""

    def __init__(self, stream: Stream, how: Augmentation, seed: int, epoch: int) -> None:
        self.stream, self.how, self.seed, self.epoch = stream, how, seed, epoch
        self.labels = stream.manifest.labels[stream.positions]

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, index: int) -> Crop | str:
        try:
            image = self.stream.image(index)
        except DataError as error:
            return str(error)
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            torch.manual_seed(derive_seed(self.seed, "augment", self.epoch, index))
            return random_crop(image, self.stream.side, self.how), int(self.labels[index])


def random_crop(image: Image.Image, side: int, how: Augmentation) -> Tensor:
    """A random part of the image, scaled and flipped as ``how`` says; uint8 (3, side, side)."""
    from torchvision.transforms import v2

    if how.flip and torch.rand(()) < 0.5:
        image = v2.functional.horizontal_flip(image)
    if how.resized_crop is None:
        return middle(image, side)
    crop: Tensor = v2.functional.pil_to_tensor(v2.RandomResizedCrop(side, scale=how.resized_crop)(image))
    return crop


def _collate(crops: list[Crop | str]) -> tuple[Tensor, Tensor] | str:
    failures = [crop for crop in crops if isinstance(crop, str)]
    if failures:
        return failures[0]
    images, labels = zip(*crops, strict=True)
    return torch.stack(images), torch.tensor(labels)


def _cores() -> int:
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
