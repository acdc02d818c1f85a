"""Noise as a function of run, image, purpose and place in the image's own stream, and of nothing else.

Draws come in blocks of :data:`BLOCK`. Every block has a counter-based stream of its own (Philox), so that order,
packing and interruptions cannot change it. CPU and GPU have different streams; the key names which.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from certbench.errors import DataError
from certbench.seeding import noise_key, noise_words
from certbench.smoothing.thresholds import BITS, noise_thresholds

BLOCK = 100
"""Draws that share a stream. The sequential certifier looks at multiples of it."""


class Purpose(IntEnum):
    """Streams of one image that must be independent of each other."""

    PROBE = 0
    SELECTION = 1
    ESTIMATION = 2
    PREDICTION = 3


class Streams:
    """The streams of one run on one kind of device; ``key`` names them in every row."""

    def __init__(self, run_id: str, device: torch.device) -> None:
        self.device = device
        self._words = noise_words(run_id)
        self.key = noise_key(run_id, device.type)
        self._on_device = torch.Generator(device)

    def normal(self, out: Tensor, sigma: float, image: int, purpose: Purpose, block: int) -> None:
        """Fill a contiguous float32 tensor with N(0, sigma^2)."""
        if self.device.type == "cpu":
            generator = np.random.Generator(self._philox(image, purpose, block))
            generator.standard_normal(out=out.numpy(), dtype=np.float32)
            out.mul_(sigma)
        else:
            out.normal_(0.0, sigma, generator=self._seeded(image, purpose, block))

    def integers(self, shape: torch.Size, image: int, purpose: Purpose, block: int) -> Tensor:
        """Uniform integers of :data:`BITS` bits, int64."""
        if self.device.type == "cpu":
            raw = self._philox(image, purpose, block).random_raw(shape.numel())
            return torch.from_numpy((raw >> np.uint64(64 - BITS)).view(np.int64)).view(shape)
        found = torch.empty(shape, dtype=torch.int64, device=self.device)
        return found.random_(generator=self._seeded(image, purpose, block)) >> (63 - BITS)

    def _philox(self, image: int, purpose: Purpose, block: int) -> np.random.Philox:
        # The first word counts within the block, and the others keep blocks apart: no two can overlap.
        counter = np.array([0, block, image, purpose], dtype=np.uint64)
        return np.random.Philox(key=np.frombuffer(self._words, dtype=np.uint64), counter=counter)

    def _seeded(self, image: int, purpose: Purpose, block: int) -> torch.Generator:
        text = b"%s/%d/%d/%d" % (self._words, image, purpose, block)
        return self._on_device.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1)


class Noise(Protocol):
    """What makes noisy copies of an image."""

    key: str

    def draw(self, out: Tensor, image: Tensor, index: int, purpose: Purpose, block: int) -> bool:
        """Fill ``out``, shape (BLOCK, height, width, channels), with noisy copies of ``image``.

        False where exactness cannot be vouched for; the caller then counts every draw of the block as a miss.
        """


class GaussianNoise:
    """``x + N(0, sigma^2)`` in float32, not clamped."""

    def __init__(self, streams: Streams, sigma: float) -> None:
        self.key, self._streams, self._sigma = streams.key, streams, sigma

    def draw(self, out: Tensor, image: Tensor, index: int, purpose: Purpose, block: int) -> bool:
        self._streams.normal(out, self._sigma, index, purpose, block)
        out += image
        return True


class ExactNoise:
    """Gaussian noise rounded to the grid of pixel values, sampled exactly (Voracek and Hein, arXiv 2207.07209).

    The base classifier is the network after clipping to [-reach, 1 + reach] and rounding to multiples of 1/levels. Its
    noisy inputs then have a discrete distribution, drawn by comparing uniform integers with exact thresholds.
    """

    def __init__(self, streams: Streams, sigma: float, levels: int) -> None:
        self.key, self._streams, self._levels = streams.key, streams, levels
        self._reach = levels * max(1, int(6 * sigma))
        self._most = self._reach + levels  # noise beyond it is clipped wherever the image is
        device = streams.device
        self._thresholds = torch.from_numpy(noise_thresholds(sigma, levels, self._most)).to(device)
        # Where one noise value takes a whole range of leading bits, these decide; the rest is searched for.
        edges = torch.arange(1 << _GUIDE, device=device) << (BITS - _GUIDE)
        last = edges + ((1 << (BITS - _GUIDE)) - 1)
        low, high = (torch.searchsorted(self._thresholds, ends) for ends in (edges, last))
        clear = (low == high) & ~torch.isin(last, self._thresholds)
        self._guide = torch.where(clear, low - self._most, _UNCLEAR).to(torch.int32)
        self._divisor = torch.tensor(levels, dtype=torch.float32, device=device)

    def draw(self, out: Tensor, image: Tensor, index: int, purpose: Purpose, block: int) -> bool:
        bits = self._streams.integers(out.shape, index, purpose, block).flatten()
        noise = self._guide[bits >> (BITS - _GUIDE)]
        open_ = (noise == _UNCLEAR).nonzero().squeeze(1)
        searched = bits[open_]
        found = torch.searchsorted(self._thresholds, searched)
        noise[open_] = (found - self._most).to(torch.int32)
        touched = self._thresholds[found.clamp_max(len(self._thresholds) - 1)] == searched
        pixels = (image * self._levels).round().to(torch.int32) + noise.view(out.shape)
        torch.div(pixels.clamp_(-self._reach, self._levels + self._reach), self._divisor, out=out)
        return not bool(touched.any())

    @staticmethod
    def check(pixels: Tensor, levels: int) -> None:
        """
        Raises:
            DataError: a pixel is no multiple of 1 / levels.
        """
        off = ((pixels * levels).round() / levels != pixels).flatten(1).any(1)
        if off.any():
            raise DataError(
                f"image {int(off.nonzero()[0])} does not lie on the grid of 1/{levels}: exact noise needs images that "
                "do; round them first, or set certify.smoothing.exact_noise = false"
            )


_GUIDE = 16
"""Leading bits of a uniform integer that settle most draws."""
_UNCLEAR = -(2**31)
