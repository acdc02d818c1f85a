"""The abstraction map: every pixel is replaced by the end points of the interval it lies in (arXiv 2303.11552).

The map is deployed as comparisons with a table of borders and two tables of end points, so no arithmetic is rounded: it
is the same function in every floating-point type that holds float32. Interval rules for the two operations stand at
the end, so that the core's own certifiers can read networks that begin with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from certbench.bounds import Box, interval_rule, sound_rule
from certbench.errors import UsageError


class Abstraction(nn.Module):
    """``alpha_n``: raw pixels, shape (batch, C, ...), to end points ``[U, L]`` in [-1, 1], shape (batch, 2 C, ...).

    Interval k is ``[k/n, (k+1)/n)``, the last one closed, in raw pixels; values outside [0, 1] go to the end intervals.
    A border is k/n rounded to float32, as an 8-bit image is, so the interval of code p is exactly
    ``min(p n // 255, n - 1)``: of two fractions, equal ones round to equal numbers and these are far enough apart not
    to meet otherwise.

    Raises:
        UsageError: n below 2.
    """

    borders: Tensor
    upper: Tensor
    lower: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        if n < 2:
            raise UsageError(f"an abstraction needs two intervals or more, not {n}")
        k = torch.arange(n + 1, dtype=torch.float32)
        self.register_buffer("borders", k[1:-1] / torch.tensor(float(n)))
        ends = (2 * k.double() / n - 1).float()
        self.register_buffer("upper", ends[1:].clone())
        self.register_buffer("lower", ends[:-1].clone())

    @property
    def n(self) -> int:
        return len(self.upper)

    def forward(self, t: Tensor) -> Tensor:
        return self.encode(torch.bucketize(t, self.borders, right=True))

    def index(self, t: Tensor) -> Tensor:
        """The interval of every pixel, int64, for pixels in float32 or float64."""
        return torch.bucketize(t, self.borders.to(t.dtype), right=True)

    def encode(self, k: Tensor) -> Tensor:
        """The network's input for intervals k (batch, C, ...): upper ends first."""
        return torch.cat([torch.take(self.upper, k), torch.take(self.lower, k)], 1)

    def gradient_surrogate(self) -> nn.Module:
        """What an attack follows, since the map itself has no gradient; see :mod:`certbench.audit.search`."""
        return StraightThrough(self)


class StraightThrough(nn.Module):
    """The abstraction with the gradient of ``t -> [2 t, 2 t]``: that of both end points, added up."""

    def __init__(self, abstraction: Abstraction) -> None:
        super().__init__()
        self.abstraction = [
            abstraction
        ]  # in a list, so that it is no submodule that asks to be replaced again

    def forward(self, t: Tensor) -> Tensor:
        z: Tensor = _PassGradient.apply(t, self.abstraction[0])
        return z


class _PassGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, abstraction: Abstraction) -> Tensor:
        return abstraction(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        upper, lower = grad.chunk(2, 1)
        return 2 * (upper + lower), None


# Rules of the bound engine -----------------------------------------------------------------------------------------------


@interval_rule("aten.bucketize.Tensor")
def bucketize(x: Box, borders: Tensor, *, right: bool = False, **_: Any) -> Box:
    return x.ends(lambda end: torch.bucketize(end, borders.to(end.dtype), right=right))


@interval_rule("aten.take.default")
def take(table: Tensor, index: Box) -> Box:
    if not bool((table[1:] >= table[:-1]).all()):
        raise UsageError("no interval rule looks up a table that does not rise")
    return index.ends(lambda end: torch.take(table, end))


@sound_rule("aten.bucketize.Tensor")
def sound_bucketize(run: Any, x: Box, borders: Tensor, **options: Any) -> Box:
    """Comparing is exact, unless the pixel is rounded first."""
    if run.precision.storage:
        raise UsageError(
            f"intervals of pixels stored in {run.precision.name} are not those of the images; certify for float32"
        )
    return bucketize(x, borders, **options)


@sound_rule("aten.take.default")
def sound_take(_run: Any, table: Tensor, index: Box) -> Box:
    return take(table, index)
