"""Affine bounds forward through a network: cheap where few pixels straddle, since only those are variables.

A value is ``c + G e + d`` with ``|e_i| <= 1``, one e for each straddling pixel of the image, and ``|d| <= r``. Affine layers
act on all parts; a ReLU that may be on or off is enclosed between two parallel lines (Singh et al. 2018, DeepZ). Half their
distance becomes a variable of its own while there are few, and then joins r, which is carried on as an interval. An
image with s variables costs s + 2 passes, where linear bounds backward cost two for each neuron that interval bounds leave
open. These s passes are most of the cost, so G is float32; what its rounding may amount to joins r, which is float64, as c is.

The boxes found this way replace interval bounds in the core's linear bounds, which do the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.bounds import Activation, Box
from certbench.bounds.tape import Refine, Tape
from certbench.errors import UsageError
from certbench.models.kernels import plain_kernels

VARIABLES = 512
"""Most variables of an image; a layer whose open ReLUs would exceed them keeps theirs as intervals."""
SPREAD = 1e-6
"""Inputs that vary less (table rounding, for instance) are no variables."""

FLUSHED = 2.0**-126
"""What a product, a weight or a sum loses at most where float32 goes below its normal numbers."""


def gamma(operations: int) -> float:
    """By how much, as a share of the terms' absolute sum, that many roundings to float32 may move a sum; rounded up."""
    unit = operations * 2.0**-24
    return unit / (1 - unit) * (1 + 1e-9)


@dataclass(frozen=True)
class Zonotope:
    """c and r: float64, (batch, ...); G: float32, (batch, variables, ...)."""

    c: Tensor
    G: Tensor
    r: Tensor

    @cached_property
    def spread(self) -> Tensor:
        """The sum of ``|G|`` over the variables, float64, (batch, ...), and what adding them up in float32 may lose."""
        variables = self.G.shape[1]
        found = torch.linalg.vector_norm(self.G, ord=1, dim=1).double()
        return (1 + gamma(variables)) * found + variables * FLUSHED

    @property
    def box(self) -> Box:
        return Box(center=self.c, radius=self.spread + self.r)

    def affine(self, layer: nn.Conv2d | nn.Linear) -> Zonotope:
        """A product of n terms in float32, its weights rounded to it, is off by ``gamma(n + 1) |W| |G|`` at most."""

        def apply(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if isinstance(layer, nn.Linear):
                return F.linear(h, weight, bias)
            return F.conv2d(h, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

        W, terms = layer.weight, layer.weight[0].numel()
        G = apply(self.G.flatten(0, 1), W.float(), None).unflatten(0, self.G.shape[:2])
        r = apply(self.r + gamma(terms + 1) * self.spread, W.abs(), None)
        largest = 1 + W.abs().amax() + self.spread.flatten(1).amax(1)
        flushed = terms * self.G.shape[1] * FLUSHED * largest.view(-1, *[1] * (r.ndim - 1))
        return Zonotope(apply(self.c, W, layer.bias), G, r + flushed)

    def relu(self) -> Zonotope:
        box = self.box
        open_ = (box.lower < 0) & (box.upper > 0)
        slope = torch.where(open_, box.upper / (box.upper - box.lower), (box.lower >= 0).to(self.c.dtype))
        half = torch.where(open_, -slope * box.lower / 2, 0.0)
        G = slope.float().unsqueeze(1) * self.G
        # The slope is rounded to float32, and so is its product; both are exact for 0, and but for what flushes for 1.
        flushed = torch.where(slope > 0, self.G.shape[1] * 2 * FLUSHED * (1 + self.spread), 0.0)
        r = slope * self.r + torch.where(open_, gamma(2) * slope * self.spread, 0.0) + flushed
        if self.G.shape[1] + int(open_.flatten(1).sum(1).max()) > VARIABLES:
            return Zonotope(slope * self.c + half, G, r + half)
        own = over_box(Box(center=half, radius=half), open_)
        return Zonotope(slope * self.c + half, torch.cat([G, own.G], 1), r + own.r)

    def flatten(self) -> Zonotope:
        return Zonotope(self.c.flatten(1), self.G.flatten(2), self.r.flatten(1))


def over_box(box: Box, variable: Tensor) -> Zonotope:
    """The box with one variable for each entry of ``variable`` (bool, shape of the box), the others in r.

    Images with fewer variables than the one with most get zeros.
    """
    chosen, radius = variable.flatten(1), box.radius.flatten(1)
    most = max(1, int(chosen.sum(1).max()))
    place = chosen.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    G = torch.zeros(len(radius), most, radius.shape[1], device=radius.device)
    held = radius.float()
    G.scatter_(2, place.unsqueeze(2), (held * chosen).gather(1, place).unsqueeze(2))
    rest = torch.where(chosen, (radius - held.double()).abs(), radius)  # the difference is exact
    shape = box.shape
    return Zonotope(box.center, G.view(*G.shape[:2], *shape[1:]), rest.view(shape))


def relu_boxes(network: nn.Sequential, z: Zonotope) -> list[Box]:
    """The box of what enters each ReLU, in order.

    Raises:
        UsageError: a layer other than convolution with zero padding, linear layer, ReLU and flattening.
    """
    found = []
    with plain_kernels():  # what is said of round-off speaks of sums of products in float32
        for layer in network:
            if not _is_plain(layer):
                raise UsageError(
                    f"no affine bound goes forward through {_in_words(layer)}; set method.ladder.linear to "
                    '"crown-ibp" or "crown"'
                )
            if isinstance(layer, nn.Conv2d | nn.Linear):
                z = z.affine(layer)
            elif isinstance(layer, nn.ReLU):
                found.append(z.box)
                z = z.relu()
            elif isinstance(layer, nn.Flatten):
                z = z.flatten()
    return found


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer does what its kind says: no forward or hooks of its own, the usual padding and flattening."""
    if type(layer) not in (nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten, nn.Identity):
        return False
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return not isinstance(layer, nn.Conv2d) or layer.padding_mode == "zeros"


def _in_words(layer: nn.Module) -> str:
    mode = getattr(layer, "padding_mode", "zeros")
    return type(layer).__name__ + (f" with padding mode {mode}" if mode != "zeros" else "")


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
