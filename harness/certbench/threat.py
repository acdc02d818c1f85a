"""Radii as exact fractions, and the only two roundings they ever meet.

A radius is written as a string, ``"8/255"`` or ``"0.1"``, and kept as a :class:`fractions.Fraction` of the pixel
range [0, 1]. Where a certifier needs a float it takes the one *above* the fraction, so that what was proved covers
what was asked; where a certified radius is reported it is rounded *down*.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction


def parse_radius(text: object) -> Fraction:
    """An exact radius in (0, 1].

    Raises:
        ValueError: not a string, not a number, or outside (0, 1].
    """
    radius = _parse(text)
    if not 0 < radius <= 1:
        raise ValueError(
            f"a radius lies above 0 and at most at 1, in units of the pixel range [0, 1]; got {text!s}"
        )
    return radius


def parse_distance(text: object) -> Fraction:
    """An exact L2 distance between images, 0 included; unlike an L-inf radius it may exceed the pixel range.

    Raises:
        ValueError: not a string, not a number, or negative.
    """
    distance = _parse(text)
    if distance < 0:
        raise ValueError(f"a distance is not negative; got {text!s}")
    return distance


def _parse(text: object) -> Fraction:
    if isinstance(text, Fraction):
        return text
    if not isinstance(text, str):
        raise ValueError(
            f'a radius is written in quotes, as an exact fraction: "8/255" or "0.1", not {text!r}'
        )
    if not re.fullmatch(r"\s*[+-]?(\d{1,20}(\s*/\s*\d{1,20})?|\d{0,20}\.\d{1,20})\s*", text, re.ASCII):
        raise ValueError(f'{_short(text)} is not a fraction such as "8/255" or "0.1"')
    try:
        return Fraction(re.sub(r"\s", "", text))
    except ZeroDivisionError:
        raise ValueError(f"{text!r} divides by zero") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def format_radius(radius: Fraction) -> str:
    """The way people write it: ``8/255`` where 255 is a multiple of the denominator, else ``0.1``, else ``p/q``."""
    if radius.denominator > 1 and 255 % radius.denominator == 0 and radius.denominator != 5:
        return f"{radius * 255}/255"
    if 10**9 % radius.denominator == 0:  # nine decimals write it exactly
        return f"{float(radius):.9f}".rstrip("0").rstrip(".")
    return str(radius)


def round_up(radius: Fraction) -> float:
    """The smallest float64 that is not below the fraction."""
    value = float(radius)
    return value if Fraction(value) >= radius else math.nextafter(value, math.inf)


def round_down(radius: Fraction) -> float:
    """The largest float64 that is not above the fraction."""
    value = float(radius)
    return value if Fraction(value) <= radius else math.nextafter(value, -math.inf)
