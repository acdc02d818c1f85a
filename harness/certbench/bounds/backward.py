"""Backward rules: how one operation turns linear coefficients of its output into coefficients of its inputs.

A linear bound of some rows of a later value is ``sum(a * h) + constant`` with h the output of an operation and the
coefficients a of shape (batch, rows, *shape of one h). The rule of the operation replaces h by its inputs: exactly
where the operation is linear, by a linear bound from below where it is not. A rule has the signature of its operation
with the coefficients in front. Arguments that depend on the network's input arrive as :class:`Activation`, everything
else as the operation would see it. It returns :class:`Terms`. A new rule, in a plugin or here, is

    @backward_rule("aten.neg.default")
    def neg(a, x):
        return Terms([(x, -a)])

and one that relaxes its operation says whose bounds it reads (``needs``), see ``relaxations``. Source: Zhang et al.
2018 (arXiv 1811.00866), Xu et al. 2020 (arXiv 2002.12920) for general graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv1d_input, conv2d_input

from certbench.bounds.box import Box
from certbench.bounds.interval import scale_and_shift
from certbench.bounds.shapes import AVERAGES, MOVES
from certbench.errors import UsageError

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """A value that depends on the network's input: its shape with the batch, and its box where the rule needs it."""

    name: str
    shape: torch.Size
    known: Box | None = None

    @property
    def box(self) -> Box:
        if self.known is None:
            raise UsageError(
                f"a backward rule reads the bounds of {self.name} but does not register for them"
            )
        return self.known

    def zeros(self, like: Tensor, batch: int) -> Tensor:
        return like.new_zeros(batch, *self.shape[1:])


@dataclass(frozen=True)
class Terms:
    """Coefficients (batch, rows, ...) for some inputs, and a constant (batch, rows) or none."""

    coefficients: list[tuple[Activation, Tensor]]
    constant: Tensor | None = None


Rule = Callable[..., Terms]
Open = Callable[[Box], Tensor]
"""(box that enters an operation) -> which of its neurons, same shape, profit from tighter bounds."""


@dataclass(frozen=True)
class BackwardRule:
    """``needs`` is set where the rule reads the box of its first argument; ``slopes``: it accepts lower slopes."""

    rule: Rule
    needs: Open | None = None
    slopes: bool = False


BACKWARD: dict[str, BackwardRule] = {}


def backward_rule(
    *operations: str, needs: Open | None = None, slopes: bool = False
) -> Callable[[Rule], Rule]:
    """Register a backward rule for operations by canonical name.

    Raises:
        UsageError: an operation already has a backward rule.
    """

    def register(rule: Rule) -> Rule:
        for operation in operations:
            if operation in BACKWARD:
                raise UsageError(f"operation {operation} already has a backward rule")
            BACKWARD[operation] = BackwardRule(rule, needs, slopes)
        return rule

    return register


# Affine operations ---------------------------------------------------------------------------------------------------


@backward_rule("aten.linear.default")
def linear(a: Tensor, x: Activation, weight: Tensor, bias: Tensor | None = None) -> Terms:
    constant = None if bias is None else (a @ bias).reshape(*a.shape[:2], -1).sum(2)
    return Terms([(x, a @ weight)], constant)


@backward_rule("aten.conv1d.default", "aten.conv2d.default")
def convolution(
    a: Tensor,
    x: Activation,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Terms:
    n = weight.ndim - 2
    geometry = [as_list(value, n) for value in (stride, padding, dilation)]
    # The gradient of a convolution: for float64 on the CPU two to three times as fast as conv_transpose, to the same bits.
    pull: Callable[..., Tensor] = conv1d_input if n == 1 else conv2d_input
    # PyTorch unfolds its whole input for float64 on the CPU: in parts, what is unfolded is no larger than the coefficients
    rows = a.flatten(0, 1)
    parts = torch.split(rows, -(-len(rows) // math.prod(weight.shape[2:])))
    pulled = torch.cat([pull((len(part), *x.shape[1:]), weight, part, *geometry, groups) for part in parts])
    return Terms([(x, pulled.view(*a.shape[:2], *pulled.shape[1:]))], _channel_constant(a, bias))


@backward_rule("aten.conv1d.padding", "aten.conv2d.padding")
def convolution_same(
    a: Tensor, x: Activation, weight: Tensor, bias: Tensor | None = None, *geometry: Any
) -> Terms:
    """Padding ``"same"`` may be uneven, so the transposed map is taken by differentiation."""
    convolve = torch.conv1d if weight.ndim == 3 else torch.conv2d
    pulled = _transposed(lambda h: convolve(h, weight, None, *geometry), a, x)
    return Terms([(x, pulled)], _channel_constant(a, bias))


def as_list(value: Any, n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else list(value) * (n // len(value))


def _channel_constant(a: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else a.flatten(3).sum(3) @ bias


@backward_rule("aten.batch_norm.default")
def batch_norm(
    a: Tensor,
    x: Activation,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *options: Any,
) -> Terms:
    """A fixed scale and shift per channel; training-mode statistics are those of the clean batch, gradients included."""
    scale, shift = scale_and_shift(weight, bias, mean, var, options[2])
    summed = a if a.ndim == 3 else a.flatten(3).sum(3)
    return Terms([(x, a * scale.view(-1, *[1] * (a.ndim - 3)))], summed @ shift)


@backward_rule("aten.add.Tensor", "aten.add.Scalar")
def add(a: Tensor, x: Any, y: Any, alpha: float = 1) -> Terms:
    terms = [(value, a * sign) for value, sign in ((x, 1), (y, alpha)) if isinstance(value, Activation)]
    fixed = [value * sign for value, sign in ((x, 1), (y, alpha)) if not isinstance(value, Activation)]
    for value, _ in terms:
        _same_shape(value, a)
    return Terms(terms, _weighted_sum(a, fixed[0]) if fixed else None)


@backward_rule("aten.sub.Tensor", "aten.sub.Scalar")
def sub(a: Tensor, x: Any, y: Any, alpha: float = 1) -> Terms:
    return add(a, x, y, -alpha)


@backward_rule("aten.rsub.Scalar", "aten.rsub.Tensor")
def rsub(a: Tensor, x: Any, y: Any, alpha: float = 1) -> Terms:
    return add(a, y, x, -alpha)


@backward_rule("aten.neg.default")
def neg(a: Tensor, x: Activation) -> Terms:
    return Terms([(x, -a)])


@backward_rule("aten.mul.Tensor", "aten.mul.Scalar")
def mul(a: Tensor, x: Any, y: Any) -> Terms:
    value, factor = (x, y) if isinstance(x, Activation) else (y, x)
    _same_shape(value, a)
    return Terms([(value, a * with_rows(factor, a))])


@backward_rule("aten.div.Tensor", "aten.div.Scalar")
def div(a: Tensor, x: Activation, y: Any) -> Terms:
    _same_shape(x, a)
    return Terms([(x, a / with_rows(y, a))])


def with_rows(constant: Any, a: Tensor) -> Any:
    """A constant that broadcasts against (batch, ...) made to broadcast against (batch, rows, ...)."""
    if isinstance(constant, Tensor) and constant.ndim == a.ndim - 1:
        return constant.unsqueeze(1)
    return constant


def _weighted_sum(a: Tensor, constant: Any) -> Tensor:
    weighted: Tensor = a * with_rows(constant, a)
    return weighted.flatten(2).sum(2)


def _same_shape(x: Activation, a: Tensor) -> None:
    if x.shape[1:] != a.shape[2:]:
        raise UsageError(
            f"no backward rule broadcasts {x.name} from {tuple(x.shape[1:])} to {tuple(a.shape[2:])}"
        )


@backward_rule("aten.cat.default")
def cat(a: Tensor, parts: list[Any], dim: int = 0) -> Terms:
    at = dim + 1 if dim >= 0 else dim
    pieces = torch.split(a, [part.shape[dim] for part in parts], at)
    paired = list(zip(parts, pieces, strict=True))
    terms = [(part, piece) for part, piece in paired if isinstance(part, Activation)]
    fixed = [_weighted_sum(piece, part) for part, piece in paired if not isinstance(part, Activation)]
    return Terms(terms, sum(fixed, a.new_zeros(a.shape[:2])) if fixed else None)


@backward_rule("aten.pad.default", "aten.constant_pad_nd.default")
def pad(
    a: Tensor, x: Activation, widths: list[int], mode: str = "constant", value: float | None = None
) -> Terms:
    pulled = _transposed(lambda h: aten.pad.default(h, widths, mode, 0.0 if value else value), a, x)
    if not value:
        return Terms([(x, pulled)])
    frame = aten.pad.default(x.zeros(a, 1), widths, mode, value)
    return Terms([(x, pulled)], _weighted_sum(a, frame))


# Averages, and entries moved around: the transposed map comes from differentiation -----------------------------------


def _transposed(function: Callable[[Tensor], Tensor], a: Tensor, x: Activation) -> Tensor:
    """Coefficients of x, where ``function`` is linear and acts on each image by itself."""
    rows = a.flatten(0, 1)
    pull = torch.func.vjp(function, x.zeros(a, len(rows)))[1]
    pulled: Tensor = pull(rows)[0]
    return pulled.view(*a.shape[:2], *pulled.shape[1:])


def _by_differentiation(
    function: Callable[..., Tensor], a: Tensor, x: Activation, *options: Any, **named: Any
) -> Terms:
    return Terms([(x, _transposed(lambda h: function(h, *options, **named), a, x))])


_RESHAPES = {"aten.flatten.using_ints", "aten.unflatten.int", "aten.view.default", "aten.reshape.default"}
_SAME = {"aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.detach.default"}

for _operation, _function in {**AVERAGES, **MOVES}.items():
    if _operation not in _RESHAPES | _SAME | {"aten.expand.default"}:
        backward_rule(_operation)(partial(_by_differentiation, _function))


@backward_rule(*sorted(_RESHAPES))
def reshape(a: Tensor, x: Activation, *_: Any) -> Terms:
    return Terms([(x, a.reshape(*a.shape[:2], *x.shape[1:]))])


@backward_rule(*sorted(_SAME), "aten.dropout.default", "aten.feature_dropout.default")
def identity(a: Tensor, x: Activation, *_: Any, **__: Any) -> Terms:
    return Terms([(x, a)])
