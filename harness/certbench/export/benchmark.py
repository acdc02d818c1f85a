"""A folder that complete verifiers take as it is: the network, one property per image, and the list of instances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from certbench.data.catalog import DatasetInfo
from certbench.data.dataset import Split, to_pixels
from certbench.errors import UsageError
from certbench.export.files import write_folder
from certbench.export.vnnlib import property_text
from certbench.recipe import Threat

CHUNK = 250
"""Images classified at a time."""
TIMEOUT = 300
"""Seconds a verifier may spend on one image, unless told otherwise."""


@dataclass(frozen=True)
class Benchmark:
    """The images with a property, by index into the test set, and those looked at and left out as misclassified."""

    indices: tuple[int, ...]
    misclassified: tuple[int, ...]


def choose_images(
    network: nn.Module,
    split: Split,
    info: DatasetInfo,
    indices: Sequence[int] | None = None,
    limit: int | None = None,
) -> Benchmark:
    """The first ``limit`` images, of all or of ``indices``, that the network classifies correctly.

    Correct is a label whose float32 logit is strictly above every other; a tie is none. ``network`` takes raw pixels
    on the device of ``split`` and is in evaluation mode.

    Raises:
        UsageError: an index outside the split or given twice, a limit below one, or no correct image.
    """
    wanted = list(range(len(split)) if indices is None else indices)
    outside = [index for index in wanted if not 0 <= index < len(split)]
    if outside:
        raise UsageError(f"image {outside[0]} is not in the test set, which has images 0 to {len(split) - 1}")
    if len(set(wanted)) < len(wanted):
        raise UsageError("an image is named twice")
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} images leaves nothing to export")
    right: list[int] = []
    wrong: list[int] = []
    for index, correct in _classified(network, split, info, wanted):
        (right if correct else wrong).append(index)
        if len(right) == limit:
            break
    if not right:
        raise UsageError(
            f"none of the {len(wanted)} images is classified correctly, so there is nothing to verify"
        )
    return Benchmark(tuple(right), tuple(wrong))


def _classified(
    network: nn.Module, split: Split, info: DatasetInfo, wanted: Sequence[int]
) -> Iterator[tuple[int, bool]]:
    for start in range(0, len(wanted), CHUNK):
        part = list(wanted[start : start + CHUNK])
        labels = split.labels[part, None]
        with torch.no_grad():
            logits = network(to_pixels(split.images[part], info.levels))
        others = logits.scatter(1, labels, -torch.inf).amax(1)
        correct = logits.gather(1, labels).squeeze(1) > others
        yield from zip(part, correct.tolist(), strict=True)


def write_benchmark(
    folder: Path,
    onnx: bytes,
    split: Split,
    info: DatasetInfo,
    threat: Threat,
    indices: Sequence[int],
    *,
    notes: Sequence[str] = (),
    timeout: int = TIMEOUT,
    force: bool = False,
) -> None:
    """Write ``onnx/network.onnx``, ``vnnlib/image-<index>.vnnlib`` and ``instances.csv``, all of them or nothing.

    ``onnx`` is the network from :func:`certbench.export.onnx_bytes`; ``indices`` are images of ``split``, usually from
    :func:`choose_images`; ``notes`` head every property.

    Raises:
        UsageError: a norm without boxes, or a folder that may not be replaced.
        RunError: the folder cannot be written.
    """
    if threat.norm != "linf" or threat.radius is None:
        raise UsageError(f"VNN-LIB export describes L-inf balls; this run's norm is {threat.norm}")
    radius = threat.radius
    names = {index: f"vnnlib/image-{index:05d}.vnnlib" for index in indices}

    def files() -> Iterator[tuple[str, bytes]]:
        yield "onnx/network.onnx", onnx
        for index, name in names.items():
            image = to_pixels(split.images[index], info.levels).cpu()
            own = [*notes, f"Image {index} of the test set of {info.name}, counted from 0."]
            text = property_text(image, int(split.labels[index]), info.classes, radius, own)
            yield name, text.encode("ascii")
        lines = [f"onnx/network.onnx,{name},{timeout}\n" for name in names.values()]
        yield "instances.csv", "".join(lines).encode("ascii")

    write_folder(folder, files(), force=force)
