"""Float-sound rules of activations.

A library function is trusted to a few units in the last place, at deployment and in float64 alike; what that means for
each one stands in ``docs/float-soundness.md``, and a test compares them on dense grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from certbench.bounds.interval import RULES as INTERVAL_RULES
from certbench.bounds.interval import per_channel
from certbench.bounds.sound.arithmetic import Rounded, both_rules
from certbench.bounds.sound.deployment import Deployment, as_sound, per_image, refuse_boxes
from certbench.bounds.sound.rounding import SoundBox, down, up
from certbench.errors import UsageError


@dataclass(frozen=True)
class Function:
    """How far an evaluation of f(x) may be off: ``result |f| + input |x| + constant`` unit round-offs, and ``step``.

    ``lipschitz`` bounds the slope of f: how much a change of x may change it. ``inner`` times ``|x|`` bounds what is
    computed on the way, which must not overflow.
    """

    result: float = 8.0
    input: float = 0.0
    constant: float = 0.0
    step: float = 0.0
    lipschitz: float = 1.0
    inner: float = 1.0


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Function:
    """``beta x`` is rounded before the exponential; at the threshold the function steps down by ``step`` at most."""
    return Function(input=8.0, constant=8.0 / abs(beta), step=math.exp(-threshold) / abs(beta))


def _elu(alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Function:
    """Near 0 the difference ``exp(x) - 1`` is off by units of 1."""
    tail = abs(alpha * scale)
    return Function(constant=8.0 * tail, lipschitz=max(abs(scale), tail * abs(input_scale)))


FUNCTIONS: dict[str, Callable[..., Function]] = {
    "aten.sigmoid.default": lambda: Function(),
    "aten.tanh.default": lambda: Function(),
    "aten.log_sigmoid.default": lambda: Function(result=16.0),
    "aten.softplus.default": _softplus,
    "aten.elu.default": _elu,
    "aten.celu.default": lambda alpha=1.0: _elu(alpha, 1.0, 1.0 / alpha),
    "aten.selu.default": lambda: _elu(1.6732632423543772, 1.0507009873554805),
    "aten.silu.default": lambda: Function(result=16.0, lipschitz=1.1),
    "aten.mish.default": lambda: Function(result=16.0, lipschitz=1.1),
    "aten.gelu.default": lambda approximate="none": Function(input=16.0, lipschitz=1.13),
    "aten.hardsigmoid.default": lambda: Function(constant=8.0),
    "aten.hardswish.default": lambda: Function(input=8.0, lipschitz=1.5, inner=6.0),
}


def _library(operation: str, function_of: Callable[..., Function]) -> Callable[..., Rounded]:
    image_of = INTERVAL_RULES[operation]

    def rounded(run: Deployment, x: SoundBox, *options: Any, **named: Any) -> Rounded:
        p, f = run.precision, function_of(*options, **named)
        stored = run.stored(x)
        image = image_of(stored, *options, **named)
        size, reach = torch.maximum(image.lower.abs(), image.upper.abs()), stored.magnitude
        run.guard(per_image(reach) * f.inner, p.sum_largest)
        error = (f.result * size + f.input * reach + f.constant) * p.library() + f.step
        # what vanishes: the result, or a factor that meets x
        error = error + (p.flush + p.unit_flush) * (2 + 2 * reach)
        terms = size + f.lipschitz * reach + f.constant
        return Rounded(image.lower, image.upper, error, terms, f.lipschitz * run.storing(x.magnitude))

    return rounded


for _operation, _function_of in FUNCTIONS.items():
    both_rules(_operation)(_library(_operation, _function_of))


# Piecewise linear ----------------------------------------------------------------------------------------------------


@both_rules("aten.leaky_relu.default")
def leaky_relu(run: Deployment, x: SoundBox, slope: float = 0.01) -> Rounded:
    if slope < 0:
        raise UsageError(f"leaky ReLU with the negative slope {slope} has no float-sound rule")
    return _two_pieces(run, x, INTERVAL_RULES["aten.leaky_relu.default"](x, slope), x.lower.new_tensor(slope))


@both_rules("aten.prelu.default")
def prelu(run: Deployment, x: SoundBox, weight: Tensor) -> Rounded:
    refuse_boxes("PReLU", weight)
    slopes = weight if weight.numel() == 1 else per_channel(weight, x.shape)
    return _two_pieces(run, x, INTERVAL_RULES["aten.prelu.default"](x, weight), slopes)


def _two_pieces(run: Deployment, x: SoundBox, image: Any, slopes: Tensor) -> Rounded:
    """Exact above zero; below it, a product with a constant."""
    p, size = run.precision, slopes.abs()
    error = size * x.magnitude * p.elementwise(2) + 2 * p.flush * (size + x.magnitude + 2)
    return Rounded(down(image.lower), up(image.upper), error, x.magnitude * (1 + size))


def _clamp(operation: str, limits: Callable[..., list[float]]) -> None:
    """Selects one of three numbers, so only a limit that is no number of the deployed type is rounded."""

    @both_rules(operation)
    def rounded(run: Deployment, x: SoundBox, *options: Any, **named: Any) -> Rounded:
        refuse_boxes("limit", *options, *named.values())
        image = INTERVAL_RULES[operation](x, *options, **named)
        moved = max((run.converting(limit) for limit in limits(*options, **named)), default=0.0)
        return Rounded(image.lower, image.upper, torch.full_like(x.magnitude, moved), 2 * x.magnitude + moved)


def _clamp_limits(low: float | None = None, high: float | None = None, **named: Any) -> list[float]:
    found = (named.get("min", low), named.get("max", high))
    if any(isinstance(limit, Tensor) for limit in found):
        raise UsageError("clamp to tensors has no float-sound rule")
    return [limit for limit in found if limit is not None]


_clamp("aten.relu6.default", lambda: [])
_clamp("aten.hardtanh.default", lambda low=-1.0, high=1.0: [low, high])
_clamp("aten.clamp.default", _clamp_limits)
_clamp("aten.clamp_min.default", lambda low: _clamp_limits(low))
_clamp("aten.clamp_max.default", lambda high: _clamp_limits(high))


@both_rules("aten.abs.default")
def absolute(_run: Deployment, x: SoundBox) -> Rounded:
    image = INTERVAL_RULES["aten.abs.default"](as_sound(x))
    return Rounded(image.lower, image.upper, torch.zeros_like(x.magnitude), 2 * x.magnitude)
