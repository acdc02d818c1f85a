"""Counting classes of noisy images: draws of many images share batches of one shape, and counts stay on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from certbench.errors import RunError
from certbench.models.fold import deployed_network
from certbench.models.kernels import one_thread_each
from certbench.smoothing.noise import BLOCK, Noise, Purpose

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Arithmetic a smoothed network can be run in. The noise is float32 whatever the network is."""

PROBE_TOLERANCE = 1e-4
"""How far logits may move, as a share of the largest, when other images of the batch change."""


@dataclass(frozen=True)
class Work:
    """Draws ``start`` to ``stop`` of one image's stream; ``image`` is a place among the sampler's images.

    ``start`` is a multiple of :data:`BLOCK`.
    """

    image: int
    purpose: Purpose
    start: int
    stop: int


@dataclass(frozen=True)
class _Slot:
    """A block's place in a batch: ``valid`` of its draws count, for entry ``row`` of the work."""

    row: int
    work: Work
    block: int
    valid: int


class Sampler:
    """Class counts of one network's noisy inputs.

    Args:
        network: trained; what is run is its deployed form in evaluation mode, in channels-last layout.
        pixels: images in raw pixels, float32, shape (images, channels, height, width).
        index: the number of each image in its data set, which keys its noise.
        batch: noisy images per pass, a multiple of :data:`BLOCK`. Every pass has this shape.
        deploy: the arithmetic of the network, from :data:`DTYPES`.
        compile: run it through ``torch.compile``.

    ``key`` names the noise, ``classes`` is the number of logits. ``broken`` counts the draws with a NaN among their logits.

    Raises:
        RunError: the network's output is no table of logits, or depends on what else is in the batch.
    """

    def __init__(
        self,
        network: nn.Module,
        pixels: Tensor,
        index: NDArray[np.int64],
        noise: Noise,
        batch: int,
        deploy: str = "float32",
        compile: bool = False,
    ) -> None:
        if deploy not in DTYPES:
            raise RunError(f"a smoothed network runs in {', '.join(DTYPES)}, not in {deploy}")
        device, self._dtype = pixels.device, DTYPES[deploy]
        deployed = deployed_network(network).to(device=device, dtype=self._dtype)
        deployed = deployed.to(memory_format=torch.channels_last)
        self._network: Callable[[Tensor], Tensor] = torch.compile(deployed) if compile else deployed
        self._pixels = pixels.permute(0, 2, 3, 1).contiguous()
        self._index, self._noise, self._batch = index, noise, batch
        buffers = torch.get_num_threads() if device.type == "cpu" else 1
        self._buffers: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(buffers):
            self._buffers.put(torch.zeros((batch, *self._pixels.shape[1:]), device=device))
        self._workers: Executor | None = None
        self.key = noise.key
        self.classes = 0
        self.broken = 0

    @contextmanager
    def running(self) -> Iterator[Sampler]:
        """Workers and kernels for :meth:`counts`, for as long as it lasts; begins with a probe of the network."""
        flags = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        )
        with flags, one_thread_each(self._pixels.device) as self._workers:
            self.classes = self._workers.submit(self._probe).result()
            yield self

    def counts(self, work: Sequence[Work]) -> NDArray[np.int64]:
        """How often each class came up, shape (len(work), classes + 1).

        The last column holds draws without a class: NaN among the logits, or two equal largest ones. They hit nothing.
        """
        assert self._workers is not None, "counts are made inside running()"
        slots = list(_blocks(work))
        step = self._batch // BLOCK
        batches = [slots[first : first + step] for first in range(0, len(slots), step)]
        total = torch.zeros((len(work), self.classes + 1), dtype=torch.int64, device=self._pixels.device)
        broken = torch.zeros((), dtype=torch.int64, device=total.device)
        for part, (found, nans) in zip(batches, self._workers.map(self._pass, batches), strict=True):
            rows = torch.tensor([slot.row for slot in part], device=total.device)
            total.index_add_(0, rows, found)
            broken += nans
        self.broken += int(broken)
        return total.numpy(force=True)

    def _pass(self, slots: Sequence[_Slot]) -> tuple[Tensor, Tensor]:
        """Counts of one batch, shape (len(slots), classes + 1), and its draws with NaN."""
        buffer = self._buffers.get()
        try:
            with torch.inference_mode():
                exact = self._fill(buffer, slots)
                return self._count(self._logits(buffer), slots, exact)
        finally:
            self._buffers.put(buffer)

    def _fill(self, buffer: Tensor, slots: Sequence[_Slot]) -> list[bool]:
        exact = []
        for place, slot in enumerate(slots):
            out = buffer[place * BLOCK : (place + 1) * BLOCK]
            image = slot.work.image
            number = int(self._index[image])
            exact.append(self._noise.draw(out, self._pixels[image], number, slot.work.purpose, slot.block))
        buffer[len(slots) * BLOCK :] = 0
        return exact

    def _logits(self, buffer: Tensor) -> Tensor:
        return self._network(buffer.permute(0, 3, 1, 2).to(self._dtype))

    def _count(self, logits: Tensor, slots: Sequence[_Slot], exact: Sequence[bool]) -> tuple[Tensor, Tensor]:
        logits = logits[: len(slots) * BLOCK]
        largest = logits == logits.amax(1, keepdim=True)  # nowhere, where there is a NaN
        classes = torch.where(largest.sum(1) == 1, largest.int().argmax(1), self.classes).view(-1, BLOCK)
        if not all(exact):
            classes[torch.tensor([not good for good in exact], device=logits.device)] = self.classes
        valid = torch.tensor([slot.valid for slot in slots], device=logits.device)
        counted = torch.arange(BLOCK, device=logits.device) < valid[:, None]
        found = torch.zeros((len(slots), self.classes + 1), dtype=torch.int64, device=logits.device)
        found.scatter_add_(1, classes, counted.long())
        nans = logits.isnan().any(1).view(-1, BLOCK) & counted
        return found, nans.sum()

    def _probe(self) -> int:
        """The number of classes.

        Raises:
            RunError: the output is of a wrong shape, changes from pass to pass, or depends on other images.
        """
        buffer = self._buffers.get()
        try:
            with torch.inference_mode():
                step = self._batch // BLOCK
                works = [Work(i % len(self._index), Purpose.PROBE, 0, BLOCK) for i in range(step)]
                self._fill(buffer, [_Slot(i, work, i, BLOCK) for i, work in enumerate(works)])
                first = self._logits(buffer)
                if first.ndim != 2 or len(first) != self._batch or first.shape[1] < 2:
                    raise RunError(
                        f"the network gives shape {tuple(first.shape)} for {self._batch} images; it must give "
                        "logits of shape (images, classes) with two classes or more"
                    )
                kept = self._batch // 2
                again = self._logits(buffer)
                buffer[kept:] = buffer[kept:].flip(0) * 0.5 + 0.25
                changed = self._logits(buffer)
        finally:
            self._buffers.put(buffer)
        if not _agree(first, again):
            raise RunError(
                "the network gives other logits for the same batch a second time; smoothing needs a function"
            )
        if not _agree(first[:kept], changed[:kept]):
            raise RunError(
                "the network's logits for an image depend on the other images in the batch; it cannot be smoothed"
            )
        return first.shape[1]


def _agree(one: Tensor, two: Tensor) -> bool:
    one, two = one.float(), two.float()
    scale = float(one.abs().nan_to_num(0.0, 0.0).max())
    return torch.allclose(one, two, rtol=0.0, atol=PROBE_TOLERANCE * scale, equal_nan=True)


def _blocks(work: Sequence[Work]) -> Iterator[_Slot]:
    for row, item in enumerate(work):
        for first in range(item.start, item.stop, BLOCK):
            yield _Slot(row, item, first // BLOCK, min(BLOCK, item.stop - first))
