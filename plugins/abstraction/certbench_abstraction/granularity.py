"""How many intervals: the released schedule of widths, and the test that ends it (arXiv 2303.11552, released code)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench_abstraction.settings import Search

FINEST = 255
"""The schedule's last number of intervals."""


def widths(radii: Sequence[float], step: float) -> tuple[list[float], list[float]]:
    """Widths d to try, coarse to fine, and the finest one allowed for each radius, all on the [-1, 1] scale.

    The rule of the released driver: 2/2, 2/3, ... as long as d >= 2 eps for the radius whose turn it is, leaving out
    those less than ``step`` below the last; each radius ends with d = 2 / int(1 / eps).
    """
    tried: list[float] = []
    finest: list[float] = []
    last = 2.0
    for i in range(2, FINEST + 1):
        d = 2 / i
        if d < 2 * radii[len(finest)]:
            r = 2 / int(1 / radii[len(finest)])
            if r not in tried:
                tried.append(r)
            finest.append(r)
            if len(finest) == len(radii):
                break
        if last - d >= step:
            tried.append(d)
            last = d
    return tried, finest


def intervals(d: float, floor_division: bool) -> int:
    """The number of intervals of width d: the nearest integer to 2 / d, or what the released code makes of it."""
    return int(2 // d) if floor_division else round(2 / d)


def candidates(search: Search, floor_division: bool, most: int) -> list[int]:
    """Numbers of intervals to try, coarse to fine, each once, none above ``most``."""
    tried, _ = widths(search.radii, search.step)
    return sorted({n for d in tried if 2 <= (n := intervals(d, floor_division)) <= most})


@dataclass(frozen=True)
class Pull:
    """Sums of the positive and of the negative parts (as a positive number) of the loss's slope in some end points."""

    rises: float
    falls: float


def pull(gradients: Iterable[Tensor], channels: slice) -> Pull:
    """Over batches of gradients by the network's input [U, L], shape (batch, 2 C, ...)."""
    rises = falls = 0.0
    for gradient in gradients:
        part = gradient[:, channels].double()
        rises += float(part.clamp_min(0).sum())
        falls += float((-part).clamp_min(0).sum())
    return Pull(rises, falls)


def refine_further(gradients: Sequence[Tensor], released_channels: bool) -> bool:
    """Whether smaller intervals are worth trying: not where descent would move lower ends down and upper ends up.

    As coded upstream, the sums for the lower ends take the upper ends' channels and those for the upper ends take every
    second channel; with one image channel both are the same and the test never stops (``released_channels``).
    """
    channels = gradients[0].shape[1] // 2
    if released_channels:
        lower, upper = slice(0, channels), slice(0, 2 * channels, 2)
    else:
        lower, upper = slice(channels, 2 * channels), slice(0, channels)
    low, up = pull(gradients, lower), pull(gradients, upper)
    return not (low.rises > low.falls and up.rises < up.falls)


def end_point_gradients(classifier: nn.Sequential, batches: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The slope of the mean loss of each batch of raw images by its end points; one sum per channel is kept of each.

    Positive and negative parts are summed before batches are, so each batch gives a tensor (2, 2 C): its positive
    parts, and its negative ones with their sign.
    """
    found = []
    for images, labels in batches:
        z = classifier[0](images).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(classifier[1](z), labels), z)
        flat = gradient.flatten(2).double()
        found.append(torch.stack([flat.clamp_min(0).sum((0, 2)), flat.clamp_max(0).sum((0, 2))]))
    return found
