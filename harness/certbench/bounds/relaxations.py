"""Backward rules of operations that are not linear: two lines that enclose the operation on its input box.

Where the value is bounded from below, a positive coefficient takes the lower line and a negative one the upper line.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from certbench.bounds.backward import Activation, Terms, as_list, backward_rule
from certbench.bounds.box import Box, Map
from certbench.bounds.interval import RULES

aten = torch.ops.aten

# ReLU and leaky ReLU: two pieces that meet at 0 ----------------------------------------------------------------------


def straddling(x: Box) -> Tensor:
    """Neurons whose sign is open; the others are linear, whatever their bounds."""
    return (x.lower < 0) & (x.upper > 0)


@backward_rule("aten.relu.default", needs=straddling, slopes=True)
def relu(a: Tensor, x: Activation, *, slopes: Tensor | None = None) -> Terms:
    return _hinge(a, x, 0.0, slopes)


@backward_rule("aten.leaky_relu.default", needs=straddling, slopes=True)
def leaky_relu(a: Tensor, x: Activation, slope: float = 0.01, *, slopes: Tensor | None = None) -> Terms:
    if slope > 1:  # concave, so the lines would change places
        return _constant("aten.leaky_relu.default", a, x, slope)
    return _hinge(a, x, slope, slopes)


def _hinge(a: Tensor, x: Activation, below: float, slopes: Tensor | None) -> Terms:
    """``max(h, below * h)``. Upper: the chord from l to u. Lower: any slope between the two pieces' through 0.

    Args:
        slopes: where the lower line lies between the pieces, in [0, 1], shape (batch, rows, ...); by default 1 if
            ``u > -l``, else 0, which leaves the smaller area between the lines.
    """
    lower, upper = x.box.lower.unsqueeze(1), x.box.upper.unsqueeze(1)
    open_ = (lower < 0) & (upper > 0)
    share = torch.where(open_, upper, 0.0) / torch.where(open_, upper - lower, 1.0)
    chord = torch.where(open_, share, (lower >= 0).to(a.dtype))
    chosen = (chord > 0.5).to(a.dtype) if slopes is None else torch.where(open_, slopes, chord)
    height = -share * lower * (1 - below)  # of the chord above 0
    if below:
        chord, chosen = below + (1 - below) * chord, below + (1 - below) * chosen
    constant = (a.clamp_max(0).flatten(2) @ height.flatten(1).unsqueeze(2)).squeeze(2)
    return Terms([(x, a * torch.where(a < 0, chord, chosen))], constant)


# Smooth and saturating activations: parallel lines --------------------------------------------------------------------


def _not_a_point(x: Box) -> Tensor:
    return x.lower < x.upper


def _lines(a: Tensor, x: Activation, slope: Tensor, below: Tensor, above: Tensor) -> Terms:
    """Both lines with one slope; ``below`` and ``above`` are their values at 0, all of shape (batch, ...)."""
    positive, negative = a.clamp_min(0).flatten(2), a.clamp_max(0).flatten(2)
    constant = positive @ below.flatten(1).unsqueeze(2) + negative @ above.flatten(1).unsqueeze(2)
    return Terms([(x, a * slope.unsqueeze(1))], constant.squeeze(2))


def _parallel(function: Map, derivative: Map, a: Tensor, x: Activation, *_: Any) -> Terms:
    """For a function whose derivative rises and then falls, or does one of both only.

    Its derivative on [l, u] is then least at an end; with that slope s, ``f(h) - s h`` is non-decreasing, so the lines
    of slope s through (l, f(l)) and (u, f(u)) enclose the function. Source: Singh et al. 2018 (DeepZ, NeurIPS).
    """
    lower, upper = x.box.lower, x.box.upper
    slope = torch.minimum(derivative(lower), derivative(upper))
    return _lines(a, x, slope, function(lower) - slope * lower, function(upper) - slope * upper)


def _sigmoid_derivative(h: Tensor) -> Tensor:
    return torch.sigmoid(h) * torch.sigmoid(-h)


def _parallel_elu(
    a: Tensor, x: Activation, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Terms:
    def derivative(h: Tensor) -> Tensor:
        tail = alpha * scale * input_scale * torch.exp((input_scale * h).clamp_max(0))
        return torch.where(h > 0, scale, tail)

    return _parallel(lambda h: aten.elu.default(h, alpha, scale, input_scale), derivative, a, x)


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _parallel_clamp(
    a: Tensor, x: Activation, low: float | None = None, high: float | None = None, **named: Any
) -> Terms:
    low, high = named.get("min", low), named.get("max", high)

    def inside(h: Tensor) -> Tensor:
        result = torch.ones_like(h)
        result = result if low is None else result * (h >= low)
        return result if high is None else result * (h <= high)

    return _parallel(lambda h: h.clamp(low, high), inside, a, x)


_PARALLEL: dict[str, Callable[..., Terms]] = {
    "aten.sigmoid.default": partial(_parallel, torch.sigmoid, _sigmoid_derivative),
    "aten.log_sigmoid.default": partial(_parallel, F.logsigmoid, lambda h: torch.sigmoid(-h)),
    "aten.tanh.default": partial(_parallel, torch.tanh, lambda h: 1 - torch.tanh(h) ** 2),
    "aten.hardsigmoid.default": partial(_parallel, F.hardsigmoid, lambda h: (h.abs() <= 3) / 6.0),
    "aten.elu.default": _parallel_elu,
    "aten.celu.default": lambda a, x, alpha=1.0: _parallel_elu(a, x, alpha, 1.0, 1.0 / alpha),
    "aten.selu.default": lambda a, x: _parallel_elu(a, x, _SELU_ALPHA, _SELU_SCALE),
    "aten.hardtanh.default": lambda a, x, low=-1.0, high=1.0: _parallel_clamp(a, x, low, high),
    "aten.relu6.default": lambda a, x: _parallel_clamp(a, x, 0.0, 6.0),
    "aten.clamp.default": _parallel_clamp,
    "aten.clamp_min.default": _parallel_clamp,
    "aten.clamp_max.default": lambda a, x, high: _parallel_clamp(a, x, None, high),
}
for _operation, _rule in _PARALLEL.items():
    backward_rule(_operation, needs=_not_a_point)(_rule)

# Everything else that has interval bounds: these, as constants. Sound, and no tighter than the interval rule ----------


def _constant(operation: str, a: Tensor, x: Activation, *options: Any, **named: Any) -> Terms:
    image: Box = RULES[operation](x.box, *options, **named)
    positive, negative = a.clamp_min(0).flatten(2), a.clamp_max(0).flatten(2)
    lower, upper = (end.flatten(1).unsqueeze(2) for end in (image.lower, image.upper))
    return Terms([], (positive @ lower + negative @ upper).squeeze(2))


for _name in ("gelu", "silu", "mish", "hardswish", "abs", "softplus", "prelu", "exp", "amax"):
    _operation = f"aten.{_name}.default"
    backward_rule(_operation, needs=_not_a_point)(partial(_constant, _operation))

# Max pooling: below, the entry with the largest lower bound; above, that entry where it is sure to win ----------------


@backward_rule("aten.max_pool2d.default", needs=_not_a_point)
def max_pool2d(
    a: Tensor,
    x: Activation,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Terms:
    stride = stride or kernel
    best, winner = F.max_pool2d(
        x.box.lower, kernel, stride, padding, dilation, ceil_mode, return_indices=True
    )
    top = F.max_pool2d(x.box.upper, kernel, stride, padding, dilation, ceil_mode)
    sure = torch.zeros_like(best, dtype=torch.bool)
    if not ceil_mode:  # its last windows hang over the edge, which unfolding does not know
        sure = _rivals(x.box.upper, best, kernel, stride, padding, dilation) == 1
    negative = a.clamp_max(0)
    kept = a.clamp_min(0) + torch.where(sure.unsqueeze(1), negative, 0.0)
    index = winner.unsqueeze(1).expand_as(a)
    pulled = a.new_zeros(*a.shape[:3], x.shape[2:].numel())
    pulled = pulled.scatter_add(3, index.flatten(3), kept.flatten(3))
    rest = torch.where(sure, 0.0, top).flatten(1).unsqueeze(2)
    constant = (negative.flatten(2) @ rest).squeeze(2)
    return Terms([(x, pulled.view(*a.shape[:2], *x.shape[1:]))], constant)


def _rivals(upper: Tensor, best: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """How many entries of each window reach its largest lower bound, shape of ``best``: the winner, and its rivals."""
    rows, columns = as_list(padding, 2)
    padded = F.pad(upper, (columns, columns, rows, rows), value=-torch.inf)
    columns_of = F.unfold(padded, kernel, dilation, 0, stride)
    windows = columns_of.view(*upper.shape[:2], -1, columns_of.shape[2])
    return (windows >= best.flatten(2).unsqueeze(2)).sum(2).view_as(best)
