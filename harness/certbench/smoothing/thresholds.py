"""Thresholds at which uniform integers become normal noise on a grid, correct to the last bit."""

from __future__ import annotations

from decimal import Context, Decimal, localcontext
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

BITS = 60
"""Of the uniform integers."""
_DIGITS = 60
_FAR = 10
"""Beyond so many standard deviations a normal variable lies with less than 2^-60 of probability: it is 7.6e-24."""


def noise_thresholds(sigma: float, levels: int, most: int) -> NDArray[np.int64]:
    """``floor(2^60 Phi((2 m + 1) / (2 levels sigma)))`` for m = -most to most - 1, int64, shape (2 most,).

    A uniform variable U in [0, 1) is below Phi(m) where its first 60 bits, as an integer, are below the threshold, and
    above where they are above. Where they are equal nothing can be said.
    """
    with localcontext(Context(prec=_DIGITS)):
        step = 2 * levels * Fraction(sigma)
        upper = [_threshold(_decimal((2 * m + 1) / step)) for m in range(most)]
    # Phi(-z) = 1 - Phi(z), and neither is a multiple of 2^-60
    lower = [2**BITS - 1 - value for value in reversed(upper)]
    return np.array(lower + upper, dtype=np.int64)


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def _threshold(z: Decimal) -> int:
    if z > _FAR:
        return (1 << BITS) - 1
    scaled = normal_probability(z) * (1 << BITS)
    below = int(scaled)
    if min(scaled - below, below + 1 - scaled) < Decimal("1e-30"):
        raise ArithmeticError(f"the series does not tell on which side of an integer 2^{BITS} Phi({z}) lies")
    return below


def normal_probability(z: Decimal) -> Decimal:
    """Phi(z) for 0 <= z <= 10: 1/2 + phi(z) (z + z^3/3 + z^5/(3 5) + ...), whose terms are all positive.

    Each of at most a few hundred terms and the exponential err by units in the 60th digit. The sum ends where terms
    more than halve, so what is cut off is less than the last one: 50 digits are right.
    """
    term, total, k = z, z, 1
    while term > total * Decimal(10) ** -_DIGITS or k < 2 * z * z:
        k += 2
        term = term * z * z / k
        total += term
    density = (-z * z / 2).exp() / (2 * _PI).sqrt()
    return Decimal("0.5") + density * total


_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620900")
