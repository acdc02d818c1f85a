"""Float-sound rules of operations that select or move entries: exact, whatever the arithmetic.

Rounding to the storage type is monotone, so it may as well happen after a maximum as before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from certbench.bounds import shapes
from certbench.bounds.box import Box
from certbench.bounds.interval import RULES as INTERVAL_RULES
from certbench.bounds.sound.deployment import SOUND_RULES, Deployment, as_sound, slack_rule, sound_rule
from certbench.bounds.sound.rounding import SoundBox

aten = torch.ops.aten

MOVES = (*sorted(shapes.MOVES), "aten.dropout.default", "aten.feature_dropout.default")
SELECTIONS = ("aten.relu.default", *sorted(shapes.MAXIMA))
PLAIN = ("aten.sym_size.int", "aten.zeros_like.default", "getitem")
"""Operations whose result is no box, or one of a list of boxes."""


def _as_intervals(operation: str) -> Callable[..., Any]:
    """The interval rule, which then is sound as it stands; outward rounding is in the box."""
    rule = INTERVAL_RULES[operation]
    return lambda _run, *arguments, **options: rule(*arguments, **options)


for _operation in (*MOVES, *SELECTIONS, *PLAIN):
    SOUND_RULES[_operation] = _as_intervals(_operation)
slack_rule(*MOVES)(lambda *_, **__: None)


@sound_rule("aten.adaptive_max_pool1d.default", "aten.adaptive_max_pool2d.default")
def adaptive_max_pool(_run: Deployment, x: Box, size: list[int]) -> list[Any]:
    pool = aten.adaptive_max_pool2d.default if len(size) == 2 else aten.adaptive_max_pool1d.default
    return [as_sound(x).ends(lambda end: pool(end, size)[0]), None]


@sound_rule("aten.chunk.default")
def chunk(_run: Deployment, x: Box, chunks: int, dim: int = 0) -> list[SoundBox]:
    return _pieces(x, lambda part: part.chunk(chunks, dim))


@sound_rule("aten.split.Tensor", "aten.split_with_sizes.default")
def split(_run: Deployment, x: Box, sizes: Any, dim: int = 0) -> list[SoundBox]:
    return _pieces(x, lambda part: torch.split(part, sizes, dim))


def _pieces(x: Box, cut: Callable[[Tensor], tuple[Tensor, ...]]) -> list[SoundBox]:
    ends = zip(cut(x.lower), cut(x.upper), strict=True)
    return [SoundBox(lower=lower, upper=upper) for lower, upper in ends]


@sound_rule("aten.cat.default")
def cat(_run: Deployment, parts: list[Box | Tensor], dim: int = 0) -> SoundBox:
    """Constants among the parts are weights, so they are numbers of the deployed type."""
    lower = [part.lower if isinstance(part, Box) else part for part in parts]
    upper = [part.upper if isinstance(part, Box) else part for part in parts]
    return SoundBox(lower=torch.cat(lower, dim), upper=torch.cat(upper, dim))


@slack_rule("aten.cat.default")
def cat_slack(_run: Deployment, own: float, parts: list[SoundBox | Tensor], dim: int = 0) -> Tensor:
    """Coefficients are cut apart, which is exact; constants are summed up."""
    sizes = [torch.zeros_like(p.lower) if isinstance(p, Box) else p.abs() for p in parts]
    return own * torch.cat(sizes, dim)


@sound_rule("aten.pad.default", "aten.constant_pad_nd.default")
def pad(
    run: Deployment, x: Box, widths: list[int], mode: str = "constant", value: float | None = None
) -> SoundBox:
    x, moved = as_sound(x), run.converting(value or 0.0)
    lower = aten.pad.default(x.lower, widths, mode, value)
    upper = aten.pad.default(x.upper, widths, mode, value)
    if not moved:
        return SoundBox(lower=lower, upper=upper)
    return run.widened(lower, upper, _frame(x, widths, moved))


@slack_rule("aten.pad.default", "aten.constant_pad_nd.default")
def pad_slack(
    run: Deployment,
    own: float,
    x: SoundBox,
    widths: list[int],
    mode: str = "constant",
    value: float | None = None,
) -> Tensor:
    """A reflected entry has its coefficients summed up, and so has the constant of a frame."""
    size = aten.pad.default(x.magnitude, widths, mode, None if mode != "constant" else abs(value or 0.0))
    moved = run.converting(value or 0.0)
    slack: Tensor = own * size + (_frame(x, widths, moved) if moved else 0.0)
    return slack


def _frame(x: SoundBox, widths: list[int], moved: float) -> Tensor:
    frame: Tensor = aten.pad.default(torch.zeros_like(x.lower), widths, "constant", moved)
    return frame


@slack_rule("aten.relu.default")
def relu_slack(_run: Deployment, own: float, x: SoundBox) -> Tensor:
    """The lines pass 0 and the ends of the interval, up to the round-off of their slopes and heights."""
    return own * x.magnitude


def _maximum_slack(largest: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A maximum is one of its entries, or a constant no larger than one."""
    return lambda _run, own, x, *options, **named: own * largest(x.magnitude, *options, **named)


for _operation, _function in shapes.MAXIMA.items():
    slack_rule(_operation)(_maximum_slack(_function))
