"""What deployment in floating point can do to a number: the constants of float-sound bounds.

Every constant that a bound is multiplied by is computed in exact arithmetic and rounded up once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from certbench.errors import UsageError, nearest
from certbench.threat import round_up

FLOAT64_UNIT = 2.0**-53
FLOAT64_SMALLEST = 2.0**-1022
FLOAT32_SMALLEST = 2.0**-126
FLOAT32_LARGEST = (2 - 2.0**-23) * 2.0**127


@dataclass(frozen=True)
class Precision:
    """A way to deploy a network. Relative constants are unit round-offs, absolute ones what may become zero.

    ``accumulator`` (v) belongs to the sums of a dot product, ``operand`` (w) to each factor of its products,
    ``storage`` to a result that is written back. Below ``flush`` (f) an operand or result may become zero, below
    ``sum_flush`` a product or partial sum. Above ``largest`` a result overflows, above ``sum_largest`` a partial sum.
    ``unit`` (u) and ``unit_flush`` belong to the arithmetic that computes the bounds, which is float64.
    """

    name: str
    accumulator: float
    operand: float
    storage: float
    flush: float
    sum_flush: float
    largest: float
    sum_largest: float
    unit: float = FLOAT64_UNIT
    unit_flush: float = FLOAT64_SMALLEST

    def product(self, n: int, bias: bool) -> float:
        """G: the relative round-off of a dot product of length n with a bias, on ``|W| |x| + |b|``.

        A bias may be added after the product was written back, hence the factor for storage.
        """
        sums = 1 + _exact_gamma(n + 1, self.accumulator)
        operands = (1 + Fraction(self.operand)) ** 2
        return _rounded_up(operands * sums * (1 + Fraction(self.storage) * bias) - 1)

    def logit(self, n: int, bias: bool) -> float:
        """The same for a logit, which is written back before it is compared."""
        return _rounded_up((1 + Fraction(self.product(n, bias))) * (1 + Fraction(self.storage)) - 1)

    def elementwise(self, roundings: int) -> float:
        """The relative round-off of a chain of ``roundings`` operations on two operands that were written back.

        Where an operand is a constant, its conversion counts as one of the roundings.
        """
        return _rounded_up(
            (1 + Fraction(self.storage)) ** 2 * (1 + Fraction(self.accumulator)) ** roundings - 1
        )

    def quotient(self) -> float:
        """Division by a constant, by way of its rounded reciprocal or not."""
        s, v = Fraction(self.storage), Fraction(self.accumulator)
        return _rounded_up((1 + s) * (1 + v) ** 2 / ((1 - s) * (1 - v)) - 1)

    def batch_norm(self) -> float:
        """Scale and shift in any of the usual orders: at most twelve roundings, and four stored factors."""
        stored = (1 + Fraction(self.storage)) ** 4
        return _rounded_up(stored * (1 + _exact_gamma(12, self.accumulator)) - 1)

    def average(self, n: int) -> float:
        """A sum of n stored values, divided by their number."""
        return _rounded_up((1 + Fraction(self.storage)) * (1 + _exact_gamma(n + 2, self.accumulator)) - 1)

    def library(self) -> float:
        """One unit round-off of a library function, as it is called at deployment and in float64."""
        return _rounded_up(_exact_gamma(1, self.accumulator) + _exact_gamma(1, self.unit))

    def own(self, n: int) -> float:
        """g(n, u): what float64 itself may lose over n operations."""
        return gamma(n, self.unit)

    def cover(self, n: int) -> float:
        """The factor by which a sum of n products of non-negative numbers, computed in float64, is never too small."""
        return _rounded_up(1 + 2 * _exact_gamma(n + 8, self.unit))


def _precision(
    name: str,
    v: float,
    w: float,
    storage: float,
    f: float = FLOAT32_SMALLEST,
    largest: float = FLOAT32_LARGEST,
) -> Precision:
    return Precision(name, v, w, storage, f, FLOAT32_SMALLEST, largest, FLOAT32_LARGEST)


FLOAT64_LARGEST = math.ldexp(2 - 2.0**-52, 1023)
# Tensor cores cut off rather than round and keep few guard bits, hence 2^-22 where they may be used.
PRECISIONS = {
    "float32": _precision("float32", 2.0**-24, 0.0, 0.0),
    "float64": Precision(
        "float64", 2.0**-53, 0.0, 0.0, FLOAT64_SMALLEST, FLOAT64_SMALLEST, FLOAT64_LARGEST, FLOAT64_LARGEST
    ),
    "tf32": _precision("tf32", 2.0**-22, 2.0**-10, 0.0),
    "bf16": _precision("bf16", 2.0**-22, 2.0**-8, 2.0**-8, largest=(2 - 2.0**-7) * 2.0**127),
    "fp16": _precision("fp16", 2.0**-22, 2.0**-11, 2.0**-11, f=2.0**-14, largest=65504.0),
}


def find_precision(name: str) -> Precision:
    """
    Raises:
        UsageError: unknown name; says the nearest known one.
    """
    if name not in PRECISIONS:
        raise UsageError(f"unknown deployment precision {name!r}; {nearest(name, PRECISIONS)}")
    return PRECISIONS[name]


@cache
def gamma(n: int, unit: float) -> float:
    """g(n, unit) = n unit / (1 - n unit), rounded up; infinite where n roundings can destroy every digit."""
    return _rounded_up(_exact_gamma(n, unit))


def _exact_gamma(n: int, unit: float) -> Fraction:
    share = n * Fraction(unit)
    return share / (1 - share) if share < 1 else Fraction(10) ** 400


def _rounded_up(value: Fraction) -> float:
    return math.inf if value > Fraction(10) ** 300 else round_up(value)
