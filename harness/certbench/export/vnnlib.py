"""One image's robustness as a VNN-LIB property: the ball as a box, and the negation of what is certified.

A verifier that answers ``unsat`` has proved the certificate's statement, provided that the box it worked on contains
the ball. So every bound is rounded outward, twice: to a float64, because that is what most tools read a decimal into,
and then to a decimal of at most ``PLACES`` places, which is exact for every float64 that has no more. Read as the
exact number it is, or as the nearest float64, the bound lies on the ball's end or outside.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from certbench.errors import UsageError
from certbench.threat import round_down, round_up

PLACES = 20


def property_text(
    image: Tensor, label: int, classes: int, radius: Fraction, notes: Iterable[str] = ()
) -> str:
    """The property of one image; ``unsat`` means that the label's logit is above every other in the whole ball.

    Args:
        image: raw pixels in [0, 1], shape (C, H, W), float32 as the network gets them; ``X_i`` is its i-th entry in
            row-major order.
        label: the class that must win strictly; a tie counts as a violation.
        classes: number of logits ``Y_j``.
        radius: L-inf radius as an exact fraction; the ball is cut to [0, 1].
        notes: lines for the comment at the head of the file.

    Raises:
        UsageError: an image that is not finite float32 in [0, 1], a label out of range, a single class, or a radius
            that is not positive.
    """
    _check(image, label, classes, radius)
    head = [
        *notes,
        f"Label {label}. L-inf ball of radius {radius}, exactly, around the float32 image, cut to [0, 1].",
        "X is the image in row-major order (channels, height, width), Y the logits.",
        f"Every bound is the ball's end, rounded outward to a float64 and that outward to {PLACES} decimals:",
        "the box contains the ball, whether bounds are read exactly or as float64.",
        f"unsat: class {label} wins strictly everywhere in the box. sat: it loses or ties somewhere.",
    ]
    return "\n".join(
        [
            *(f"; {_one_line(note)}" for note in head),
            "",
            *(f"(declare-const X_{i} Real)" for i in range(image.numel())),
            *(f"(declare-const Y_{j} Real)" for j in range(classes)),
            "",
            *_box(image, radius),
            "",
            "(assert (or",
            *(f"    (and (<= Y_{label} Y_{j}))" for j in range(classes) if j != label),
            "))",
            "",
        ]
    )


def _check(image: Tensor, label: int, classes: int, radius: Fraction) -> None:
    if image.dtype != torch.float32 or image.ndim != 3 or not image.numel():
        raise UsageError(
            f"a property is of one float32 image (C, H, W), not {image.dtype} {tuple(image.shape)}"
        )
    if not ((image >= 0) & (image <= 1)).all():  # NaN is in no order
        raise UsageError("a property is of an image in [0, 1]; pixels outside, or NaN, were given")
    if not 0 <= label < classes or classes < 2:
        raise UsageError(f"label {label} is none of {classes} classes, of which there must be at least two")
    if radius <= 0:
        raise UsageError(f"a radius lies above 0; got {radius}")


def _box(image: Tensor, radius: Fraction) -> Iterator[str]:
    for i, pixel in enumerate(image.flatten().tolist()):
        lower, upper = _ends(pixel, radius)
        yield f"(assert (>= X_{i} {lower}))"
        yield f"(assert (<= X_{i} {upper}))"


@lru_cache(maxsize=1024)  # the pixels of a data set take few values
def _ends(pixel: float, radius: Fraction) -> tuple[str, str]:
    """Lower and upper bound of one pixel as decimals, rounded outward and within [0, 1]."""
    center = Fraction(pixel)
    lower, upper = max(center - radius, Fraction(0)), min(center + radius, Fraction(1))
    scale = 10**PLACES
    return (
        _decimal(Fraction(round_down(lower)) * scale // 1),
        _decimal(-(-Fraction(round_up(upper)) * scale // 1)),
    )


def _decimal(scaled: int) -> str:
    """``scaled / 10**PLACES``, which is not negative, without an exponent and without idle zeros."""
    whole, part = divmod(scaled, 10**PLACES)
    return f"{whole}.{f'{part:0{PLACES}}'.rstrip('0') or '0'}"


def _one_line(text: str) -> str:
    """A comment ends with its line: what a recipe calls itself must not become part of the property."""
    return re.sub(r"[^ -~]+", " ", text)
