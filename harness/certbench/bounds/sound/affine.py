"""Float-sound rules of layers that sum products: linear, convolution, averages, and batch norm left unfolded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from certbench.bounds.box import Box
from certbench.bounds.interval import per_channel
from certbench.bounds.precision import Precision
from certbench.bounds.sound.arithmetic import Rounded, both_rules
from certbench.bounds.sound.deployment import (
    Deployment,
    as_sound,
    forbid,
    per_image,
    refuse_boxes,
    slack_rule,
    sound_rule,
)
from certbench.bounds.sound.rounding import SoundBox
from certbench.errors import UsageError

aten = torch.ops.aten
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(inputs, weight, bias) -> results."""


@dataclass(frozen=True)
class Layer:
    """Weight (out, ...) and bias (out,) of a layer, and how it applies them; its dot products have length ``n``."""

    weight: Tensor
    bias: Tensor | None
    n: int
    apply: Product

    def deployed(self, p: Precision) -> float:
        """G: the round-off at deployment, relative to ``|W| |h| + |b|``."""
        return p.product(self.n, self.bias is not None)

    def flushed(self, p: Precision, largest: Tensor, relative: float) -> Tensor:
        """What underflow adds to each result, (batch, out), for inputs of at most ``largest`` (batch,)."""
        small = torch.where(self.weight.abs() < p.flush, self.weight.abs(), 0.0).flatten(1).sum(1)
        fixed = torch.full_like(small, (2 * self.n + 2) * p.sum_flush)
        if self.bias is not None:
            fixed = fixed + torch.where(self.bias.abs() < p.flush, self.bias.abs(), 0.0)
            fixed = fixed + (p.flush if p.storage else 0.0)  # the product, stored before its bias
        own = (4 * self.n + 8) * p.unit_flush
        return (1 + relative) * (small * (largest[:, None] + p.flush) + fixed) + own

    def guard(self, run: Deployment, largest: Tensor, relative: float) -> None:
        """No operand and no partial sum overflows, nor a result before its bias is added."""
        p = run.precision
        weights = self.weight.abs().flatten(1)
        constants = (
            weights.amax() if self.bias is None else torch.maximum(weights.amax(), self.bias.abs().amax())
        )
        run.guard(constants.expand_as(largest), p.largest)
        sums = weights.sum(1).amax() * largest + constants
        run.guard(sums * (1 + relative) * (1 + 2.0**-20), p.sum_largest)

    def spread(self, run: Deployment, x: SoundBox, rho: Tensor, own: float) -> Tensor:
        """``|W| rho``, and what biases and underflow add to it; ``own``: the round-off of float64 on the bias."""
        extra = self.flushed(run.precision, per_image(x.magnitude), self.deployed(run.precision))
        if self.bias is not None:
            extra = extra + (self.deployed(run.precision) + own) * self.bias.abs()
        spread = self.apply(rho, self.weight.abs(), None)
        return spread + extra.view(*extra.shape, *[1] * (spread.ndim - 2))


def affine(run: Deployment, x: SoundBox, layer: Layer) -> SoundBox:
    """Two products, as without rounding.

    Needed radius: ``|W| r`` for the box, ``G (|W| |h| + |b|)`` for deployment, ``g (|W| |c| + |b|)`` for the computed
    centre. All but the biases' share is one product of ``|W|`` with ``rho``.
    """
    p, deployed, own = run.precision, layer.deployed(run.precision), run.precision.own(layer.n + 1)
    magnitude, center = x.magnitude, x.center
    layer.guard(run, per_image(magnitude), deployed)
    rho = x.radius + deployed * magnitude + own * center.abs() + (1 + deployed) * magnitude.clamp_max(p.flush)
    radius = layer.spread(run, x, rho, own) * p.cover(layer.n)
    box = SoundBox(center=layer.apply(center, layer.weight, layer.bias), radius=radius)
    before_bias = per_image(box.magnitude) + (0.0 if layer.bias is None else layer.bias.abs().amax())
    run.guard(before_bias, p.largest)
    return box


def affine_slack(run: Deployment, own: float, x: SoundBox, layer: Layer) -> Tensor:
    """``(G + own) (|W| |h| + |b|)`` and underflow: the product that intervals could do without, once per layer."""
    deployed = layer.deployed(run.precision)
    rho = (deployed + own) * x.magnitude + (1 + deployed) * x.magnitude.clamp_max(run.precision.flush)
    return layer.spread(run, x, rho, own)


def linear_layer(x: Box, weight: Tensor, bias: Tensor | None = None) -> Layer:
    refuse_boxes("linear", weight, bias)
    if len(x.shape) != 2:
        raise UsageError("the float-sound rule of linear layers takes (batch, features); flatten first")
    return Layer(weight, bias, weight.shape[1], F.linear)


def _convolution(
    convolve: Callable[..., Tensor], _x: Box, weight: Tensor, bias: Tensor | None = None, *geometry: Any
) -> Layer:
    """The dot products have the length of the fan-in; at a zero-padded border they are shorter."""
    refuse_boxes("convolution", weight, bias)
    return Layer(weight, bias, math.prod(weight.shape[1:]), lambda h, w, b: convolve(h, w, b, *geometry))


def _layer_rules(layer_of: Callable[..., Layer], *operations: str) -> None:
    def bounded(run: Deployment, x: Box, *arguments: Any) -> SoundBox:
        return affine(run, as_sound(x), layer_of(x, *arguments))

    def slack(run: Deployment, own: float, x: Box, *arguments: Any) -> Tensor:
        return affine_slack(run, own, as_sound(x), layer_of(x, *arguments))

    sound_rule(*operations)(bounded)
    slack_rule(*operations)(slack)


_layer_rules(linear_layer, "aten.linear.default")
_layer_rules(partial(_convolution, torch.conv1d), "aten.conv1d.default", "aten.conv1d.padding")
_layer_rules(partial(_convolution, torch.conv2d), "aten.conv2d.default", "aten.conv2d.padding")


# Averages and sums ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """A sum of at most ``n`` stored values, each with one and the same weight; ``apply`` computes it."""

    n: int
    apply: Callable[[Tensor], Tensor]


def average(run: Deployment, x: SoundBox, pool: Pool) -> SoundBox:
    """A dot product with non-negative weights, so |W| is W."""
    p, n = run.precision, pool.n
    deployed, own = p.average(n), p.own(n + 2)
    magnitude = x.magnitude
    run.guard(per_image(magnitude) * (n * (1 + deployed)), p.sum_largest)
    rho = (
        x.radius + deployed * magnitude + own * x.center.abs() + (1 + deployed) * magnitude.clamp_max(p.flush)
    )
    radius = (pool.apply(rho) + _pool_underflow(p, n)) * p.cover(n)
    return run.checked(SoundBox(center=pool.apply(x.center), radius=radius))


def average_slack(run: Deployment, own: float, x: SoundBox, pool: Pool) -> Tensor:
    p, magnitude = run.precision, x.magnitude
    deployed = p.average(pool.n)
    rho = (deployed + own) * magnitude + (1 + deployed) * magnitude.clamp_max(p.flush)
    return pool.apply(rho) + _pool_underflow(p, pool.n)


def _pool_underflow(p: Precision, n: int) -> float:
    return (1 + p.average(n)) * (2 * n + 2) * p.sum_flush + (4 * n + 8) * p.unit_flush


def _pool_rules(operation: str, pool_of: Callable[..., Pool]) -> None:
    sound_rule(operation)(lambda run, x, *a, **k: average(run, as_sound(x), pool_of(x, *a, **k)))
    slack_rule(operation)(
        lambda run, own, x, *a, **k: average_slack(run, own, as_sound(x), pool_of(x, *a, **k))
    )


def _avg_pool(function: Callable[..., Tensor], _x: Box, kernel: list[int], *geometry: Any) -> Pool:
    if len(geometry) == 5 and geometry[4] is not None:
        raise UsageError("average pooling with divisor_override has no float-sound rule")
    n = kernel[0] * kernel[-1] if function is aten.avg_pool2d.default else kernel[0]
    return Pool(n, lambda part: function(part, kernel, *geometry))


def _adaptive(function: Callable[..., Tensor], x: Box, size: list[int]) -> Pool:
    sides = x.shape[-len(size) :]
    n = math.prod(side // out + 2 for side, out in zip(sides, size, strict=True))
    return Pool(min(n, math.prod(sides)), lambda part: function(part, size))


def _over(
    what: str,
    function: Callable[..., Tensor],
    x: Box,
    dim: list[int] | None,
    keepdim: bool = False,
    dtype: Any = None,
) -> Pool:
    if dtype is not None:
        raise UsageError(f"a {what} in another number type ({dtype}) has no float-sound rule")
    dims = range(len(x.shape)) if dim is None else dim
    if any(d % len(x.shape) == 0 for d in dims):
        raise UsageError(f"a {what} over the batch has no float-sound rule")
    return Pool(math.prod(x.shape[d] for d in dims), lambda part: function(part, dim, keepdim))


for _name in ("avg_pool1d", "avg_pool2d"):
    _pool_rules(f"aten.{_name}.default", partial(_avg_pool, getattr(aten, _name).default))
for _name in ("adaptive_avg_pool1d", "adaptive_avg_pool2d"):
    _pool_rules(f"aten.{_name}.default", partial(_adaptive, getattr(aten, _name).default))
_pool_rules("aten.mean.dim", partial(_over, "mean", torch.mean))
_pool_rules("aten.sum.dim_IntList", partial(_over, "sum", torch.sum))


# Batch norm ----------------------------------------------------------------------------------------------------------


@both_rules("aten.batch_norm.default")
def batch_norm(
    run: Deployment,
    x: SoundBox,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    _momentum: float,
    eps: float,
    *_: Any,
) -> Rounded:
    """Evaluation mode, where it could not be folded: round-off on ``|gamma| / sigma (|x| + |mean|) + |beta|``."""
    p = run.precision
    deviation = (var + eps).sqrt()
    inverse = 1 / deviation
    scale = inverse if weight is None else weight * inverse
    shift = torch.zeros_like(scale) if bias is None else bias
    moved = 2 * p.flush / (var + eps)  # a variance near the smallest numbers is stored with an absolute error
    forbid(run, x, (deviation.amin() > 4 * p.flush) & (moved.amax() < 0.5))
    scale, shift, mean, inverse, moved = (
        per_channel(t, x.shape) for t in (scale, shift, mean, inverse, moved)
    )
    reach = x.magnitude + mean.abs()
    terms = scale.abs() * reach + shift.abs()
    run.guard(per_image(terms), p.largest)
    run.guard(per_image(reach * inverse), p.largest)
    first, second = (x.lower - mean) * scale + shift, (x.upper - mean) * scale + shift
    flushed = p.flush * (2 * scale.abs() + (1 + inverse) * reach + 4)
    # |1 / sqrt(1 - m) - 1| <= m up to m = 1/2
    error = (terms + scale.abs() * reach * moved) * (p.batch_norm() + p.own(12))
    error = error + scale.abs() * reach * moved * (1 + p.own(12)) + flushed
    return Rounded(torch.minimum(first, second), torch.maximum(first, second), error, terms)
