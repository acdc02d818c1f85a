"""The two steps that decide every image they finish: enumeration of all reachable cells, and branching on them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from certbench_abstraction.bounds import CellBounds
from certbench_abstraction.cells import Cells

BATCH = 256
"""Abstract inputs evaluated at once. Part of the settings: the shape of a batch decides the last bits of its results."""
NODES = 64
"""Boxes of cells bounded at once when branching."""


@dataclass(frozen=True)
class Enumerated:
    """Per image: the smallest margin over what was evaluated, the input k that has it, and how many those were.

    Where the margin is positive, all inputs of the image were evaluated; the others stop at their first failure.
    """

    margin: Tensor
    worst: Tensor
    evaluated: Tensor


def enumerate_cells(bounds: CellBounds, cells: Cells, labels: Tensor) -> Enumerated:
    """Evaluate every abstract input of every image, in full batches across images; counts must be small."""
    margin = torch.full_like(cells.count, torch.inf)
    worst, evaluated = cells.lo.clone(), torch.zeros_like(labels)
    for image, k in _batches(cells, margin):
        found = bounds.points(k, labels[image])
        lowest = torch.full_like(margin, torch.inf).scatter_reduce(0, image, found, "amin")
        better = lowest < margin
        torch.minimum(
            margin, lowest, out=margin
        )  # in place: what has failed drops out of the batches to come
        place = (better[image] & (found == lowest[image])).nonzero().squeeze(1)
        worst[image[place]] = k[place]
        evaluated += torch.bincount(image, minlength=len(labels))
    return Enumerated(margin, worst, evaluated)


def _batches(cells: Cells, margin: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and inputs k of them, ``BATCH`` at a time; an image whose margin has become 0 or less drops out."""
    ends = cells.count.long().cumsum(0)
    total, at = int(ends[-1]), 0
    radix, position = _straddling(cells)
    while at < total:
        number = torch.arange(at, min(at + 4 * BATCH, total), device=ends.device)
        image = torch.searchsorted(ends, number, right=True)
        alive = (margin[image] > 0).nonzero().squeeze(1)
        if not len(alive):
            at += len(image)
            continue
        chosen = alive[:BATCH]
        at += int(chosen[-1]) + 1
        image, number = image[chosen], number[chosen]
        yield (
            image,
            _decode(number - (ends[image] - cells.count.long()[image]), image, cells, radix, position),
        )


def _straddling(cells: Cells) -> tuple[Tensor, Tensor]:
    """Per image the number of cells of its straddling pixels, padded with 1, and where they are, (batch, most)."""
    wide = (cells.hi - cells.lo + 1).flatten(1)
    most = int((wide > 1).sum(1).max())
    return wide.topk(most, dim=1) if most else (wide[:, :0], wide[:, :0])


def _decode(number: Tensor, image: Tensor, cells: Cells, radix: Tensor, position: Tensor) -> Tensor:
    """The inputs of these numbers within their images: mixed-radix digits added to the lower cells."""
    k = cells.lo[image].flatten(1)
    digits = []
    for column in range(radix.shape[1]):
        base = radix[image, column]
        digits.append(number % base)
        number = number // base
    if digits:
        k = k.scatter_add(1, position[image], torch.stack(digits, 1))
    return k.view(len(image), *cells.lo.shape[1:])


@dataclass(frozen=True)
class Branched:
    """``margin``: the proved lower bound, or None where branching gave up; ``worst``: a failing input, or None."""

    margin: float | None
    worst: Tensor | None
    passes: int


def branch(bounds: CellBounds, cells: Cells, label: Tensor, passes: int, seconds: float) -> Branched:
    """Split the cells of one image (batch of 1) until all parts are proved, one fails, or a limit is reached.

    A part that interval bounds leave open is first tried at the cells where they are least, then halved at the pixel
    whose spread costs them most.
    """
    deadline = time.monotonic() + seconds
    stack, proved, spent = [cells], torch.inf, 0
    while stack and spent < passes and time.monotonic() < deadline:
        part = _pop(stack)
        labels = label.expand(len(part.lo))
        margins = bounds.interval(part, labels)
        spent += len(labels)
        proved = min([proved, *margins[margins > 0].tolist()])
        open_ = (~(margins > 0)).nonzero().squeeze(1)
        if not len(open_):
            continue
        part, labels = part[open_], labels[open_]
        if (part.count == 1).any():  # a single input: nothing is left to split
            return Branched(None, part.lo[part.count == 1][:1], spent)
        pixel, least = bounds.steepest(part, labels)
        failing = ~(bounds.points(least, labels) > 0)
        spent += 2 * len(labels)
        if failing.any():
            return Branched(None, least[failing][:1], spent)
        stack += _halves(part, pixel)
    return Branched(None if stack else float(proved), None, spent)


def _pop(stack: list[Cells]) -> Cells:
    """Up to ``NODES`` boxes from the top: depth first, so the stack stays small."""
    top = [stack.pop()]
    while stack and sum(len(part.lo) for part in top) + len(stack[-1].lo) <= NODES:
        top.append(stack.pop())
    return Cells(torch.cat([part.lo for part in top]), torch.cat([part.hi for part in top]))


def _halves(part: Cells, pixel: Tensor) -> list[Cells]:
    lo, hi, column = part.lo.flatten(1), part.hi.flatten(1), pixel[:, None]
    middle = (lo.gather(1, column) + hi.gather(1, column)) // 2
    left, right = hi.scatter(1, column, middle), lo.scatter(1, column, middle + 1)
    shape = part.lo.shape
    return [Cells(part.lo, left.view(shape)), Cells(right.view(shape), part.hi)]
