"""Interval rules of pooling and of operations that only move entries around."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from certbench.bounds.box import Box
from certbench.bounds.interval import interval_rule
from certbench.errors import UsageError

aten = torch.ops.aten

# Linear with non-negative weights, or entries moved around: either pair of a box goes through alike ------------------

AVERAGES = {
    "aten.avg_pool1d.default": aten.avg_pool1d.default,
    "aten.avg_pool2d.default": aten.avg_pool2d.default,
    "aten.adaptive_avg_pool1d.default": aten.adaptive_avg_pool1d.default,
    "aten.adaptive_avg_pool2d.default": aten.adaptive_avg_pool2d.default,
    "aten.mean.dim": aten.mean.dim,
    "aten.sum.dim_IntList": aten.sum.dim_IntList,
}
MOVES = {
    "aten.flatten.using_ints": aten.flatten.using_ints,
    "aten.unflatten.int": aten.unflatten.int,
    "aten.view.default": aten.reshape.default,
    "aten.reshape.default": aten.reshape.default,
    "aten.permute.default": aten.permute.default,
    "aten.transpose.int": aten.transpose.int,
    "aten.squeeze.default": aten.squeeze.default,
    "aten.squeeze.dim": aten.squeeze.dim,
    "aten.squeeze.dims": aten.squeeze.dims,
    "aten.unsqueeze.default": aten.unsqueeze.default,
    "aten.expand.default": aten.expand.default,
    "aten.select.int": aten.select.int,
    "aten.slice.Tensor": aten.slice.Tensor,
    "aten.clone.default": aten.clone.default,
    "aten.contiguous.default": aten.contiguous.default,
    "aten.alias.default": aten.alias.default,
    "aten.detach.default": aten.alias.default,
}


def _alike(function: Callable[..., Tensor], x: Box, *options: Any, **named: Any) -> Box:
    if named.get("dtype") is not None:
        raise UsageError(f"an operation that changes the number type ({named['dtype']}) has no interval rule")
    if function is aten.avg_pool2d.default and len(options) > 5 and (options[5] or 1) < 0:
        raise UsageError("average pooling with a negative divisor has no interval rule")
    return x.both(lambda part: function(part, *options, **named))


for _operation, _function in {**AVERAGES, **MOVES}.items():
    interval_rule(_operation)(partial(_alike, _function))


@interval_rule("aten.dropout.default", "aten.feature_dropout.default")
def dropout(x: Box, probability: float, training: bool) -> Box:
    """Tracing is done in evaluation mode, where dropout is the identity."""
    if training and probability > 0:
        raise UsageError("dropout is active in the traced network; bounds cover its evaluation mode only")
    return x


@interval_rule("aten.sym_size.int")
def sym_size(x: Box, dim: int) -> int:
    return x.shape[dim]


@interval_rule("aten.zeros_like.default")
def zeros_like(x: Box, **_: Any) -> Tensor:
    return torch.zeros_like(x.lower)


# Non-decreasing in every entry: the two ends go through --------------------------------------------------------------

MAXIMA = {
    "aten.max_pool1d.default": aten.max_pool1d.default,
    "aten.max_pool2d.default": aten.max_pool2d.default,
    "aten.amax.default": aten.amax.default,
}


def _ends(function: Callable[..., Tensor], x: Box, *options: Any, **named: Any) -> Box:
    return x.ends(lambda end: function(end, *options, **named))


for _operation, _function in MAXIMA.items():
    interval_rule(_operation)(partial(_ends, _function))


@interval_rule("aten.adaptive_max_pool2d.default", "aten.adaptive_max_pool1d.default")
def adaptive_max_pool(x: Box, size: list[int]) -> list[Box | None]:
    """The operation returns values and indices; nothing that depends on the indices has bounds."""
    pool = aten.adaptive_max_pool2d.default if len(size) == 2 else aten.adaptive_max_pool1d.default
    return [x.ends(lambda end: pool(end, size)[0]), None]


@interval_rule("getitem")
def getitem(items: list[Any], index: int) -> Any:
    return items[index]


@interval_rule("aten.pad.default", "aten.constant_pad_nd.default")
def pad(x: Box, widths: list[int], mode: str = "constant", value: float | None = None) -> Box:
    return x.ends(lambda end: aten.pad.default(end, widths, mode, value))


@interval_rule("aten.cat.default")
def cat(parts: list[Box | Tensor], dim: int = 0) -> Box:
    lower = [part.lower if isinstance(part, Box) else part for part in parts]
    upper = [part.upper if isinstance(part, Box) else part for part in parts]
    return Box(lower=torch.cat(lower, dim), upper=torch.cat(upper, dim))


@interval_rule("aten.chunk.default")
def chunk(x: Box, chunks: int, dim: int = 0) -> list[Box]:
    return _pieces(x, lambda part: part.chunk(chunks, dim))


@interval_rule("aten.split.Tensor", "aten.split_with_sizes.default")
def split(x: Box, sizes: Any, dim: int = 0) -> list[Box]:
    return _pieces(x, lambda part: torch.split(part, sizes, dim))


def _pieces(x: Box, cut: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Box]:
    ends = zip(cut(x.lower), cut(x.upper), strict=True)
    return [Box(lower=lower, upper=upper) for lower, upper in ends]
