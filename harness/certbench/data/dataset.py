"""Images and labels as tensors, their digests, and the one way from stored integers to pixels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from certbench.data.info import DatasetInfo
from certbench.data.splits import choose_per_class
from certbench.errors import DataError

if TYPE_CHECKING:
    from certbench.data.stream import Stream


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one part of a data set, in published order.

    ``images``: uint8, shape (N, channels, height, width). ``labels``: int64, shape (N,).

    Raises:
        DataError: another dtype or shape, or unequal numbers of images and labels.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise DataError(
                f"images are uint8 of shape (N, C, H, W), not {images.dtype} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"labels of {len(images)} images are int64 of shape ({len(images)},), "
                f"not {labels.dtype} {tuple(labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same images on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, positions: np.ndarray) -> Split:
        """The images at these positions, copied."""
        chosen = torch.from_numpy(positions)
        return Split(self.images[chosen], self.labels[chosen])

    def slice(self, start: int, stop: int) -> Split:
        """Images ``start`` (included) to ``stop`` (excluded, cut at the end of the split), sharing their memory.

        Raises:
            IndexError: the range is empty or begins outside the split.
        """
        if not 0 <= start < min(stop, len(self)):
            raise IndexError(f"no images {start} to {stop} in a split of {len(self)}")
        return Split(self.images[start:stop], self.labels[start:stop])

    def every(self, stride: int) -> Split:
        """Images 0, ``stride``, 2 ``stride`` and so on, sharing their memory."""
        return Split(self.images[::stride], self.labels[::stride])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A loaded and verified data set; ``digest`` names its content (see :func:`dataset_digest`).

    ``train`` is a :class:`~certbench.data.stream.Stream` where the images are too many for memory.
    """

    info: DatasetInfo
    train: Split | Stream
    test: Split
    digest: str

    @cached_property
    def validation(self) -> np.ndarray:
        """The positions of the training images that ``<name>-validation`` holds out, ascending, int64."""
        labels = self.train.labels.cpu().numpy()
        return choose_per_class(labels, self.info.validation_per_class, "validation ")


def dataset_digest(name: str, *parts: Split) -> str:
    """SHA-256, in hexadecimal, over the name and over dtype, shape and bytes of all images and labels.

    The parts are the training images and the test images, in this order.
    """
    sha = hashlib.sha256(f"{name}\n".encode())
    for split in parts:
        for array, dtype in ((_array(split.images), "|u1"), (_array(split.labels), "<i8")):
            sha.update(f"{dtype} {array.shape}\n".encode())
            sha.update(np.ascontiguousarray(array, dtype=dtype).data)
    return sha.hexdigest()


def image_digests(split: Split) -> list[str]:
    """The first 16 hexadecimal digits of the SHA-256 of each image's uint8 bytes, in order."""
    return [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in _array(split.images)]


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def to_pixels(images: torch.Tensor, levels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Pixels in [0, 1] of uint8 images, in their shape and on their device: the stored integer over ``levels``.

    Raises:
        DataError: the images are not uint8; pixels that were divided once must not be divided again.
    """
    if images.dtype != torch.uint8:
        raise DataError(f"pixels are made from uint8 images, not from {images.dtype}")
    # A tensor on the images' device, because torch divides by a Python number on a GPU as a product with the rounded
    # reciprocal, which changes the last bit of some pixels. The quotient here is the nearest float32 everywhere.
    divisor = torch.tensor(levels, dtype=torch.float32, device=images.device)
    # Always divided in float32 first: the network is deployed on the float32 image, so that image, exactly, is the
    # centre of every certified ball. Dividing in float64 would certify a ball around a slightly different point.
    return (images.to(torch.float32) / divisor).to(dtype)
