"""Interval rules: one function per canonical operation, registered by the operation's name.

A rule has the signature of its operation. Arguments that depend on the network's input arrive as boxes, everything
else (weights, strides, shapes) as the operation would see it. A new rule, in a plugin or here, is

    @interval_rule("aten.exp.default")
    def exp(x):
        return x.ends(torch.exp)

This file has the registry and the affine rules; ``activations`` and ``shapes`` have the others. All of them are
inclusion-isotone: a smaller box in never gives a larger box out, hence certified margins never increase with the
radius. Source of the affine rules: Gowal et al. 2018 (arXiv 1810.12715).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from certbench.bounds.box import Box
from certbench.errors import UsageError

Rule = Callable[..., Any]
"""Gives a box; a list of boxes, where the operation returns several values; or a plain value, such as a size."""
RULES: dict[str, Rule] = {}


R = TypeVar("R", bound=Rule)


def interval_rule(*operations: str) -> Callable[[R], R]:
    """Register a rule for operations by canonical name, for instance ``aten.relu.default``.

    Raises:
        UsageError: an operation already has a rule.
    """

    def register(rule: R) -> R:
        for operation in operations:
            if operation in RULES:
                raise UsageError(f"operation {operation} already has an interval rule")
            RULES[operation] = rule
        return rule

    return register


# Affine operations: centre through the map, radius through its absolute value ---------------------------------------


@interval_rule("aten.linear.default")
def linear(x: Box, weight: Tensor, bias: Tensor | None = None) -> Box:
    refuse_boxes("linear", weight, bias)
    return Box(center=F.linear(x.center, weight, bias), radius=F.linear(x.radius, weight.abs()))


@interval_rule("aten.conv1d.default", "aten.conv1d.padding")
def conv1d(x: Box, weight: Tensor, bias: Tensor | None = None, *geometry: Any) -> Box:
    return _convolution(torch.conv1d, x, weight, bias, geometry)


@interval_rule("aten.conv2d.default", "aten.conv2d.padding")
def conv2d(x: Box, weight: Tensor, bias: Tensor | None = None, *geometry: Any) -> Box:
    return _convolution(torch.conv2d, x, weight, bias, geometry)


def _convolution(
    convolve: Callable[..., Tensor], x: Box, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
) -> Box:
    refuse_boxes("convolution", weight, bias)
    return Box(  # zero padding is a constant, so it adds no radius
        center=convolve(x.center, weight, bias, *geometry),
        radius=convolve(x.radius, weight.abs(), None, *geometry),
    )


@interval_rule("aten.batch_norm.default")
def batch_norm(
    x: Box, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, *options: Any
) -> Box:
    """A fixed scale and shift per channel; the graph has put the statistics to use in ``mean`` and ``var``."""
    if mean is None or var is None:
        raise UsageError("a batch norm without running statistics has no interval rule in evaluation mode")
    eps = options[2]
    scale, shift = scale_and_shift(weight, bias, mean, var, eps)
    scale, shift = per_channel(scale, x.shape), per_channel(shift, x.shape)
    return Box(center=torch.addcmul(shift, x.center, scale), radius=x.radius * scale.abs())


def scale_and_shift(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Batch norm as ``scale * x + shift``, one pair per channel."""
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else weight * scale
    shift = -mean * scale
    return scale, shift if bias is None else bias + shift


def per_channel(values: Tensor, shape: torch.Size) -> Tensor:
    """(channels,) reshaped to broadcast over (batch, channels, ...)."""
    return values.view(1, -1, *[1] * (len(shape) - 2))


@interval_rule("aten.add.Tensor", "aten.add.Scalar")
def add(a: Box | Tensor | float, b: Box | Tensor | float, alpha: float = 1) -> Box:
    """Two branches of one input are treated as independent, which is sound and may be loose."""
    if alpha != 1:
        b = scale(b, alpha) if isinstance(b, Box) else b * alpha
    if isinstance(a, Box) and isinstance(b, Box):
        return Box(lower=a.lower + b.lower, upper=a.upper + b.upper)
    return shift(a, b) if isinstance(a, Box) else shift(_box(b), a)


@interval_rule("aten.sub.Tensor", "aten.sub.Scalar")
def sub(a: Box | Tensor | float, b: Box | Tensor | float, alpha: float = 1) -> Box:
    return add(a, b, -alpha)


@interval_rule("aten.rsub.Scalar", "aten.rsub.Tensor")
def rsub(a: Box | Tensor | float, b: Box | Tensor | float, alpha: float = 1) -> Box:
    return sub(b, a, alpha)


@interval_rule("aten.neg.default")
def neg(x: Box) -> Box:
    return scale(x, -1.0)


@interval_rule("aten.mul.Tensor", "aten.mul.Scalar")
def mul(a: Box | Tensor | float, b: Box | Tensor | float) -> Box:
    if isinstance(a, Box) and isinstance(b, Box):
        raise UsageError("no interval rule multiplies two values that both depend on the input; register one")
    return scale(a, b) if isinstance(a, Box) else scale(_box(b), a)


@interval_rule("aten.div.Tensor", "aten.div.Scalar")
def div(a: Box, b: Tensor | float) -> Box:
    refuse_boxes("division", b)
    return Box(center=a.center / b, radius=a.radius / (b.abs() if isinstance(b, Tensor) else abs(b)))


def shift(x: Box, constant: Any) -> Box:
    return Box(center=x.center + constant, radius=_broadcast_radius(x, constant))


def _broadcast_radius(x: Box, constant: Any) -> Tensor:
    if isinstance(constant, Tensor) and constant.ndim:
        return x.radius + torch.zeros_like(constant)
    return x.radius


def scale(x: Box, factor: Any) -> Box:
    size = factor.abs() if isinstance(factor, Tensor) else abs(factor)
    return Box(center=x.center * factor, radius=x.radius * size)


def _box(value: Any) -> Box:
    assert isinstance(value, Box)  # a rule is only called when some argument is a box
    return value


def refuse_boxes(what: str, *values: object) -> None:
    if any(isinstance(value, Box) for value in values):
        raise UsageError(
            f"no interval rule covers a {what} whose parameters depend on the input; register one"
        )
