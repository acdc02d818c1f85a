"""Error rules of activations.

``|fl(f(v)) - f(exact)|`` is at most the slope of f times the error of v, and what the evaluation of f itself is off.
The latter is stated in unit round-offs of float64, as ``result |f(v)| + input |v| + constant``, with a margin over the
few units in the last place of exp, expm1, log1p, tanh and erf and the handful of roundings that surround them.
``tests/test_library_functions.py`` compares every one with 40 decimal digits on a dense grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.audit.bounded import (
    TINY,
    UNIT,
    Bounded,
    UnsupportedError,
    clamp,
    constant,
    exact,
    more,
    written,
)


@dataclass(frozen=True)
class Accuracy:
    """``slope``: the steepest of f. ``switch``, ``step``: f jumps by at most ``step`` where x passes ``switch``."""

    slope: float = 1.0
    result: float = 16.0
    input: float = 0.0
    constant: float = 0.0
    switch: float = math.inf
    step: float = 0.0


def _leaky(negative_slope: float = 0.01) -> Accuracy:
    return Accuracy(slope=max(1.0, abs(negative_slope)))


def _elu(alpha: float = 1.0) -> Accuracy:
    """Near 0 the difference ``exp(x) - 1`` is off by units of 1."""
    return Accuracy(slope=max(1.0, abs(alpha)), constant=16 * abs(alpha))


def _celu(alpha: float = 1.0) -> Accuracy:
    if not alpha > 0:
        raise UnsupportedError(f"no rule for CELU with alpha {alpha}")
    return Accuracy(constant=16 * abs(alpha))


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Accuracy:
    """``beta x`` is rounded before the exponential; above the threshold PyTorch takes the identity."""
    if not beta > 0:
        raise UnsupportedError(f"no rule for softplus with beta {beta}")
    step = math.exp(-threshold) / beta
    return Accuracy(input=16, constant=16 / beta, switch=threshold / beta, step=step * (1 + 2.0**-20))


SMOOTH: dict[Callable[..., Tensor], Callable[..., Accuracy]] = {
    F.leaky_relu: _leaky,
    F.elu: _elu,
    F.celu: _celu,
    F.softplus: _softplus,
    F.selu: lambda: Accuracy(slope=1.76, constant=32.0),
    F.logsigmoid: Accuracy,
    F.silu: lambda: Accuracy(slope=1.1),
    F.mish: lambda: Accuracy(slope=1.1),
    F.gelu: lambda approximate="none": Accuracy(slope=1.13, input=16.0),
    F.hardsigmoid: lambda: Accuracy(constant=16.0),
    F.hardswish: lambda: Accuracy(slope=1.5, input=16.0),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, torch.tanh, F.tanh), Accuracy),
}


def _smooth(function: Callable[..., Tensor], accuracy_of: Callable[..., Accuracy]) -> Callable[..., Bounded]:
    def rule(x: Bounded, *options: Any, inplace: bool = False, **named: Any) -> Bounded:
        f = accuracy_of(*options, **named)
        value = function(x.value, *options, **named)
        units = f.result * value.abs() + f.input * x.value.abs() + f.constant
        error = f.slope * x.error + UNIT * units + TINY * (1 + x.value.abs())
        near = (x.value - f.switch).abs() <= x.error + 16 * UNIT * x.value.abs()
        error = torch.where(near, error + f.step, error)
        return written(x, Bounded(value, more(error, 16)), inplace)

    return rule


def _prelu(x: Bounded, weight: Bounded) -> Bounded:
    slopes = constant(weight)
    value = F.prelu(x.value, slopes)
    return Bounded(value, more(max(1.0, float(slopes.abs().max())) * x.error + 2 * UNIT * value.abs(), 8))


def _absolute(x: Bounded) -> Bounded:
    return Bounded(x.value.abs(), x.error)


def _clamp(x: Bounded, min: Any = None, max: Any = None) -> Bounded:
    if isinstance(min, Bounded) or isinstance(max, Bounded):
        raise UnsupportedError("no rule for a clamp to computed limits")
    return clamp(x, min, max)


def _hardtanh(x: Bounded, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Bounded:
    return clamp(x, min_val, max_val, inplace)


ACTIVATIONS: dict[Any, Callable[..., Bounded]] = {
    **{function: _smooth(function, accuracy) for function, accuracy in SMOOTH.items()},
    F.prelu: _prelu,
    torch.prelu: _prelu,
    F.hardtanh: _hardtanh,
    F.relu6: lambda x, inplace=False: clamp(x, 0.0, 6.0, inplace),
    torch.abs: _absolute,
    torch.clamp: _clamp,
}
"""Rules by function, each with the function's own signature."""

METHODS: dict[str, Callable[..., Bounded]] = {
    "sigmoid": ACTIVATIONS[torch.sigmoid],
    "tanh": ACTIVATIONS[torch.tanh],
    "abs": _absolute,
    "clamp": _clamp,
}

_MODULES: dict[type[nn.Module], tuple[Any, tuple[str, ...]]] = {
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.ELU: (F.elu, ("alpha",)),
    nn.CELU: (F.celu, ("alpha",)),
    nn.SELU: (F.selu, ()),
    nn.Sigmoid: (torch.sigmoid, ()),
    nn.LogSigmoid: (F.logsigmoid, ()),
    nn.Tanh: (torch.tanh, ()),
    nn.Softplus: (F.softplus, ("beta", "threshold")),
    nn.GELU: (F.gelu, ("approximate",)),
    nn.SiLU: (F.silu, ()),
    nn.Mish: (F.mish, ()),
    nn.Hardtanh: (F.hardtanh, ("min_val", "max_val")),
    nn.ReLU6: (F.relu6, ()),
    nn.Hardsigmoid: (F.hardsigmoid, ()),
    nn.Hardswish: (F.hardswish, ()),
    nn.PReLU: (F.prelu, ("weight",)),
}
"""The function behind a module, and which of its attributes are that function's options."""


def _module_rule(kind: type[nn.Module]) -> Callable[[nn.Module, Bounded], Bounded]:
    function, names = _MODULES[kind]

    def rule(m: nn.Module, x: Bounded) -> Bounded:
        options = {name: getattr(m, name) for name in names}
        options = {name: exact(v) if isinstance(v, Tensor) else v for name, v in options.items()}
        found = ACTIVATIONS[function](x, **options)
        return written(x, found, bool(getattr(m, "inplace", False)))

    return rule


ACTIVATION_MODULES = {kind: _module_rule(kind) for kind in _MODULES}
