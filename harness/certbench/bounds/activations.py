"""Interval rules of elementwise activations: non-decreasing ones, and those with a single dip."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from certbench.bounds.box import Box
from certbench.bounds.interval import interval_rule, per_channel, refuse_boxes
from certbench.errors import UsageError

aten = torch.ops.aten

NON_DECREASING = (
    "relu", "sigmoid", "tanh", "hardsigmoid", "log_sigmoid", "selu", "exp",
    "hardtanh", "relu6", "clamp", "clamp_min", "clamp_max",
)  # fmt: skip
"""Operations that are non-decreasing whatever their options: the two ends of a box go through."""


def _both_ends(function: Any, x: Box, *options: Any, **named: Any) -> Box:
    refuse_boxes("limit", *options, *named.values())
    return x.ends(lambda end: function(end, *options, **named))


for _name in NON_DECREASING:
    interval_rule(f"aten.{_name}.default")(partial(_both_ends, getattr(aten, _name).default))


@interval_rule("aten.leaky_relu.default")
def leaky_relu(x: Box, slope: float = 0.01) -> Box:
    if slope < 0:
        raise UsageError(
            f"leaky ReLU with the negative slope {slope} is not monotone and has no interval rule"
        )
    return x.ends(lambda end: F.leaky_relu(end, slope))


@interval_rule("aten.elu.default")
def elu(x: Box, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Box:
    if min(alpha, scale, input_scale) < 0:
        raise UsageError(
            f"ELU with the negative factor {min(alpha, scale, input_scale)} has no interval rule"
        )
    return x.ends(lambda end: aten.elu.default(end, alpha, scale, input_scale))


@interval_rule("aten.celu.default")
def celu(x: Box, alpha: float = 1.0) -> Box:
    if not alpha > 0:
        raise UsageError(f"CELU with alpha {alpha} has no interval rule; alpha must be positive")
    return x.ends(lambda end: aten.celu.default(end, alpha))


@interval_rule("aten.softplus.default")
def softplus(x: Box, beta: float = 1.0, threshold: float = 20.0) -> Box:
    """PyTorch switches to the identity above ``threshold``: a step down of about 1e-9, so not quite monotone."""
    if beta <= 0:
        raise UsageError(f"softplus with beta {beta} has no interval rule; beta must be positive")
    switch = threshold / beta
    top = F.softplus(torch.tensor(threshold, dtype=torch.float64), 1.0, 2 * threshold).item() / beta
    straddles = (x.lower <= switch) & (x.upper > switch)
    lower, upper = (F.softplus(end, beta, threshold) for end in (x.lower, x.upper))
    return Box(
        lower=torch.where(straddles, lower.clamp_max(switch), lower),
        upper=torch.where(straddles, upper.clamp_min(top), upper),
    )


@interval_rule("aten.prelu.default")
def prelu(x: Box, weight: Tensor) -> Box:
    """Piecewise linear with the kink at 0, so the extremes lie at the ends or at 0, whatever the sign of the slopes."""
    refuse_boxes("PReLU", weight)
    slopes = weight if weight.numel() == 1 else per_channel(weight, x.shape)
    ends = [torch.where(end > 0, end, slopes * end) for end in (x.lower, x.upper)]
    zero = (x.lower < 0) & (x.upper > 0)
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    return Box(
        lower=torch.where(zero, low.clamp_max(0.0), low), upper=torch.where(zero, high.clamp_min(0.0), high)
    )


# One dip: decreasing up to a point, increasing after it --------------------------------------------------------------


def _dip(function: Any, x: Box, at: float, least: float) -> Box:
    """The image under a function that decreases up to ``at``, where it is ``least``, and increases after it."""
    ends = function(x.lower), function(x.upper)
    inside = (x.lower < at) & (x.upper > at)
    low = torch.minimum(*ends)
    return Box(lower=torch.where(inside, low.clamp_max(least), low), upper=torch.maximum(*ends))


# Where the least value is not a rational number it is rounded down in its 14th digit.


@interval_rule("aten.gelu.default")
def gelu(x: Box, approximate: str = "none") -> Box:
    at, least = (
        (-0.7517915204, -0.16997120747991) if approximate == "none" else (-0.7524614176, -0.17004075057126)
    )
    return _dip(lambda end: F.gelu(end, approximate=approximate), x, at, least)


@interval_rule("aten.silu.default")
def silu(x: Box) -> Box:
    return _dip(F.silu, x, -1.2784645427, -0.27846454276108)


@interval_rule("aten.mish.default")
def mish(x: Box) -> Box:
    return _dip(F.mish, x, -1.1924312184, -0.30884341301726)


@interval_rule("aten.hardswish.default")
def hardswish(x: Box) -> Box:
    return _dip(F.hardswish, x, -1.5, -0.375)


@interval_rule("aten.abs.default")
def absolute(x: Box) -> Box:
    return _dip(torch.abs, x, 0.0, 0.0)
