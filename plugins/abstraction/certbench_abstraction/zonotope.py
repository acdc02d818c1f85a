"""Affine bounds forward through a network: cheap where few pixels straddle, since only those are variables.

A value is ``c + G e + d`` with ``|e_i| <= 1``, one e for each straddling pixel of the image, and ``|d| <= r``. Affine layers
act on all parts; a ReLU that may be on or off is enclosed between two parallel lines (Singh et al. 2018, DeepZ). Half their
distance becomes a variable of its own while there are few, and then joins r, which is carried on as an interval. An
image with s variables costs s + 2 passes, where linear bounds backward cost two for each neuron that interval bounds leave
open.

The boxes found this way replace interval bounds in the core's linear bounds, which do the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.bounds import Activation, Box
from certbench.bounds.linear import Refine, Tape
from certbench.errors import UsageError

VARIABLES = 512
"""Most variables of an image; a layer whose open ReLUs would exceed them keeps theirs as intervals."""
SPREAD = 1e-6
"""Inputs that vary less (table rounding, for instance) are no variables."""


@dataclass(frozen=True)
class Zonotope:
    """c and r: (batch, ...); G: (batch, variables, ...)."""

    c: Tensor
    G: Tensor
    r: Tensor

    @property
    def box(self) -> Box:
        return Box(center=self.c, radius=self.G.abs().sum(1) + self.r)

    def affine(self, layer: nn.Conv2d | nn.Linear) -> Zonotope:
        def apply(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if isinstance(layer, nn.Linear):
                return F.linear(h, weight, bias)
            return F.conv2d(h, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

        G = apply(self.G.flatten(0, 1), layer.weight, None)
        return Zonotope(
            apply(self.c, layer.weight, layer.bias),
            G.unflatten(0, self.G.shape[:2]),
            apply(self.r, layer.weight.abs(), None),
        )

    def relu(self) -> Zonotope:
        box = self.box
        open_ = (box.lower < 0) & (box.upper > 0)
        slope = torch.where(open_, box.upper / (box.upper - box.lower), (box.lower >= 0).to(self.c.dtype))
        half = torch.where(open_, -slope * box.lower / 2, 0.0)
        G, r = slope.unsqueeze(1) * self.G, slope * self.r
        if self.G.shape[1] + int(open_.flatten(1).sum(1).max()) > VARIABLES:
            return Zonotope(slope * self.c + half, G, r + half)
        own = over_box(Box(center=half, radius=half), open_)
        return Zonotope(slope * self.c + half, torch.cat([G, own.G], 1), r)

    def flatten(self) -> Zonotope:
        return Zonotope(self.c.flatten(1), self.G.flatten(2), self.r.flatten(1))


def over_box(box: Box, variable: Tensor) -> Zonotope:
    """The box with one variable for each entry of ``variable`` (bool, shape of the box), the others in r.

    Images with fewer variables than the one with most get zeros.
    """
    chosen, radius = variable.flatten(1), box.radius.flatten(1)
    most = max(1, int(chosen.sum(1).max()))
    place = chosen.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    G = radius.new_zeros(len(radius), most, radius.shape[1])
    G.scatter_(2, place.unsqueeze(2), (radius * chosen).gather(1, place).unsqueeze(2))
    rest = torch.where(chosen, 0.0, radius)
    shape = box.shape
    return Zonotope(box.center, G.view(*G.shape[:2], *shape[1:]), rest.view(shape))


def relu_boxes(network: nn.Sequential, z: Zonotope) -> list[Box]:
    """The box of what enters each ReLU, in order.

    Raises:
        UsageError: a layer other than convolution, linear layer, ReLU and flattening.
    """
    found = []
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            z = z.affine(layer)
        elif isinstance(layer, nn.ReLU):
            found.append(z.box)
            z = z.relu()
        elif isinstance(layer, nn.Flatten):
            z = z.flatten()
        elif not isinstance(layer, nn.Identity):
            raise UsageError(
                f"no affine bound goes forward through {type(layer).__name__}; set method.ladder.linear to "
                '"crown-ibp" or "crown"'
            )
    return found


def tighten(network: nn.Sequential) -> Callable[[Box], Refine]:
    """For :func:`certbench.bounds.crown_ibp_margins` and its kin: zonotopes in place of boxes.

    Raises (when it is used):
        UsageError: see :func:`relu_boxes`.
    """

    def over(box: Box) -> Refine:
        boxes = iter(relu_boxes(network, over_box(box, box.radius > SPREAD)))

        def refine(tape: Tape, activation: Activation, known: Box, needs: Callable[[Box], Tensor]) -> Box:
            found = next(boxes)
            return Box(lower=known.lower.maximum(found.lower), upper=known.upper.minimum(found.upper))

        return refine

    return over
