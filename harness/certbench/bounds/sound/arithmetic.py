"""Float-sound rules of elementwise arithmetic: sums, and products and quotients with constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from certbench.bounds.box import Box
from certbench.bounds.sound.deployment import (
    Deployment,
    as_sound,
    forbid,
    refuse_boxes,
    slack_rule,
    sound_rule,
)
from certbench.bounds.sound.rounding import SoundBox, down, up
from certbench.errors import UsageError


@dataclass(frozen=True)
class Rounded:
    """An elementwise operation on a box, from which both of its rules follow.

    ``lower``, ``upper``: its image in real arithmetic, up to ``error``, which bounds the round-off at deployment and
    of these two numbers. ``terms``: the sizes of all that a linear bound of it adds. ``moved``: how far the rounding
    of a stored input moves the result, which ``lower`` and ``upper`` already cover.
    """

    lower: Tensor
    upper: Tensor
    error: Tensor
    terms: Tensor
    moved: Tensor | float = 0.0


RoundedRule = Callable[..., Rounded]


def both_rules(*operations: str) -> Callable[[RoundedRule], RoundedRule]:
    """Register the sound rule and the slack rule that a :class:`Rounded` image implies."""

    def register(rounded: RoundedRule) -> RoundedRule:
        def bounded(run: Deployment, *arguments: Any, **options: Any) -> SoundBox:
            found = rounded(run, *arguments, **options)
            return run.widened(found.lower, found.upper, found.error)

        def slack(run: Deployment, own: float, *arguments: Any, **options: Any) -> Tensor:
            found = rounded(run, *arguments, **options)
            return found.error + found.moved + own * found.terms

        sound_rule(*operations)(bounded)
        slack_rule(*operations)(slack)
        return rounded

    return register


@both_rules("aten.add.Tensor", "aten.add.Scalar")
def add(run: Deployment, a: Any, b: Any, alpha: float = 1) -> Rounded:
    """Two branches, or a branch and a constant."""
    if alpha != 1:
        raise UsageError(f"addition with alpha = {alpha} has no float-sound rule")
    a, b = constant(a, b), constant(b, a)
    p, terms = run.precision, a.magnitude + b.magnitude
    error = terms * p.elementwise(2) + 4 * p.flush
    return Rounded(down(a.lower + b.lower), up(a.upper + b.upper), error, terms)


@both_rules("aten.sub.Tensor", "aten.sub.Scalar")
def sub(run: Deployment, a: Any, b: Any, alpha: float = 1) -> Rounded:
    return add(run, a, neg(run, constant(b, a)), alpha)


@both_rules("aten.rsub.Tensor", "aten.rsub.Scalar")
def rsub(run: Deployment, a: Any, b: Any, alpha: float = 1) -> Rounded:
    return sub(run, b, a, alpha)


@sound_rule("aten.neg.default")
def neg(_run: Deployment, x: Box) -> SoundBox:
    return SoundBox(lower=-x.upper, upper=-x.lower)


slack_rule("aten.neg.default")(lambda *_: None)


@both_rules("aten.mul.Tensor", "aten.mul.Scalar")
def mul(run: Deployment, a: Any, b: Any) -> Rounded:
    """A branch times a constant."""
    if isinstance(a, Box) and isinstance(b, Box):
        raise UsageError(
            "no float-sound rule multiplies two values that both depend on the input; register one"
        )
    x, factor = (a, b) if isinstance(a, Box) else (b, a)
    x, factor = as_sound(x), constant(factor, x).lower
    p, size = run.precision, factor.abs()
    first, second = x.lower * factor, x.upper * factor
    lower, upper = down(torch.minimum(first, second)), up(torch.maximum(first, second))
    terms = x.magnitude * size
    error = terms * p.elementwise(2) + 2 * p.flush * (size + x.magnitude + 2)
    return Rounded(lower, upper, error, terms)


@both_rules("aten.div.Tensor", "aten.div.Scalar")
def div(run: Deployment, a: Box, b: Any) -> Rounded:
    refuse_boxes("division", b)
    x, divisor = as_sound(a), constant(b, a).lower
    p, size = run.precision, divisor.abs()
    # neither it nor its reciprocal flushes
    forbid(run, x, (size.amin() >= 4 * p.flush) & (size.amax() * 4 * p.flush <= 1))
    first, second = x.lower / divisor, x.upper / divisor
    lower, upper = down(torch.minimum(first, second)), up(torch.maximum(first, second))
    terms = x.magnitude / size
    return Rounded(lower, upper, terms * p.quotient() + 2 * p.flush * (1 / size + 1), terms)


def constant(value: Any, like: Any) -> SoundBox:
    """A constant as the box that holds it alone."""
    if isinstance(value, Box):
        return as_sound(value)
    values = torch.as_tensor(value, dtype=torch.float64, device=like.lower.device)
    return SoundBox(lower=values, upper=values)
