"""Float-sound interval bounds: boxes that hold every activation that any deployed evaluation can compute.

What is proved, and why, stands in ``docs/float-soundness.md``. The invariant of this file: a box holds the value of
its node *before* it is written back in the storage type, for every real input of the ball and every admissible
evaluation; each rule covers the rounding of what it reads, of what it computes at deployment, and of its own float64
arithmetic. Rules are registered one per canonical operation:

    @sound_rule("aten.hardtanh.default")
    def hardtanh(run, x, low=-1.0, high=1.0):
        return run.stored(x).ends(lambda end: end.clamp(low, high))

The first argument is the :class:`Deployment`, the others are those of the operation, boxes in place of activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from certbench.bounds import shapes
from certbench.bounds.box import Box
from certbench.bounds.graph import LINEAR, Graph, Node, _has_box, _resolve, _resolve_options
from certbench.bounds.interval import RULES as INTERVAL_RULES
from certbench.bounds.interval import per_channel
from certbench.bounds.precision import Precision
from certbench.bounds.specification import difference_rows
from certbench.errors import UsageError
from certbench.threat import round_up

# Rounding outward ----------------------------------------------------------------------------------------------------


def down(values: Tensor) -> Tensor:
    """One float64 below: never above the exact result of the one rounded operation that gave ``values``."""
    return torch.nextafter(values, values.new_full((), -math.inf))


def up(values: Tensor) -> Tensor:
    """One float64 above."""
    return torch.nextafter(values, values.new_full((), math.inf))


FOUR_UNITS = 1 + 4 * 2.0**-53
"""Covers three roundings of non-negative numbers, this product's own included."""


class SoundBox(Box):
    """A box whose two forms each contain the other: every conversion is rounded outward."""

    __slots__ = ()

    @property
    def lower(self) -> Tensor:
        if self._lower is None:
            self._lower = down(self.center - self.radius)
        return self._lower

    @property
    def upper(self) -> Tensor:
        if self._upper is None:
            self._upper = up(self.center + self.radius)
        return self._upper

    @property
    def center(self) -> Tensor:
        if self._center is None:
            self._center = (self.lower + self.upper) * 0.5
        return self._center

    @property
    def radius(self) -> Tensor:
        if self._radius is None:
            center = self.center
            self._radius = torch.maximum(self.upper - center, center - self.lower) * FOUR_UNITS
        return self._radius

    @property
    def magnitude(self) -> Tensor:
        """At least ``|h|`` for every h in the box, up to one rounding of a sum, which users cover."""
        if self._lower is not None and self._upper is not None:
            return torch.maximum(-self._lower, self._upper)
        return self.center.abs() + self.radius


def sound_input_box(images: Tensor, eps: Fraction | Tensor) -> SoundBox:
    """A box around the ball of radius ``eps`` intersected with [0, 1].

    Args:
        images: (batch, ...) in float64, each pixel the exact value of the deployed pixel.
        eps: one exact fraction, or one float64 per image that is not below the radius meant, shape (batch,).

    Raises:
        UsageError: a pixel outside [0, 1] or NaN, a negative or NaN radius, or numbers not in float64.
    """
    if isinstance(eps, Fraction):
        eps = images.new_full((len(images),), round_up(eps))
    if images.dtype != torch.float64 or eps.dtype != torch.float64:
        raise UsageError(f"float-sound bounds are computed in float64, not {images.dtype} and {eps.dtype}")
    if not ((images >= 0) & (images <= 1)).all():
        raise UsageError("cannot certify: a pixel lies outside [0, 1] or is not a number")
    if not (eps >= 0).all():
        raise UsageError("cannot certify: a radius is negative or not a number")
    eps = eps.reshape(-1, *[1] * (images.ndim - 1))
    return SoundBox(lower=down(images - eps).clamp_min(0.0), upper=up(images + eps).clamp_max(1.0))


# Propagation ---------------------------------------------------------------------------------------------------------


SoundRule = Callable[..., SoundBox]
SOUND_RULES: dict[str, SoundRule] = {}


def sound_rule(*operations: str) -> Callable[[SoundRule], SoundRule]:
    """Register a float-sound rule for operations by canonical name.

    Raises:
        UsageError: an operation already has one.
    """

    def register(rule: SoundRule) -> SoundRule:
        for operation in operations:
            if operation in SOUND_RULES:
                raise UsageError(f"operation {operation} already has a float-sound rule")
            SOUND_RULES[operation] = rule
        return rule

    return register


class Deployment:
    """One pass of bounds for one precision, with the images for which some number may overflow, (batch,)."""

    def __init__(self, precision: Precision, images: Tensor) -> None:
        self.precision = precision
        self.unsafe = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def guard(self, largest: Tensor, limit: float) -> None:
        """Mark images for which ``largest`` (batch,) may exceed ``limit``, or is not a number."""
        self.unsafe |= ~(largest * FOUR_UNITS <= limit)

    def checked(self, box: SoundBox) -> SoundBox:
        """The box of a new result, which must not overflow."""
        self.guard(_per_image(box.magnitude), self.precision.largest)
        return box

    def widened(
        self, lower: Tensor, upper: Tensor, magnitude: Tensor, relative: float, absolute: Any
    ) -> SoundBox:
        """``[lower, upper]`` with ``relative * magnitude + absolute`` more on both sides, rounded outward."""
        slack = (magnitude * relative + absolute) * (1 + 16 * self.precision.unit)
        return self.checked(SoundBox(lower=down(lower - slack), upper=up(upper + slack)))

    def stored(self, x: Box) -> SoundBox:
        """The box of a value after it was written back in the storage type."""
        x = _sound(x)
        p = self.precision
        if not p.storage and not p.flush:
            return x
        return self.widened(x.lower, x.upper, x.magnitude, p.storage, p.flush)


@dataclass(frozen=True)
class SoundBounds:
    """What enters the classification layer (or the logits, where there is none), and the layer."""

    run: Deployment
    features: SoundBox
    weight: Tensor | None
    bias: Tensor | None

    def margins(self, labels: Tensor) -> Tensor:
        """Lower bounds of deployed ``z_y - z_j``, j ascending, shape (batch, classes - 1); NaN after overflow."""
        if self.weight is None:
            margins = separate_margins(self.run, self.features, labels)
        else:
            margins = merged_margins(self.run, self.features, self.weight, self.bias, labels)
        return margins.masked_fill(self.run.unsafe[:, None], math.nan)


def sound_margins(
    graph: Graph, images: Tensor, eps: Fraction | Tensor, labels: Tensor, precision: Precision
) -> Tensor:
    """Lower bounds of the computed logit of the label minus any other, shape (batch, classes - 1).

    A positive bound holds for every deployed evaluation at ``precision`` and every input of the ball. Nested balls
    have nested boxes, so the bounds never increase with eps but for the last bits of float64; a radius search needs
    no more, as it returns a radius whose own bound was positive.

    Args:
        graph: a network traced in float64 that holds the deployed weights exactly.
        images: (batch, channels, height, width) in float64, the exact values of the deployed pixels.
        eps: an exact fraction, or one float64 per image, shape (batch,).
        labels: (batch,).

    Raises:
        UsageError: see :func:`sound_input_box` and :func:`sound_bounds`.
    """
    return sound_bounds(graph, sound_input_box(images, eps), precision).margins(labels)


def sound_bounds(graph: Graph, box: SoundBox, precision: Precision) -> SoundBounds:
    """Push a box of raw images through an evaluation-mode network.

    Raises:
        UsageError: an operation has no float-sound rule, or the network computes with its own weights.
    """
    run = Deployment(precision, box.lower)
    values = graph._start(box)
    for node in graph.nodes:
        arguments = [_resolve(a, values) for a in node.arguments]
        options = _resolve_options(node, values)
        if node.name == graph.result and node.operation == LINEAR and isinstance(arguments[0], Box):
            weight, *bias = arguments[1:]
            return SoundBounds(run, _sound(arguments[0]), weight, bias[0] if bias else None)
        if not _has_box([*arguments, *options.values()]):
            _refuse_arithmetic(graph, node, [*arguments, *options.values()])
            values[node.name] = node.function(*arguments, **options)
            continue
        values[node.name] = _rule(graph, node)(run, *arguments, **options)
        graph._forget(node, values)
    output = values[graph.result]
    if not isinstance(output, Box):
        raise UsageError(f"the output of {type(graph.network).__name__} does not depend on its input")
    return SoundBounds(run, _sound(output), None, None)


def _rule(graph: Graph, node: Node) -> SoundRule:
    if node.operation not in SOUND_RULES and node.operation.startswith("aten._assert"):
        return lambda *_, **__: None  # type: ignore[return-value]  # an assertion has no value
    if node.operation not in SOUND_RULES:
        raise UsageError(
            f"node {node.name} ({node.operation}) of {type(graph.network).__name__} has no float-sound rule; add one "
            f'with @certbench.bounds.sound_rule("{node.operation}"), or certify with guarantee = "real_arith"'
        )
    return SOUND_RULES[node.operation]


def _refuse_arithmetic(graph: Graph, node: Node, values: list[Any]) -> None:
    """Weights computed inside ``forward`` are rounded at deployment, which the bounds of their users do not know."""
    if node.operation not in MOVES and any(isinstance(v, Tensor) and v.is_floating_point() for v in values):
        raise UsageError(
            f"node {node.name} ({node.operation}) of {type(graph.network).__name__} computes with weights alone; "
            'store its result as a parameter or buffer, or certify with guarantee = "real_arith"'
        )


def _sound(value: Any) -> SoundBox:
    if not isinstance(value, SoundBox):
        raise UsageError("a float-sound rule must return a SoundBox")
    return value


def _per_image(values: Tensor) -> Tensor:
    """The largest entry of each image, (batch,)."""
    return values.flatten(1).amax(1)


# Affine layers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Weight (out, ...) and bias (out,) of a layer whose dot products have length ``n``, and what may flush of them."""

    weight: Tensor
    bias: Tensor | None
    n: int

    def flushed(self, p: Precision, largest: Tensor, relative: float) -> Tensor:
        """What underflow adds to each result, (batch, out), for inputs of at most ``largest`` (batch,)."""
        small = torch.where(self.weight.abs() < p.flush, self.weight.abs(), 0.0).flatten(1).sum(1)
        fixed = torch.full_like(small, (2 * self.n + 2) * p.sum_flush)
        if self.bias is not None:
            fixed = fixed + torch.where(self.bias.abs() < p.flush, self.bias.abs(), 0.0)
            fixed = fixed + (p.flush if p.storage else 0.0)  # the product, stored before its bias
        own = (4 * self.n + 8) * p.unit_flush
        return (1 + relative) * (small * (largest[:, None] + p.flush) + fixed) + own

    def guard(self, run: Deployment, largest: Tensor, relative: float) -> None:
        """No operand and no partial sum overflows, nor a result before its bias is added."""
        p = run.precision
        weights = self.weight.abs().flatten(1)
        constants = (
            weights.amax() if self.bias is None else torch.maximum(weights.amax(), self.bias.abs().amax())
        )
        run.guard(constants.expand_as(largest), p.largest)
        sums = weights.sum(1).amax() * largest + constants
        run.guard(sums * (1 + relative) * (1 + 2.0**-20), p.sum_largest)


def affine(
    run: Deployment, x: Box, layer: Layer, apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> SoundBox:
    """``apply(h, W, b)`` for a convolution or linear layer: two products, as without rounding.

    Needed radius: ``|W| r`` for the box, ``G (|W| |h| + |b|)`` for deployment, ``g (|W| |c| + |b|)`` for the computed
    centre. All but the biases' share is one product of ``|W|`` with ``rho``.
    """
    p, n, x = run.precision, layer.n, _sound(x)
    deployed, own = p.product(n, layer.bias is not None), p.own(n + 1)
    magnitude, center = x.magnitude, x.center
    largest = _per_image(magnitude)
    layer.guard(run, largest, deployed)
    rho = x.radius + deployed * magnitude + own * center.abs() + (1 + deployed) * magnitude.clamp_max(p.flush)
    extra = layer.flushed(p, largest, deployed)
    if layer.bias is not None:
        extra = extra + (deployed + own) * layer.bias.abs()
    new_center = apply(center, layer.weight, layer.bias)
    spread = apply(rho, layer.weight.abs(), None)
    radius = (spread + extra.view(*extra.shape, *[1] * (spread.ndim - 2))) * p.cover(n)
    box = SoundBox(center=new_center, radius=radius)
    before_bias = _per_image(box.magnitude) + (0.0 if layer.bias is None else layer.bias.abs().amax())
    run.guard(before_bias, p.largest)
    return box


@sound_rule("aten.linear.default")
def linear(run: Deployment, x: Box, weight: Tensor, bias: Tensor | None = None) -> SoundBox:
    _refuse_boxes("linear", weight, bias)
    if len(x.shape) != 2:
        raise UsageError("the float-sound rule of linear layers takes (batch, features); flatten first")
    return affine(run, x, Layer(weight, bias, weight.shape[1]), F.linear)


@sound_rule("aten.conv1d.default", "aten.conv1d.padding")
def conv1d(run: Deployment, x: Box, weight: Tensor, bias: Tensor | None = None, *geometry: Any) -> SoundBox:
    return _convolution(torch.conv1d, run, x, weight, bias, geometry)


@sound_rule("aten.conv2d.default", "aten.conv2d.padding")
def conv2d(run: Deployment, x: Box, weight: Tensor, bias: Tensor | None = None, *geometry: Any) -> SoundBox:
    return _convolution(torch.conv2d, run, x, weight, bias, geometry)


def _convolution(
    convolve: Callable[..., Tensor],
    run: Deployment,
    x: Box,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
) -> SoundBox:
    """The dot products have the length of the fan-in; at a zero-padded border they are shorter."""
    _refuse_boxes("convolution", weight, bias)
    layer = Layer(weight, bias, math.prod(weight.shape[1:]))
    return affine(run, x, layer, lambda h, w, b: convolve(h, w, b, *geometry))


@sound_rule("aten.batch_norm.default")
def batch_norm(
    run: Deployment,
    x: Box,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    _momentum: float,
    eps: float,
    *_: Any,
) -> SoundBox:
    """Evaluation mode, where it could not be folded: round-off on ``|gamma| / sigma (|x| + |mean|) + |beta|``."""
    p, x = run.precision, _sound(x)
    deviation = (var + eps).sqrt()
    inverse = 1 / deviation
    scale = inverse if weight is None else weight * inverse
    shift = torch.zeros_like(scale) if bias is None else bias
    run.guard(torch.where(deviation.amin() > 4 * p.flush, 0.0, math.inf).expand(len(x.center)), p.largest)
    scale, shift, mean, inverse = (per_channel(t, x.shape) for t in (scale, shift, mean, inverse))
    reach = x.magnitude + mean.abs()
    terms = scale.abs() * reach + shift.abs()
    run.guard(_per_image(terms), p.largest)
    first, second = (x.lower - mean) * scale + shift, (x.upper - mean) * scale + shift
    flushed = p.flush * (2 * scale.abs() + (1 + inverse) * reach + 4)
    return run.widened(
        torch.minimum(first, second), torch.maximum(first, second), terms, p.batch_norm() + p.own(12), flushed
    )


# Averages ------------------------------------------------------------------------------------------------------------


def average(run: Deployment, x: Box, n: int, pool: Callable[[Tensor], Tensor]) -> SoundBox:
    """A dot product of at most ``n`` stored values with non-negative weights of at most 1."""
    p, x = run.precision, _sound(x)
    deployed, own = p.average(n), p.own(n + 2)
    magnitude = x.magnitude
    run.guard(_per_image(magnitude) * (n * (1 + deployed)), p.sum_largest)
    flush = (1 + deployed) * magnitude.clamp_max(p.flush)
    rho = x.radius + deployed * magnitude + own * x.center.abs() + flush
    underflow = (1 + deployed) * (2 * n + 2) * p.sum_flush + (4 * n + 8) * p.unit_flush
    return run.checked(SoundBox(center=pool(x.center), radius=(pool(rho) + underflow) * p.cover(n)))


@sound_rule("aten.avg_pool2d.default")
def avg_pool2d(run: Deployment, x: Box, kernel: list[int], *geometry: Any) -> SoundBox:
    if len(geometry) == 5 and geometry[4] is not None:
        raise UsageError("average pooling with divisor_override has no float-sound rule")
    n = kernel[0] * kernel[-1]
    return average(run, x, n, lambda part: torch.ops.aten.avg_pool2d(part, kernel, *geometry))


@sound_rule("aten.adaptive_avg_pool2d.default")
def adaptive_avg_pool2d(run: Deployment, x: Box, size: list[int]) -> SoundBox:
    n = math.prod(side // out + 2 for side, out in zip(x.shape[-2:], size, strict=True))
    n = min(n, math.prod(x.shape[-2:]))
    return average(run, x, n, lambda part: torch.ops.aten.adaptive_avg_pool2d(part, size))


@sound_rule("aten.mean.dim")
def mean(run: Deployment, x: Box, dim: list[int], keepdim: bool = False, dtype: Any = None) -> SoundBox:
    if dtype is not None:
        raise UsageError(f"a mean in another number type ({dtype}) has no float-sound rule")
    if any(d % len(x.shape) == 0 for d in dim):
        raise UsageError("a mean over the batch has no float-sound rule")
    n = math.prod(x.shape[d] for d in dim)
    return average(run, x, n, lambda part: part.mean(dim, keepdim))


# Elementwise arithmetic ----------------------------------------------------------------------------------------------


@sound_rule("aten.add.Tensor", "aten.add.Scalar")
def add(run: Deployment, a: Any, b: Any, alpha: float = 1) -> SoundBox:
    """Two branches, or a branch and a constant."""
    if alpha != 1:
        raise UsageError(f"addition with alpha = {alpha} has no float-sound rule")
    a, b = _constant(a, b), _constant(b, a)
    p = run.precision
    lower, upper = down(a.lower + b.lower), up(a.upper + b.upper)
    return run.widened(lower, upper, a.magnitude + b.magnitude, p.elementwise(2), 4 * p.flush)


@sound_rule("aten.sub.Tensor", "aten.sub.Scalar")
def sub(run: Deployment, a: Any, b: Any, alpha: float = 1) -> SoundBox:
    return add(run, a, neg(run, _constant(b, a)), alpha)


@sound_rule("aten.neg.default")
def neg(_run: Deployment, x: Box) -> SoundBox:
    return SoundBox(lower=-x.upper, upper=-x.lower)


@sound_rule("aten.mul.Tensor", "aten.mul.Scalar")
def mul(run: Deployment, a: Any, b: Any) -> SoundBox:
    """A branch times a constant."""
    if isinstance(a, Box) and isinstance(b, Box):
        raise UsageError(
            "no float-sound rule multiplies two values that both depend on the input; register one"
        )
    x, factor = (a, b) if isinstance(a, Box) else (b, a)
    x, factor = _sound(x), _constant(factor, x).lower
    p, size = run.precision, factor.abs()
    first, second = x.lower * factor, x.upper * factor
    lower, upper = down(torch.minimum(first, second)), up(torch.maximum(first, second))
    flushed = 2 * p.flush * (size + x.magnitude + 2)
    return run.widened(lower, upper, x.magnitude * size, p.elementwise(2), flushed)


@sound_rule("aten.div.Tensor", "aten.div.Scalar")
def div(run: Deployment, a: Box, b: Any) -> SoundBox:
    _refuse_boxes("division", b)
    x, divisor = _sound(a), _constant(b, a).lower
    p, size = run.precision, divisor.abs()
    within = (size.amin() >= 4 * p.flush) & (
        size.amax() * 4 * p.flush <= 1
    )  # neither it nor its reciprocal flushes
    run.guard(torch.where(within, 0.0, math.inf).expand(len(x.lower)), p.largest)
    first, second = x.lower / divisor, x.upper / divisor
    lower, upper = down(torch.minimum(first, second)), up(torch.maximum(first, second))
    return run.widened(lower, upper, x.magnitude / size, p.quotient(), 2 * p.flush * (1 / size + 1))


def _constant(value: Any, like: Any) -> SoundBox:
    """A constant as the box that holds it alone."""
    if isinstance(value, Box):
        return _sound(value)
    values = torch.as_tensor(value, dtype=torch.float64, device=like.lower.device)
    return SoundBox(lower=values, upper=values)


def _refuse_boxes(what: str, *values: object) -> None:
    if any(isinstance(value, Box) for value in values):
        raise UsageError(
            f"no float-sound rule covers a {what} whose weights depend on the input; register one"
        )


# Activations ---------------------------------------------------------------------------------------------------------


@sound_rule("aten.leaky_relu.default")
def leaky_relu(run: Deployment, x: Box, slope: float = 0.01) -> SoundBox:
    """Exact above zero; below it, a product with a constant."""
    if slope < 0:
        raise UsageError(f"leaky ReLU with the negative slope {slope} has no float-sound rule")
    p, x = run.precision, _sound(x)
    size = slope * x.magnitude
    ends = _sound(x).ends(lambda end: F.leaky_relu(end, slope))
    flushed = 2 * p.flush * (slope + x.magnitude + 2)
    return run.widened(down(ends.lower), up(ends.upper), size, p.elementwise(2), flushed)


@sound_rule("aten.sigmoid.default")
def sigmoid(run: Deployment, x: Box) -> SoundBox:
    return library(run, x, torch.sigmoid)


@sound_rule("aten.tanh.default")
def tanh(run: Deployment, x: Box) -> SoundBox:
    return library(run, x, torch.tanh)


def library(run: Deployment, x: Box, function: Callable[[Tensor], Tensor]) -> SoundBox:
    """A non-decreasing library function, trusted to a few units in the last place in float64 and at deployment."""
    p, ends = run.precision, run.stored(x).ends(function)
    relative = p.library() + p.own(9)
    size = torch.maximum(ends.lower.abs(), ends.upper.abs())
    return run.widened(ends.lower, ends.upper, size, relative, 2 * p.flush + 2 * p.unit_flush)


# Exact operations ----------------------------------------------------------------------------------------------------

MOVES = frozenset({*shapes.MOVES, "aten.lift_fresh_copy.default"})
"""Operations that only move numbers around."""


def _exact(operation: str) -> SoundRule:
    """The interval rule, which then is sound as it stands; outward rounding is in the box."""
    rule = INTERVAL_RULES[operation]
    return lambda _run, *arguments, **options: _sound(rule(*arguments, **options))


_SELECT = ("aten.relu.default", "aten.dropout.default", *sorted(shapes.MAXIMA))
for _operation in (*_SELECT, *sorted(MOVES)):
    if _operation in INTERVAL_RULES:
        SOUND_RULES[_operation] = _exact(_operation)


@sound_rule("aten.cat.default")
def cat(_run: Deployment, parts: list[Box], dim: int = 0) -> SoundBox:
    boxes = [_sound(part) for part in parts]
    return SoundBox(
        lower=torch.cat([b.lower for b in boxes], dim), upper=torch.cat([b.upper for b in boxes], dim)
    )


@sound_rule("aten.sym_size.int")
def sym_size(_run: Deployment, x: Box, dim: int) -> Any:
    """A length, which no perturbation changes."""
    return x.shape[dim]


# The property --------------------------------------------------------------------------------------------------------


def merged_margins(
    run: Deployment, x: SoundBox, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> Tensor:
    """``(W_y - W_j) c + b_y - b_j - |W_y - W_j| r`` less what both logits may lose at deployment, (batch, classes - 1).

    All losses are one product of ``|W|`` with a multiple of ``|h|`` per class, added for the label and the other.
    """
    p, n = run.precision, weight.shape[1]
    layer = Layer(weight, bias, n)
    relative = p.logit(n, bias is not None)
    magnitude = x.magnitude
    largest = _per_image(magnitude)
    layer.guard(run, largest, relative)
    bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
    sizes = F.linear(magnitude, weight.abs(), bias.abs())
    run.guard(_per_image(sizes) * (1 + relative) * (1 + 2.0**-20), p.largest)
    lost = (relative + p.own(n + 2)) * sizes + layer.flushed(p, largest, relative) + p.flush
    lost = lost + F.linear((1 + relative) * magnitude.clamp_max(p.flush), weight.abs())
    wrong = ~F.one_hot(labels, len(weight)).bool()
    lost = lost.gather(1, labels[:, None]) + lost[wrong].view(len(labels), -1)
    C = difference_rows(labels, len(weight), weight.dtype)
    W_C = C @ weight  # each entry one rounded difference: the other terms of the sum are zeros
    middle = (W_C @ x.center[:, :, None]).squeeze(-1) + C @ bias
    spread = (W_C.abs() @ x.radius[:, :, None]).squeeze(-1)
    return down(middle - (spread + lost) * p.cover(n + 8))


def separate_margins(run: Deployment, logits: SoundBox, labels: Tensor) -> Tensor:
    """``lower_y - upper_j`` of stored logits: for networks that do not end in a linear layer."""
    logits = run.stored(logits)
    wrong = ~F.one_hot(labels, logits.shape[1]).bool()
    lower = logits.lower.gather(1, labels[:, None])
    return down(lower - logits.upper[wrong].view(len(labels), -1))
