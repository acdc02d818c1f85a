"""Lower bounds of margins over cells: every abstract input of ``lo <= k <= hi`` at once.

All intervals have one width, so the two end points of a pixel move together. Bounding ``U`` and ``L`` as if they were
independent gives that away; here the first layer is read as one of ``[U - L, L]``, in which ``U - L`` hardly varies
(by the rounding of the table alone) and ``L`` carries the summed weight ``W_U + W_L``. Zero padding needs no care, as
both halves are padded alike.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from certbench.bounds import Box, Precision, SoundBox, crown_ibp_margins, crown_margins, trace
from certbench.bounds.graph import Graph, Statistics
from certbench.bounds.sound import Deployment, sound_bounds
from certbench.bounds.sound.deployment import SOUND_RULES
from certbench.bounds.sound.rounding import up
from certbench_abstraction.cells import Cells
from certbench_abstraction.layer import Abstraction
from certbench_abstraction.network import Stem, split
from certbench_abstraction.zonotope import tighten

PART = 8
"""Images whose zonotopes are alive at once."""


def coupled_box(cells: Cells, abstraction: Abstraction) -> Box:
    """The box of ``[U - L, L]`` over cells, (batch, 2 C, ...)."""
    widths = abstraction.upper - abstraction.lower
    lower, upper = torch.take(abstraction.lower, cells.lo), torch.take(abstraction.lower, cells.hi)
    # One width for all pixels: the tables' rounding makes them differ, by 1e-7 at most.
    d_lo, d_hi = (torch.zeros_like(lower) + end for end in (widths.min(), widths.max()))
    return Box(lower=torch.cat([d_lo, lower], 1), upper=torch.cat([d_hi, upper], 1))


def interval_margins(
    stem: Stem, graph: Graph, box: Box, labels: Tensor, statistics: Statistics | None = None
) -> Tensor:
    """``z_y - z_j`` bounded from below over a coupled box, (batch, classes - 1); differentiable in the weights.

    Args:
        graph: f without its first layer ``stem``.
        statistics: as for :meth:`certbench.bounds.Graph.bound`.
    """
    return graph.bound(stem.bound(box, stem.coupled_weight()), statistics).margins(labels)


class CellBounds:
    """Bounds for the deployed classifier, computed in float64.

    Args:
        network: ``abstraction`` then ``network``, in evaluation mode, batch norms folded.
        shape: (C, H, W) of its images.
        precision: which evaluations a float-sound bound covers; None for real arithmetic.

    Raises:
        UsageError: the network cannot be traced, or an operation has no rule.
    """

    def __init__(self, network: nn.Sequential, shape: tuple[int, ...], precision: Precision | None) -> None:
        double = copy.deepcopy(network).double().requires_grad_(False)
        first, f = double[0], double[1]
        assert isinstance(first, Abstraction)  # what build_classifier puts there
        assert isinstance(f, nn.Sequential)
        self.abstraction, self.network, self.precision = first, f, precision
        self.stem, self.body = split(f)
        channels, height, width = shape
        self.shape = (2 * channels, height, width)
        with torch.no_grad():
            hidden = self.stem(torch.zeros(1, *self.shape, dtype=torch.float64, device=first.borders.device))
        self.graph = trace(self.body, tuple(hidden.shape[1:]))
        self._linear: Graph | None = None

    def interval(self, cells: Cells, labels: Tensor) -> Tensor:
        """The smallest margin by coupled cell IBP, (batch,); -inf where a number may overflow."""
        if self.precision is None:
            return interval_margins(self.stem, self.graph, coupled_box(cells, self.abstraction), labels).amin(
                1
            )
        box, unsafe = self._sound_stem(cells, self.precision)
        margins = sound_bounds(self.graph, box, self.precision).margins(labels)
        return torch.where(margins.isnan() | unsafe[:, None], -torch.inf, margins).amin(1)

    def linear(self, cells: Cells, labels: Tensor, kind: str) -> Tensor:
        """The smallest margin by linear bounds over the coupled box, in real arithmetic, (batch,).

        ``crown-ibp`` and ``crown`` are the core's; ``zonotope`` and ``zonotope-crown`` are the same with zonotopes in
        place of interval bounds.

        Raises:
            UsageError: the network has an operation without a rule.
        """
        if self._linear is None:
            self._linear = trace(self._coupled(), self.shape)
        margins = crown_margins if kind.endswith("crown") else crown_ibp_margins
        if not kind.startswith("zonotope"):
            return margins(self._linear, coupled_box(cells, self.abstraction), labels).amin(1)
        boxes = tighten(cast(nn.Sequential, self._linear.network))
        found = [
            margins(
                self._linear, coupled_box(cells[which], self.abstraction), labels[which], tighten=boxes
            ).amin(1)
            for which in torch.arange(len(labels), device=labels.device).split(PART)
        ]
        return torch.cat(found)

    def _coupled(self) -> nn.Sequential:
        """f as a network of ``[U - L, L]``."""
        coupled = copy.deepcopy(self.network)
        stem, _ = split(coupled)
        stem.layer.weight = nn.Parameter(stem.coupled_weight(), requires_grad=False)
        return coupled

    def points(self, k: Tensor, labels: Tensor) -> Tensor:
        """The smallest margin at single abstract inputs k (batch, C, H, W), (batch,); a lower bound if float-sound."""
        if self.precision is not None:
            return self.interval(Cells(k, k), labels)
        return smallest_margin(self.network(self.abstraction.encode(k)), labels)

    def steepest(self, cells: Cells, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which pixel's spread costs interval bounds most, and the cells at which they are least.

        Returns the flat index of a straddling pixel, (batch,), and k (batch, C, H, W).
        """
        box = coupled_box(cells, self.abstraction)
        with torch.enable_grad():
            center, radius = (part.detach().requires_grad_() for part in (box.center, box.radius))
            margins = interval_margins(self.stem, self.graph, Box(center=center, radius=radius), labels)
            slope, cost = torch.autograd.grad(margins.amin(1).sum(), (center, radius))
        slope, cost = slope.chunk(2, 1)[1], -(cost * radius.detach()).chunk(2, 1)[1]
        open_ = (cells.hi > cells.lo).flatten(1)
        pixel = cost.flatten(1).masked_fill(~open_, -torch.inf).argmax(1)
        return pixel, torch.where(slope > 0, cells.lo, cells.hi)

    def _sound_stem(self, cells: Cells, precision: Precision) -> tuple[SoundBox, Tensor]:
        """The first layer's box for every deployed evaluation, and images for which a number may overflow.

        The core's rule bounds ``U`` and ``L`` independently: its radius rho holds ``|W_U| r_U + |W_L| r_L`` besides all
        round-off. Moving together they spread by ``|W_U + W_L| r_L + |W_U| s`` at most, where s is what widths differ
        by, and ``r_U >= r_L - s``. So ``(|W_U| + |W_L| - |W_U + W_L|) r_L - 2 |W_U| s`` may be taken off rho. The factor
        on rho covers the round-off of what is taken off: the tables are float32, so r_L itself is exact.
        """
        table = self.abstraction
        run = Deployment(precision, cells.lo)
        ends = SoundBox(lower=table.encode(cells.lo), upper=table.encode(cells.hi))
        layer = self.stem.layer
        if isinstance(layer, nn.Linear):
            flat = ends.both(lambda part: part.flatten(1))
            box = SOUND_RULES["aten.linear.default"](run, flat, layer.weight, layer.bias)
        else:
            box = SOUND_RULES["aten.conv2d.default"](run, ends, layer.weight, layer.bias, *self.stem.geometry)
        r = (torch.take(table.lower, cells.hi) - torch.take(table.lower, cells.lo)) / 2
        widths = table.upper - table.lower
        s = torch.where(r > 0, widths.max() - widths.min(), 0.0)
        upper, lower = self.stem.halves()
        gained = self.stem.apply(r, upper.abs() + lower.abs() - (upper + lower).abs())
        lost = self.stem.apply(s, 2 * upper.abs())
        factor = precision.cover(layer.weight[0].numel() + 16)
        radius = up((box.radius + lost) * factor - gained)
        return SoundBox(center=box.center, radius=radius), run.unsafe


def smallest_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``z_y - max_{j != y} z_j``, (batch,)."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
