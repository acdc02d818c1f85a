"""Numbers with error bounds, and the rules of affine layers, arithmetic and selections on them.

Each value is a pair (v, e) of float64 tensors with ``|v - exact| <= e``, where *exact* is what the stored weights give
in real arithmetic. With u = 2^-53, ``g(n) = n u / (1 - n u)`` and a dot product of length n with a bias, in any order
of summation and with or without fused multiply-add,

    |fl(W v + b) - (W exact + b)|  <=  |W| e + g(n + 1) (|W| |v| + |b|) .

The bound is itself computed in floating point; every rule enlarges it by more than its own round-off, and by ``TINY``
for what may underflow. Products are evaluated as sums of products (an unfolded image times a matrix) on the CPU, so
no fast convolution algorithm can break that assumption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
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


def g(n: int) -> float:
    return n * UNIT / (1 - n * UNIT)


def more(error: Tensor, n: int) -> Tensor:
    """An error bound enlarged beyond the round-off of the fewer than n operations that computed it."""
    return error * (1 + 2 * g(n + 4)) + n * TINY


def exact(value: Tensor) -> Bounded:
    return Bounded(value, torch.zeros_like(value))


def constant(value: Bounded) -> Tensor:
    if value.error.any():
        raise UnsupportedError("no rule for a product or quotient of two computed values with weights")
    return value.value


def lift(value: Any, like: Bounded) -> Bounded:
    if isinstance(value, Bounded):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= 2**53:
        raise UnsupportedError(f"no rule for the operand {value!r}")
    return exact(torch.tensor(float(value), dtype=torch.float64).expand_as(like.value))


# Affine operations -------------------------------------------------------------------------------------------------


def _dot(
    x: Bounded, product: Callable[[Tensor, Tensor], Tensor], W: Tensor, b: Tensor | None, n: int
) -> Bounded:
    """``W x + b`` for a product whose dot products have length n; ``b`` is shaped like the result."""
    value = product(x.value, W)
    error = product(x.error + g(n + 2) * x.value.abs(), W.abs())
    if b is not None:
        value, error = value + b, error + g(n + 2) * b.abs()
    return Bounded(value, more(error, n + 4))


def linear(x: Bounded, weight: Bounded, bias: Bounded | None = None) -> Bounded:
    W = constant(weight)
    return _dot(x, F.linear, W, constant(bias) if bias is not None else None, W.shape[1])


def conv2d(
    x: Bounded, weight: Bounded, bias: Bounded | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Bounded:  # fmt: skip
    W = constant(weight)
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

    b = constant(bias).view(1, -1, 1, 1) if bias is not None else None
    return _dot(x, product, W, b, W[0].numel())


def _pair(value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    return (pair[0], pair[0]) if len(pair) == 1 else (pair[0], pair[1])


def linear_module(m: nn.Module, x: Bounded) -> Bounded:
    assert isinstance(m, nn.Linear)
    return linear(x, exact(m.weight), exact(m.bias) if m.bias is not None else None)


def conv2d_module(m: nn.Module, x: Bounded) -> Bounded:
    assert isinstance(m, nn.Conv2d)
    if m.padding_mode != "zeros":
        raise UnsupportedError(f"no rule for a convolution with padding mode {m.padding_mode}")
    bias = exact(m.bias) if m.bias is not None else None
    return conv2d(x, exact(m.weight), bias, m.stride, m.padding, m.dilation, m.groups)


def batch_norm(m: nn.Module, x: Bounded) -> Bounded:
    """``(x - mean) * (gamma / sqrt(var + eps)) + beta``; the scale has five roundings at most."""
    assert isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
    if m.running_mean is None or m.running_var is None:
        raise UnsupportedError("no rule for batch norm without running statistics")
    shape = (1, -1, *([1] * (x.value.ndim - 2)))
    gamma: Tensor = torch.ones_like(m.running_var) if m.weight is None else m.weight
    scale = gamma / (m.running_var + m.eps).sqrt()
    beta: Tensor = torch.zeros_like(scale) if m.bias is None else m.bias
    middle, scale, beta = m.running_mean.view(shape), scale.view(shape), beta.view(shape)
    shifted = x.value - middle
    value = shifted * scale + beta
    error = x.error * scale.abs() * (1 + g(8)) + g(10) * (shifted * scale).abs() + g(2) * value.abs()
    return Bounded(value, more(error, 16))


def _averaging(x: Bounded, op: Callable[[Tensor], Tensor], n: int) -> Bounded:
    """An operation that sums at most n entries with one non-negative weight."""
    error = op(x.error) + g(n + 2) * op(x.value.abs())
    return Bounded(op(x.value), more(error, n + 4))


def _entries(x: Bounded) -> int:
    return x.value[0].numel()


def avg_pool2d(x: Bounded, *args: Any, **kwargs: Any) -> Bounded:
    return _averaging(x, lambda t: F.avg_pool2d(t, *args, **kwargs), _entries(x))


def avg_pool2d_module(m: nn.Module, x: Bounded) -> Bounded:
    if isinstance(m, nn.AvgPool2d) and m.divisor_override is not None and m.divisor_override < 1:
        raise UnsupportedError("no rule for average pooling with a divisor below 1")
    return _averaging(x, m, _entries(x))


def adaptive_avg_pool2d(x: Bounded, output_size: Any) -> Bounded:
    return _averaging(x, lambda t: F.adaptive_avg_pool2d(t, output_size), _entries(x))


def mean(x: Bounded, dim: Any, keepdim: bool = False) -> Bounded:
    return _averaging(x, lambda t: t.mean(dim, keepdim), x.value.numel())


# Arithmetic --------------------------------------------------------------------------------------------------------


def add(a: Any, b: Any) -> Bounded:
    a, b = _both(a, b)
    value = a.value + b.value
    return Bounded(value, more(a.error + b.error + UNIT * value.abs(), 8))


def sub(a: Any, b: Any) -> Bounded:
    a, b = _both(a, b)
    return add(a, Bounded(-b.value, b.error))


def mul(a: Any, b: Any) -> Bounded:
    a, b = _both(a, b)
    value = a.value * b.value
    error = a.value.abs() * b.error + b.value.abs() * a.error + a.error * b.error + 2 * UNIT * value.abs()
    return Bounded(value, more(error, 8))


def div(a: Any, b: Any) -> Bounded:
    a, b = _both(a, b)
    divisor = constant(b)
    value = a.value / divisor
    return Bounded(value, more(a.error / divisor.abs() + 2 * UNIT * value.abs(), 8))


def _both(a: Any, b: Any) -> tuple[Bounded, Bounded]:
    like = a if isinstance(a, Bounded) else b
    return lift(a, like), lift(b, like)


# Operations without round-off --------------------------------------------------------------------------------------


def relu(x: Bounded, inplace: bool = False) -> Bounded:
    """Rectifying moves two numbers no further apart, so the error stays."""
    return written(x, Bounded(x.value.clamp(min=0), x.error.clone()), inplace)


def clamp(x: Bounded, low: float | None, high: float | None, inplace: bool = False) -> Bounded:
    return written(x, Bounded(x.value.clamp(low, high), x.error.clone()), inplace)


def written(x: Bounded, result: Bounded, inplace: bool) -> Bounded:
    """In-place operations change what later readers of ``x``, and of views of it, see."""
    if not inplace:
        return result
    x.value.copy_(result.value)
    x.error.copy_(result.error)
    return x


def max_pool2d(x: Bounded, *args: Any, **kwargs: Any) -> Bounded:
    """The largest of some entries is off by the largest of their errors at most."""
    return Bounded(F.max_pool2d(x.value, *args, **kwargs), F.max_pool2d(x.error, *args, **kwargs))


def moving(op: Callable[..., Tensor]) -> Callable[..., Bounded]:
    """An operation that only moves entries."""
    return lambda x, *args, **kwargs: Bounded(op(x.value, *args, **kwargs), op(x.error, *args, **kwargs))


def cat(parts: Any, dim: int = 0) -> Bounded:
    return Bounded(torch.cat([p.value for p in parts], dim), torch.cat([p.error for p in parts], dim))


def neg(x: Bounded) -> Bounded:
    return Bounded(-x.value, x.error)


# Steps: comparing numbers that are known exactly, and looking up a table ---------------------------------------------


def bucketize(x: Bounded, borders: Bounded, right: bool = False) -> Tensor:
    """Integers; where the value compared has an error, the comparison could come out either way."""
    if x.error.any():
        raise UnsupportedError("no rule for the bucket of a computed value")
    return torch.bucketize(x.value, constant(borders), right=right)


def take(table: Bounded, index: Tensor) -> Bounded:
    return Bounded(torch.take(table.value, index), torch.take(table.error, index))
