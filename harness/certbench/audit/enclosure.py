"""Logits in real arithmetic: evaluated in float64, with a rigorous bound on the round-off beside every number.

Each value is a pair (v, e) of float64 tensors with ``|v - exact| <= e``, where *exact* is what the stored weights give
in real arithmetic. With u = 2^-53, ``g(n) = n u / (1 - n u)`` and a dot product of length n with a bias, in any order
of summation and with or without fused multiply-add,

    |fl(W v + b) - (W exact + b)|  <=  |W| e + g(n + 1) (|W| |v| + |b|) .

The bound is itself computed in floating point; every rule enlarges it by more than its own round-off, and by ``TINY``
for what may underflow. Products are evaluated as sums of products (an unfolded image times a matrix) on the CPU, so
no fast convolution algorithm can break that assumption. An operation without a rule is an error, never a guess.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

UNIT = 2.0**-53
TINY = 2.0**-700
"""Above anything lost to underflow, given that no weight reaches ``LARGEST``."""
LARGEST = 2.0**200


class UnsupportedError(Exception):
    """The network has an operation without a rule; the message says which."""


@dataclass
class Bounded:
    """Float64 values and errors of one shape: every exact value lies within ``error`` of ``value``."""

    value: Tensor
    error: Tensor


class Enclosure:
    """Evaluates a copy of a network, in evaluation mode, with error bounds.

    Raises:
        UnsupportedError: the network cannot be traced, or has an operation without a rule.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        double = copy.deepcopy(network).to(device="cpu", dtype=torch.float64).eval()
        for name, module in double.named_modules():
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                raise UnsupportedError(
                    f"module {name or 'network'} has a hook, or a forward of its own instance"
                )
        for name, tensor in double.state_dict().items():
            if tensor.is_floating_point() and not (tensor.abs() < LARGEST).all():
                raise UnsupportedError(f"weight {name} is not finite, or too large to bound what underflows")
        try:
            self._graph = fx.symbolic_trace(nn.Sequential(double))
        except Exception as error:  # tracing runs the network's own code, which may raise anything
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UnsupportedError(f"the network cannot be traced ({line})") from error
        self.logits(torch.zeros(1, *shape))  # a missing rule is found here, before any attack

    def logits(self, images: Tensor) -> Bounded:
        """Logits of images taken as exact; float32 or float64, shape (batch, *shape), on any device.

        Raises:
            UnsupportedError: an operation without a rule.
        """
        value = images.detach().to(device="cpu", dtype=torch.float64).clone()
        with torch.no_grad():
            # a new interpreter each time: it keeps the values it is working on, and chunks run in parallel
            result = _Interpreter(self._graph).run(_exact(value))
        if not isinstance(result, Bounded):
            raise UnsupportedError(f"the network returns {type(result).__name__}, not one tensor")
        return result

    def is_flipped(self, images: Tensor, labels: Tensor) -> Tensor:
        """Where the label's logit is provably not strictly the largest; bool (batch,), on the CPU.

        Raises:
            UnsupportedError: an operation without a rule.
        """
        logits = self.logits(images)
        own = labels.cpu()[:, None]
        ahead = logits.value - logits.value.gather(1, own)
        slack = _more(logits.error + logits.error.gather(1, own) + 2 * UNIT * ahead.abs(), 8)
        proved = (ahead >= slack) & slack.isfinite() & ahead.isfinite()
        return proved.scatter(1, own, False).any(1)


class _Interpreter(fx.Interpreter):
    """Runs the traced graph on :class:`Bounded` values; everything that holds a tensor but an index is one."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Bounded:
        found = self.fetch_attr(target)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise UnsupportedError(f"no rule for the constant {target}")
        return _exact(found)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        rule = MODULES.get(type(module))
        if rule is None or len(args) != 1 or kwargs or not isinstance(args[0], Bounded):
            raise UnsupportedError(f"no rule for module {target} ({type(module).__name__})")
        return rule(module, args[0])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in (operator.add, operator.sub, operator.mul, operator.floordiv) and _all_int(args):
            return target(*args)
        if target is operator.getitem and _all_int([*args[0], args[1]]):
            return args[0][args[1]]
        return self._apply(FUNCTIONS.get(target), getattr(target, "__name__", str(target)), args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._apply(METHODS.get(target), f"Tensor.{target}", args, kwargs)

    def _apply(self, rule: Callable[..., Any] | None, name: str, args: Any, kwargs: Any) -> Any:
        try:
            if rule is not None:
                return rule(*args, **kwargs)
        except (TypeError, AttributeError, ValueError) as error:  # arguments that the rule does not know
            raise UnsupportedError(f"no rule for {name} with these arguments ({error})") from error
        raise UnsupportedError(f"no rule for {name}")


def _all_int(values: Any) -> bool:
    return all(isinstance(value, int) for value in values)


def _g(n: int) -> float:
    return n * UNIT / (1 - n * UNIT)


def _more(error: Tensor, n: int) -> Tensor:
    """An error bound enlarged beyond the round-off of the fewer than n operations that computed it."""
    return error * (1 + 2 * _g(n + 4)) + n * TINY


def _exact(value: Tensor) -> Bounded:
    return Bounded(value, torch.zeros_like(value))


def _constant(value: Bounded) -> Tensor:
    if value.error.any():
        raise UnsupportedError("no rule for a product or quotient of two computed values with weights")
    return value.value


def _lift(value: Any, like: Bounded) -> Bounded:
    if isinstance(value, Bounded):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= 2**53:
        raise UnsupportedError(f"no rule for the operand {value!r}")
    return _exact(torch.tensor(float(value), dtype=torch.float64).expand_as(like.value))


# Affine operations -------------------------------------------------------------------------------------------------


def _dot(
    x: Bounded, product: Callable[[Tensor, Tensor], Tensor], W: Tensor, b: Tensor | None, n: int
) -> Bounded:
    """``W x + b`` for a product whose dot products have length n; ``b`` is shaped like the result."""
    value = product(x.value, W)
    error = product(x.error + _g(n + 2) * x.value.abs(), W.abs())
    if b is not None:
        value, error = value + b, error + _g(n + 2) * b.abs()
    return Bounded(value, _more(error, n + 4))


def _linear(x: Bounded, weight: Bounded, bias: Bounded | None = None) -> Bounded:
    W = _constant(weight)
    return _dot(x, F.linear, W, _constant(bias) if bias is not None else None, W.shape[1])


def _conv2d(
    x: Bounded, weight: Bounded, bias: Bounded | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Bounded:  # fmt: skip
    W = _constant(weight)
    if isinstance(padding, str) or x.value.ndim != 4:
        raise UnsupportedError("no rule for a convolution with named padding, or of an image without a batch")
    images, (h, w) = len(x.value), x.value.shape[2:]
    kernel = tuple(W.shape[2:])
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    out = (
        (h + 2 * ph - dh * (kernel[0] - 1) - 1) // sh + 1,
        (w + 2 * pw - dw * (kernel[1] - 1) - 1) // sw + 1,
    )

    def product(values: Tensor, matrix: Tensor) -> Tensor:
        columns = F.unfold(values, kernel, (dh, dw), (ph, pw), (sh, sw))
        columns = columns.view(images, groups, -1, columns.shape[2])
        return (matrix.reshape(groups, -1, columns.shape[2]) @ columns).reshape(images, len(matrix), *out)

    b = _constant(bias).view(1, -1, 1, 1) if bias is not None else None
    return _dot(x, product, W, b, W[0].numel())


def _pair(value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    return (pair[0], pair[0]) if len(pair) == 1 else (pair[0], pair[1])


def _linear_module(m: nn.Module, x: Bounded) -> Bounded:
    assert isinstance(m, nn.Linear)
    return _linear(x, _exact(m.weight), _exact(m.bias) if m.bias is not None else None)


def _conv2d_module(m: nn.Module, x: Bounded) -> Bounded:
    assert isinstance(m, nn.Conv2d)
    if m.padding_mode != "zeros":
        raise UnsupportedError(f"no rule for a convolution with padding mode {m.padding_mode}")
    bias = _exact(m.bias) if m.bias is not None else None
    return _conv2d(x, _exact(m.weight), bias, m.stride, m.padding, m.dilation, m.groups)


def _batch_norm(m: nn.Module, x: Bounded) -> Bounded:
    """``(x - mean) * (gamma / sqrt(var + eps)) + beta``; the scale has five roundings at most."""
    assert isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
    if m.running_mean is None or m.running_var is None:
        raise UnsupportedError("no rule for batch norm without running statistics")
    shape = (1, -1, *([1] * (x.value.ndim - 2)))
    gamma: Tensor = torch.ones_like(m.running_var) if m.weight is None else m.weight
    scale = gamma / (m.running_var + m.eps).sqrt()
    beta: Tensor = torch.zeros_like(scale) if m.bias is None else m.bias
    mean, scale, beta = m.running_mean.view(shape), scale.view(shape), beta.view(shape)
    shifted = x.value - mean
    value = shifted * scale + beta
    error = x.error * scale.abs() * (1 + _g(8)) + _g(10) * (shifted * scale).abs() + _g(2) * value.abs()
    return Bounded(value, _more(error, 16))


def _averaging(x: Bounded, op: Callable[[Tensor], Tensor], n: int) -> Bounded:
    """An operation that sums at most n entries with one non-negative weight."""
    error = op(x.error) + _g(n + 2) * op(x.value.abs())
    return Bounded(op(x.value), _more(error, n + 4))


def _entries(x: Bounded) -> int:
    return x.value[0].numel()


def _avg_pool2d(x: Bounded, *args: Any, **kwargs: Any) -> Bounded:
    return _averaging(x, lambda t: F.avg_pool2d(t, *args, **kwargs), _entries(x))


def _avg_pool2d_module(m: nn.Module, x: Bounded) -> Bounded:
    if isinstance(m, nn.AvgPool2d) and m.divisor_override is not None and m.divisor_override < 1:
        raise UnsupportedError("no rule for average pooling with a divisor below 1")
    return _averaging(x, m, _entries(x))


def _adaptive_avg_pool2d(x: Bounded, output_size: Any) -> Bounded:
    return _averaging(x, lambda t: F.adaptive_avg_pool2d(t, output_size), _entries(x))


def _mean(x: Bounded, dim: Any, keepdim: bool = False) -> Bounded:
    return _averaging(x, lambda t: t.mean(dim, keepdim), x.value.numel())


# Arithmetic --------------------------------------------------------------------------------------------------------


def _add(a: Any, b: Any) -> Bounded:
    a, b = _both(a, b)
    value = a.value + b.value
    return Bounded(value, _more(a.error + b.error + UNIT * value.abs(), 8))


def _sub(a: Any, b: Any) -> Bounded:
    a, b = _both(a, b)
    return _add(a, Bounded(-b.value, b.error))


def _mul(a: Any, b: Any) -> Bounded:
    a, b = _both(a, b)
    value = a.value * b.value
    error = a.value.abs() * b.error + b.value.abs() * a.error + a.error * b.error + 2 * UNIT * value.abs()
    return Bounded(value, _more(error, 8))


def _div(a: Any, b: Any) -> Bounded:
    a, b = _both(a, b)
    divisor = _constant(b)
    value = a.value / divisor
    return Bounded(value, _more(a.error / divisor.abs() + 2 * UNIT * value.abs(), 8))


def _both(a: Any, b: Any) -> tuple[Bounded, Bounded]:
    like = a if isinstance(a, Bounded) else b
    return _lift(a, like), _lift(b, like)


# Operations without round-off --------------------------------------------------------------------------------------


def _relu(x: Bounded, inplace: bool = False) -> Bounded:
    """Rectifying moves two numbers no further apart, so the error stays."""
    return _written(x, Bounded(x.value.clamp(min=0), x.error.clone()), inplace)


def _clamp(x: Bounded, low: float, high: float, inplace: bool = False) -> Bounded:
    return _written(x, Bounded(x.value.clamp(low, high), x.error.clone()), inplace)


def _written(x: Bounded, result: Bounded, inplace: bool) -> Bounded:
    """In-place operations change what later readers of ``x``, and of views of it, see."""
    if not inplace:
        return result
    x.value.copy_(result.value)
    x.error.copy_(result.error)
    return x


def _max_pool2d(x: Bounded, *args: Any, **kwargs: Any) -> Bounded:
    """The largest of some entries is off by the largest of their errors at most."""
    return Bounded(F.max_pool2d(x.value, *args, **kwargs), F.max_pool2d(x.error, *args, **kwargs))


def _moving(op: Callable[..., Tensor]) -> Callable[..., Bounded]:
    """An operation that only moves entries."""
    return lambda x, *args, **kwargs: Bounded(op(x.value, *args, **kwargs), op(x.error, *args, **kwargs))


def _cat(parts: Any, dim: int = 0) -> Bounded:
    return Bounded(torch.cat([p.value for p in parts], dim), torch.cat([p.error for p in parts], dim))


def _neg(x: Bounded) -> Bounded:
    return Bounded(-x.value, x.error)


# Steps: comparing numbers that are known exactly, and looking up a table ---------------------------------------------


def _bucketize(x: Bounded, borders: Bounded, right: bool = False) -> Tensor:
    """Integers; where the value compared has an error, the comparison could come out either way."""
    if x.error.any():
        raise UnsupportedError("no rule for the bucket of a computed value")
    return torch.bucketize(x.value, _constant(borders), right=right)


def _take(table: Bounded, index: Tensor) -> Bounded:
    return Bounded(torch.take(table.value, index), torch.take(table.error, index))


MODULES: dict[type[nn.Module], Callable[[nn.Module, Bounded], Bounded]] = {
    nn.Linear: _linear_module,
    nn.Conv2d: _conv2d_module,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.AvgPool2d: _avg_pool2d_module,
    nn.AdaptiveAvgPool2d: _avg_pool2d_module,
    nn.MaxPool2d: lambda m, x: Bounded(m(x.value), m(x.error)),
    nn.ReLU: lambda m, x: _relu(x, bool(m.inplace)),
    nn.ReLU6: lambda m, x: _clamp(x, 0.0, 6.0, bool(m.inplace)),
    nn.Identity: lambda m, x: x,
    nn.Dropout: lambda m, x: x,
    nn.Dropout2d: lambda m, x: x,
    nn.Flatten: lambda m, x: _moving(m)(x),
}
"""Rules by exact type: a subclass may compute something else."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.conv2d: _conv2d,
    torch.conv2d: _conv2d,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    F.max_pool2d: _max_pool2d,
    F.relu: _relu,
    torch.relu: _relu,
    torch.flatten: _moving(torch.flatten),
    torch.cat: _cat,
    torch.bucketize: _bucketize,
    torch.take: _take,
    torch.mean: _mean,
    torch.neg: _neg,
    operator.neg: _neg,
    operator.iadd: lambda a, b: _written(a, _add(a, b), inplace=True),
    getattr: lambda x, name: tuple(x.value.shape) if name == "shape" else _missing(name),
    **dict.fromkeys((operator.add, torch.add), _add),
    **dict.fromkeys((operator.sub, torch.sub), _sub),
    **dict.fromkeys((operator.mul, torch.mul), _mul),
    **dict.fromkeys((operator.truediv, torch.div), _div),
}

METHODS: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "relu": _relu,
    "relu_": lambda x: _relu(x, inplace=True),
    "mean": _mean,
    "size": lambda x, *args: x.value.size(*args),
    **{
        name: _moving(getattr(Tensor, name))
        for name in ("flatten", "view", "reshape", "squeeze", "unsqueeze")
    },
}


def _missing(name: str) -> Any:
    raise UnsupportedError(f"no rule for the attribute {name}")
