"""Linear (CROWN-type) bounds: margins as linear functions of the input, concretised on its box.

The margins ``C z`` are followed backward from the logits to the input, replacing each activation by its lines on the
interval that it can take (``relaxations``). The bounds differ in where those intervals come from:

* :func:`crown_ibp_margins`: interval bounds. One backward pass in all (arXiv 1906.06316).
* :func:`crown_margins`: for each neuron that interval bounds leave open, a backward pass of its own (arXiv 1811.00866).
* ``alpha.alpha_crown_margins``: as before, and the lower lines of the ReLUs optimised.

Interval bounds say which neurons are open; for those the linear bound is taken as it is, not intersected with the
interval, which is what the reference implementation does and what the oracle arrays of the tests hold. Everything is
differentiable in the network's parameters.

Memory: coefficients have one entry per image, row and neuron. Images and rows go through in parts such that those
alive at once stay under ``MEMORY_CAP``; a single row of a single image always goes through.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from certbench.bounds.backward import Activation
from certbench.bounds.box import Box
from certbench.bounds.graph import Graph, Statistics
from certbench.bounds.precision import Precision
from certbench.bounds.sound.deployment import Deployment
from certbench.bounds.specification import difference_rows
from certbench.bounds.tape import Refine, Tape, record

MEMORY_CAP = 2**30
"""Bytes of linear coefficients alive at once, in each worker."""
Tighten = Callable[[Box], Refine]
"""For a box of inputs: what is known besides interval bounds of the boxes that enter relaxed operations."""
ALIVE = 6
"""Tensors of the largest layer's size that one step of a backward pass holds, residual branches included."""


def crown_ibp_margins(
    graph: Graph,
    box: Box,
    labels: Tensor,
    statistics: Statistics | None = None,
    memory: int = MEMORY_CAP,
    precision: Precision | None = None,
    tighten: Tighten | None = None,
) -> Tensor:
    """Lower bounds of ``z_y - z_j`` for the wrong classes j in ascending order, shape (batch, classes - 1).

    The relaxed operations are enclosed on their interval bounds. Usually tighter than interval bounds, not always.

    Args:
        box: the inputs, shape (batch, channels, height, width) in raw pixels.
        labels: (batch,).
        statistics: what training-mode batch norms use: those of the clean pass of the same step.
        memory: bytes of coefficients alive at once. What autograd keeps for a backward pass comes on top.
        precision: bound what any deployment at this precision computes, rather than real arithmetic; the box is then a
            :class:`~certbench.bounds.sound.SoundBox`, and the bounds are NaN where a number may overflow.
        tighten: boxes from elsewhere, which must hold at the same precision.

    Raises:
        UsageError: an operation has no interval or no backward rule.
    """
    plan = Plan(graph, box, statistics, memory, precision, tighten)
    return torch.cat([plan.margins(plan.record(part), wanted) for part, wanted in plan.parts(box, labels)])


def crown_margins(
    graph: Graph,
    box: Box,
    labels: Tensor,
    statistics: Statistics | None = None,
    memory: int = MEMORY_CAP,
    precision: Precision | None = None,
    tighten: Tighten | None = None,
) -> Tensor:
    """As :func:`crown_ibp_margins`, with the open neurons of every layer bounded by a backward pass of their own."""
    plan = Plan(graph, box, statistics, memory, precision, tighten)
    return torch.cat([plan.margins(plan.refined(part), wanted) for part, wanted in plan.parts(box, labels)])


class Plan:
    """How a batch goes through: what is bounded, and how many images and rows at once.

    Coefficients stay under ``memory`` bytes. ``alive`` tensors are held at once: of the largest layer's size, or with
    ``kept`` of the size of all layers together, because autograd keeps them.
    """

    def __init__(
        self,
        graph: Graph,
        box: Box,
        statistics: Statistics | None,
        memory: int,
        precision: Precision | None = None,
        tighten: Tighten | None = None,
        kept: bool = False,
    ) -> None:
        self.graph, self.statistics, self.memory, self.precision = graph, statistics, memory, precision
        self.tighten = tighten
        with torch.no_grad():
            tape = record(graph, _images(box, 0, 1), statistics)
        self.longest = max(*tape.neurons(), tape.logits[1])
        entries = sum(tape.neurons()) if kept else max(tape.neurons())
        self.per_row = ALIVE * entries * box.lower.element_size()
        self.rows_wanted = max(1, tape.logits[1] - 1)

    def parts(self, box: Box, labels: Tensor) -> list[tuple[Box, Tensor]]:
        """The batch cut such that all margins of a part go through at once, if those of one image do."""
        count = max(1, self.memory // (self.per_row * self.rows_wanted))
        return [
            (_images(box, start, start + count), labels[start : start + count])
            for start in range(0, len(labels), count)
        ]

    def rows(self, images: int) -> int:
        return int(max(1, self.memory // (self.per_row * images)))

    def record(self, box: Box) -> Tape:
        """The tape of a part of the batch."""
        return self._tape(box, self.tighten(box) if self.tighten is not None else None)

    def refined(self, box: Box) -> Tape:
        """The tape with the boxes of open neurons tightened by backward passes."""
        first = self.tighten(box) if self.tighten is not None else None

        def refine(tape: Tape, activation: Activation, known: Box, needs: Callable[[Box], Tensor]) -> Box:
            if first is not None:
                known = first(tape, activation, known, needs)
            return self._refine(tape, activation, known, needs)

        return self._tape(box, refine)

    def _tape(self, box: Box, refine: Refine | None) -> Tape:
        run = Deployment(self.precision, box.lower, self.longest) if self.precision is not None else None
        return record(self.graph, box, self.statistics, refine, run)

    def margins(self, tape: Tape, labels: Tensor) -> Tensor:
        """By the adaptive lower lines, shape (batch, classes - 1)."""
        parts = torch.split(margin_rows(tape, labels), self.rows(len(labels)), 1)
        return tape.proved(torch.cat([tape.lower_bound(self.graph.result, part) for part in parts], 1))

    def _refine(self, tape: Tape, activation: Activation, known: Box, needs: Callable[[Box], Tensor]) -> Box:
        if tape.interval_is_exact(activation.name):
            return known
        open_ = needs(known).flatten(1)
        most = int(open_.sum(1).max())
        if most == 0:
            return known
        chosen = open_.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
        lower, upper = [], []
        for index in torch.split(chosen, self.rows(len(chosen)), 1):
            unit = known.lower.new_zeros(*index.shape, open_.shape[1])
            unit = unit.scatter_(2, index.unsqueeze(2), 1.0).view(*index.shape, *known.shape[1:])
            lower.append(tape.lower_bound(activation.name, unit))
            upper.append(-tape.lower_bound(activation.name, -unit))

        def tightened(old: Tensor, new: list[Tensor]) -> Tensor:
            flat = old.flatten(1)
            return torch.where(open_, flat.scatter(1, chosen, torch.cat(new, 1)), flat).view_as(old)

        return type(known)(lower=tightened(known.lower, lower), upper=tightened(known.upper, upper))


def _images(box: Box, start: int, stop: int) -> Box:
    return box.both(lambda part: part[start:stop])


def margin_rows(tape: Tape, labels: Tensor) -> Tensor:
    """C, shape (batch, classes - 1, classes)."""
    return difference_rows(labels, tape.logits[1], tape.box.lower.dtype)
