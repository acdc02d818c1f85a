"""Float-sound bounds: they hold for every admissible evaluation, and each of their terms is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certbench.bounds import (
    PRECISIONS,
    Precision,
    SoundBox,
    certifiers,
    input_box,
    sound,
    sound_margins,
    trace,
)
from certbench.bounds.certifiers import find_certifier
from certbench.bounds.precision import gamma
from certbench.bounds.sound import Deployment, sound_bounds, sound_input_box
from certbench.contract import Certificates, Certifier, CertifyTask
from certbench.data.dataset import Split
from certbench.errors import RunError, UsageError
from certbench.models.fold import deployed_network
from certbench.models.kernels import plain_kernels
from certbench.models.registry import Normalize
from certbench.models.residual import basic_block
from certbench.recipe import parse_recipe
from certbench.run import certify_settings, digest_settings

EXACT = Precision("exact", 0.0, 0.0, 0.0, 0.0, 0.0, math.inf, math.inf, unit=0.0, unit_flush=0.0)
NAMES = list(PRECISIONS)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def fractions(values: Tensor) -> list[Fraction]:
    return [Fraction(v) for v in values.flatten().tolist()]


# Deployed evaluations ------------------------------------------------------------------------------------------------


class Adversary:
    """Rational arithmetic in which every rounding goes as far as a precision allows, in a drawn direction.

    ``lean`` says how often errors go upward: 1 always, 0 never.
    """

    def __init__(self, precision: Precision, seed: int, lean: float) -> None:
        self.p, self.draw, self.lean = precision, np.random.default_rng(seed), lean

    def off(self, value: Fraction, unit: float, flush: float) -> Fraction:
        if abs(value) < Fraction(flush):
            return Fraction(0)
        return value + abs(value) * Fraction(unit) * (1 if self.draw.random() < self.lean else -1)

    def operand(self, value: Fraction) -> Fraction:
        return self.off(value, self.p.operand, self.p.flush)

    def stored(self, value: Fraction) -> Fraction:
        return self.off(value, self.p.storage, self.p.flush)

    def result(self, value: Fraction) -> Fraction:
        return self.off(value, self.p.accumulator, self.p.sum_flush)

    def sum(self, terms: list[Fraction]) -> Fraction:
        order = list(self.draw.permutation(len(terms)))
        total = terms[order[0]]
        for index in order[1:]:
            total = self.result(total + terms[index])
        return total

    def dot(self, weights: list[Fraction], bias: Fraction, x: list[Fraction]) -> Fraction:
        """One dot product; the bias is added last, to what was stored."""
        terms = [self.result(self.operand(w) * self.operand(v)) for w, v in zip(weights, x, strict=True)]
        return self.result(self.stored(self.sum(terms)) + self.operand(bias))

    def run(self, network: nn.Sequential, image: list[Fraction]) -> list[Fraction]:
        """The logits as they are stored, of a network of linear layers, 2x2 convolutions of 3x3 images, and ReLUs."""
        values = image
        for layer in network:
            if isinstance(layer, nn.Conv2d):
                windows = [[values[3 * (r + i) + c + j] for i, j in CELLS] for r, c in CELLS]
                rows = list(zip(layer.weight, layer.bias.tolist(), strict=True))
                values = [self.dot(fractions(w), Fraction(b), x) for w, b in rows for x in windows]
            elif isinstance(layer, nn.Linear):
                rows = list(zip(layer.weight, layer.bias.tolist(), strict=True))
                values = [self.dot(fractions(w), Fraction(b), values) for w, b in rows]
            elif isinstance(layer, nn.ReLU):
                values = [max(v, Fraction(0)) for v in values]
        return [self.stored(v) for v in values]


CELLS = list(product(range(2), range(2)))


def small_network(seed: int, size: float = 1.0) -> nn.Sequential:
    """Convolution, two hidden layers, four dozen float32 weights, badly conditioned: pairs nearly cancel."""
    draw = torch.Generator().manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 3)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=draw))
        network[3].weight[:, ::2] = -network[3].weight[:, 1::2] * (1 + 2**-6)
    return network.double().eval()


def small_images(seed: int, count: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 3, 3, generator=draw).double()  # float32 pixels


def all_margins(network: nn.Module, image: Tensor, eps: Fraction, precision: Precision) -> Tensor:
    """One image against every label, shape (classes, classes - 1)."""
    graph = trace(network, tuple(image.shape))
    classes = graph.run(image[None]).logits.shape[1]
    images = image.expand(classes, *image.shape)
    with torch.no_grad():
        return sound_margins(graph, images, eps, torch.arange(classes), precision)


def violations(margins: Tensor, logits: list[Fraction]) -> int:
    """How many bounds an evaluation breaks, compared exactly."""
    found = 0
    for label, row in enumerate(margins.tolist()):
        others = [z for j, z in enumerate(logits) if j != label]
        found += sum(
            logits[label] - other < Fraction(bound) for other, bound in zip(others, row, strict=True)
        )
    return found


def ball_points(image: Tensor, eps: Fraction, seed: int) -> Iterator[list[Fraction]]:
    """The centre, corners, and inner points of the ball intersected with [0, 1], exactly."""
    draw = np.random.default_rng(seed)
    pixels = fractions(image)
    yield pixels
    for kind in range(4):
        steps = draw.choice([-1, 1], len(pixels)) if kind < 3 else draw.uniform(-1, 1, len(pixels))
        moved = [x + eps * Fraction(float(s)) for x, s in zip(pixels, steps, strict=True)]
        yield [min(max(x, Fraction(0)), Fraction(1)) for x in moved]


def broken_bounds(
    bound: Precision, deploy: Precision, eps: Fraction, size: float = 1.0, nets: int = 2
) -> int:
    """Bounds computed for ``bound`` that evaluations at ``deploy`` break."""
    found = 0
    for seed in range(nets):
        network, image = small_network(seed, size), small_images(seed, 1)[0]
        margins = all_margins(network, image, eps, bound)
        assert margins.isfinite().all()
        for number, x in enumerate(ball_points(image, eps, seed)):
            for lean in (0.0, 0.5, 1.0):
                found += violations(margins, Adversary(deploy, number, lean).run(network, x))
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eps", [Fraction(0), Fraction(8, 255)])
def test_no_admissible_evaluation_in_exact_arithmetic_leaves_the_bounds(name: str, eps: Fraction) -> None:
    assert broken_bounds(PRECISIONS[name], PRECISIONS[name], eps) == 0


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("float32", "accumulator"),
        ("tf32", "operand"),
        ("bf16", "operand"),
        ("bf16", "storage"),
        ("fp16", "operand"),
        ("fp16", "storage"),
    ],
)
def test_without_a_round_off_term_the_bounds_break(name: str, term: str) -> None:
    """All weights are positive and all errors go down, which is the worst case that the bounds allow for."""
    network, image = classifier([[0.7] * 6], [0.1]), tensor([0.9] * 6)
    deploy = replace(PRECISIONS[name], flush=2.0**-126)  # the larger one of float16 would hide the others
    logits = Adversary(deploy, 0, lean=0.0).run(network, fractions(image))
    assert violations(all_margins(network, image, Fraction(0), deploy), logits) == 0
    without = replace(deploy, **{term: 0.0})
    assert violations(all_margins(network, image, Fraction(0), without), logits) == 1


def test_operands_that_flush_are_covered_and_the_term_is_needed() -> None:
    deploy = PRECISIONS["fp16"]
    size = 2.0**-13  # many weights are below the smallest normal number
    assert broken_bounds(deploy, deploy, Fraction(0), size, nets=5) == 0
    assert broken_bounds(replace(deploy, flush=0.0), deploy, Fraction(0), size, nets=5) > 0


def test_products_that_flush_are_covered_and_the_term_is_needed() -> None:
    network = classifier([[2.0**-70]], [0.0])
    deploy, image = replace(PRECISIONS["float32"], flush=0.0), tensor([2.0**-70])
    for bound, positive in ((deploy, False), (replace(deploy, sum_flush=0.0), True)):
        margins = all_margins(network, image, Fraction(0), bound)
        assert bool(margins[0] > 0) is positive, "float32 may compute 0 against 0"


# Round-off of the bounds' own arithmetic: deployment is exact -----------------------------------------------------


def classifier(weight: list[list[float]], bias: list[float], *more: nn.Module) -> nn.Sequential:
    """A linear layer with the given numbers, then others, then ``z = (h_0, 0)``."""
    layer = nn.Linear(len(weight[0]), len(weight), dtype=torch.float64)
    last = nn.Linear(1, 2, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(tensor(weight))
        layer.bias.copy_(tensor(bias))
        last.weight.copy_(tensor([[1.0], [0.0]]))
        last.bias.zero_()
    return nn.Sequential(layer, *more, last).eval().requires_grad_(False)


def own_arithmetic(**changes: float) -> Precision:
    return replace(EXACT, **{"unit": 2.0**-53, "unit_flush": 2.0**-1022, **changes})


def test_the_computed_centre_is_off_and_the_term_for_it_is_needed() -> None:
    back = classifier([[1.0]], [-(2.0**53)])[0]
    network = classifier([[1.0]], [2.0**53], back)  # real arithmetic: h = x; float64 loses x in between
    graph, image = trace(network, (1,)), tensor([[0.5]])
    for precision, holds in ((own_arithmetic(), True), (own_arithmetic(unit=0.0), False)):
        features = sound_bounds(graph, sound_input_box(image, Fraction(0)), precision).features
        assert bool(features.lower <= 0.5) and bool(features.upper >= 0.5) is holds


def test_underflow_in_float64_is_covered_and_the_term_is_needed() -> None:
    graph, image = trace(classifier([[2.0**-600]], [0.0]), (1,)), tensor([[2.0**-500]])
    exact = Fraction(2) ** -1100
    for precision, holds in ((own_arithmetic(), True), (own_arithmetic(unit_flush=0.0), False)):
        features = sound_bounds(graph, sound_input_box(image, Fraction(0)), precision).features
        assert (exact <= Fraction(float(features.center + features.radius))) is holds


def test_round_off_of_the_spread_is_covered() -> None:
    for n in (1, 9, 1000, 32768):
        assert Fraction(PRECISIONS["float32"].cover(n)) * (1 - Fraction(2) ** -53) ** (n + 9) >= 1
    assert Fraction(gamma(10, 2.0**-24)) >= Fraction(10, 2**24) / (1 - Fraction(10, 2**24))
    assert gamma(2**24, 2.0**-24) == math.inf


def random_boxes(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 1, 2000, dtype=torch.float64, generator=draw)
    return torch.minimum(first, second), torch.maximum(first, second)


def escapes(make: Callable[[Tensor, Tensor], SoundBox]) -> int:
    """Numbers at the ends of boxes that a conversion loses."""
    low, high = random_boxes(0)
    box = make(low, high)
    found = 0
    ends = zip(*map(fractions, (box.lower, box.upper, box.center, box.radius)), strict=True)
    for lower, upper, center, radius in ends:
        found += not (lower <= center - radius) if box.made_from_center else not (center - radius <= lower)
        found += not (upper >= center + radius) if box.made_from_center else not (center + radius >= upper)
    return found


class Marked(SoundBox):
    """A box that knows which pair it was made from."""

    __slots__ = ("made_from_center",)


def from_ends(low: Tensor, high: Tensor) -> Marked:
    box = Marked(lower=low, upper=high)
    box.made_from_center = False
    return box


def from_center(low: Tensor, high: Tensor) -> Marked:
    box = Marked(center=(low + high) * 0.5, radius=(high - low) * 0.3)
    box.made_from_center = True
    return box


def test_conversions_round_outward_and_would_not_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert escapes(from_ends) == escapes(from_center) == 0
    monkeypatch.setattr(sound, "FOUR_UNITS", 1.0)
    assert escapes(from_ends) > 0
    monkeypatch.setattr(sound, "down", lambda values: values)
    monkeypatch.setattr(sound, "up", lambda values: values)
    assert escapes(from_center) > 0


def outside(low: Tensor, high: Tensor, images: Tensor, eps: Fraction) -> int:
    pairs = zip(fractions(images), fractions(low), fractions(high), strict=True)
    return sum(lo > max(x - eps, 0) or hi < min(x + eps, 1) for x, lo, hi in pairs)


def test_the_input_box_holds_the_exact_ball_which_rounding_to_nearest_does_not() -> None:
    pixels = (torch.arange(256, dtype=torch.float32) / 255).double()[None]
    bad = naive = 0
    for eps in (Fraction(k, 255) for k in (1, 2, 4, 8, 16, 25, 51)):
        box = sound_input_box(pixels, eps)
        bad += outside(box.lower, box.upper, pixels, eps)
        plain = input_box(pixels, float(eps))
        naive += outside(plain.lower, plain.upper, pixels, eps)
    assert bad == 0
    assert naive > 0


def test_a_small_radius_needs_both_roundings() -> None:
    """One step outward from a sum with the nearest float64 of the radius is not enough near pixel 0."""
    pixels, eps = tensor([[0.0, 2.0**-80]]), Fraction(1, 10**9 + 7)
    nearest = float(eps)
    if Fraction(nearest) >= eps:
        eps = Fraction(2, 3) / 2**40
        nearest = math.nextafter(float(eps), 0.0)
    assert Fraction(float((pixels + nearest).max())) < eps + Fraction(2) ** -80
    box = sound_input_box(pixels, eps)
    assert outside(box.lower, box.upper, pixels, eps) == 0


def test_without_round_off_the_formulas_give_plain_interval_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "down", lambda values: values)
    monkeypatch.setattr(sound, "up", lambda values: values)
    monkeypatch.setattr(sound, "FOUR_UNITS", 1.0)
    network, images, labels = small_network(5), small_images(5, 4), torch.tensor([0, 1, 2, 0])
    graph, eps = trace(network, (1, 3, 3)), torch.full((4,), 0.05, dtype=torch.float64)
    with torch.no_grad():
        plain = graph.bound(input_box(images, eps)).margins(labels)
        found = sound_margins(graph, images, eps, labels, EXACT)
    torch.testing.assert_close(found, plain, rtol=1e-13, atol=1e-13)


# Real floating-point evaluations ---------------------------------------------------------------------------------


def quantize(name: str, values: np.ndarray) -> np.ndarray:
    """Operands of a type: rounded, or for TF32 cut off, as float32."""
    if name == "tf32":
        return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
    if kind is None:
        return values.astype(np.float64 if name == "float64" else np.float32)
    return torch.tensor(values).to(kind).float().numpy()


def evaluate(name: str, layers: list[tuple[np.ndarray, np.ndarray]], x: np.ndarray, seed: int) -> np.ndarray:
    """Logits of points x (points, inputs), each sum in a drawn order and shape of its tree."""
    draw = np.random.default_rng(seed)
    stored = (lambda v: quantize(name, v)) if name in ("bf16", "fp16") else (lambda v: v)
    for number, (weight, bias) in enumerate(layers):
        w, h, b = quantize(name, weight), quantize(name, x), quantize(name, bias)
        columns = []
        for row, constant in zip(w, b, strict=True):
            terms = [row[i] * h[:, i] for i in range(len(row))] + [np.full(len(h), constant, h.dtype)]
            while len(terms) > 1:
                first, second = draw.choice(len(terms), 2, replace=False)
                terms = [t for i, t in enumerate(terms) if i not in (first, second)] + [
                    terms[first] + terms[second]
                ]
            columns.append(terms[0])
        x = stored(np.stack(columns, 1))
        x = np.maximum(x, 0) if number < len(layers) - 1 else x
    return x


def cancelling_layers(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Three layers whose inputs come in pairs with opposite weights, so that round-off dominates the result."""
    draw = np.random.default_rng(seed)
    layers = []
    for rows, pairs in ((12, 12), (12, 6), (3, 6)):
        half = draw.normal(size=(rows, pairs)).astype(np.float32)
        other = -half * np.float32(1 + draw.normal() * 2.0**-12)
        layers.append((np.concatenate([half, other], 1), draw.normal(size=rows).astype(np.float32) * 0))
    return layers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eps", [0.0, 2.0**-20, 0.05])
def test_real_evaluations_in_any_order_stay_in_the_bounds(name: str, eps: float) -> None:
    for seed in range(3):
        draw, layers = np.random.default_rng(seed), cancelling_layers(seed)
        half = draw.random((1, 12)).astype(np.float32)
        center = torch.tensor(np.concatenate([half, half], 1)).double()
        network = nn.Sequential(*(m for w, b in layers for m in (linear(w, b), nn.ReLU())))[:-1]
        graph = trace(network, (24,))
        radius = torch.full((3,), eps, dtype=torch.float64)
        with torch.no_grad():
            margins = sound_margins(
                graph, center.expand(3, -1), radius, torch.arange(3), PRECISIONS[name]
            ).numpy()
        box = input_box(center, eps)
        shares = draw.random((200, 24))
        shares[:100] = shares[:100].round()
        points = (box.lower + torch.tensor(shares) * (box.upper - box.lower)).numpy().astype(np.float32)
        points = points[((points >= box.lower.numpy()) & (points <= box.upper.numpy())).all(1)]
        points = np.concatenate([points, center.numpy().astype(np.float32)])
        for order in range(5):
            logits = evaluate(name, layers, points, order).astype(np.float64)
            for label in range(3):
                gaps = (logits[:, [label]] - np.delete(logits, label, 1)).min(0)
                assert (gaps >= margins[label]).all(), (seed, order, label)


def linear(weight: np.ndarray, bias: np.ndarray) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer.requires_grad_(False)


@pytest.mark.parametrize("eps", [Fraction(0), Fraction(1, 2**27)])
def test_a_pair_that_cancels_is_certified_in_real_arithmetic_and_not_for_float32(eps: Fraction) -> None:
    first = linear(np.array([[2.0**24, 1.0], [1.0, 0.0]]), np.zeros(2))
    last = linear(np.array([[1.0, -(2.0**24)], [0.0, 0.0]]), np.zeros(2))
    network, image = nn.Sequential(first, last), tensor([[1.0, 1.0]])
    assert nn.Sequential(first, last).float()(image.float()).tolist() == [[0.0, 0.0]], "a tie, not a win"
    graph, label = trace(network.double(), (2,)), torch.tensor([0])
    real = graph.bound(input_box(image, float(eps))).margins(label)
    deployed = {n: float(sound_margins(graph, image, eps, label, PRECISIONS[n]).detach()) for n in NAMES}
    assert float(real) > 0
    assert deployed["float64"] > 0
    assert not any(deployed[name] > 0 for name in NAMES if name != "float64")


# One rule at a time ------------------------------------------------------------------------------------------------


def values_of(rule: str, a: Adversary, x: Fraction, y: Fraction) -> Fraction:
    """A deployed evaluation of one rule at points x and y of two boxes."""
    k, d = Fraction(0.1), Fraction(0.3)  # float64 constants, converted at deployment
    if rule == "add":
        return a.result(a.stored(x) + a.stored(y))
    if rule == "shift":
        return a.result(a.stored(x) - a.result(k))
    if rule == "scale":
        return a.result(a.stored(x) * a.result(k))
    if rule == "div":
        return a.result(a.stored(x) * a.result(1 / a.stored(d)))
    if rule == "leaky":
        kept = a.stored(x)
        return kept if kept > 0 else a.result(kept * a.result(k))
    assert rule == "average"
    return a.result(a.sum([a.stored(x), a.stored(y)]) / 2)


def box_of(rule: str, run: Deployment, x: SoundBox, y: SoundBox) -> SoundBox:
    if rule == "add":
        return sound.add(run, x, y)
    if rule == "shift":
        return sound.sub(run, x, 0.1)
    if rule == "scale":
        return sound.mul(run, 0.1, x)
    if rule == "div":
        return sound.div(run, x, 0.3)
    if rule == "leaky":
        return run.stored(sound.leaky_relu(run, x, 0.1))
    pair = SoundBox(
        lower=torch.stack([x.lower, y.lower], -1)[:, :, None],
        upper=torch.stack([x.upper, y.upper], -1)[:, :, None],
    )
    return sound.avg_pool2d(run, pair, [1, 2])


RULES = ["add", "shift", "scale", "div", "leaky", "average"]


def rule_escapes(rule: str, bound: Precision, deploy: Precision, width: float) -> int:
    draw = torch.Generator().manual_seed(0)
    xs, ys = torch.randn(2, 40, dtype=torch.float64, generator=draw)
    boxes = [SoundBox(lower=v[None] - width, upper=v[None] + width) for v in (xs, ys)]
    out = box_of(rule, Deployment(bound, boxes[0].lower), *boxes)
    found = 0
    for which, lean in product((-1, 0, 1), (0.0, 1.0)):
        a = Adversary(deploy, which, lean) if which >= 0 else Adversary(deploy, 7, lean)
        rows = zip(fractions(xs), fractions(ys), out.lower.flatten(), out.upper.flatten(), strict=True)
        for x, y, lower, upper in rows:
            value = values_of(rule, a, x + which * Fraction(width), y + which * Fraction(width))
            found += not Fraction(float(lower)) <= value <= Fraction(float(upper))
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", RULES)
def test_elementwise_rules_hold_and_their_widening_is_needed(rule: str, name: str) -> None:
    deploy = PRECISIONS[name]
    width = 2.0**-10
    assert rule_escapes(rule, deploy, deploy, width) == 0
    assert rule_escapes(rule, deploy, deploy, 0.0) == 0
    bare = replace(deploy, accumulator=0.0, storage=0.0, flush=0.0)
    if name != "float64":  # there one step outward is as much as the term
        assert rule_escapes(rule, bare, deploy, 0.0) > 0


@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh])
def test_library_functions_of_float32_stay_in_their_bounds(function: Callable[[Tensor], Tensor]) -> None:
    grid = torch.cat([torch.linspace(-120, 120, 200_001), torch.linspace(-1e-3, 1e-3, 20_001)])
    points = grid.double()[None]
    run = Deployment(PRECISIONS["float32"], points)
    box = sound.library(run, SoundBox(lower=points, upper=points), function)
    found = function(grid).double()
    assert ((found >= box.lower) & (found <= box.upper)).all()
    exact = replace(PRECISIONS["float32"], accumulator=0.0)
    tight = sound.library(Deployment(exact, points), SoundBox(lower=points, upper=points), function)
    assert not ((found >= tight.lower) & (found <= tight.upper)).all()


def test_batch_norm_that_cannot_be_folded_is_covered() -> None:
    network = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for values in (network[0].weight, network[0].bias, network[0].running_mean):
            values.copy_(torch.randn(6, generator=draw))
        network[0].running_var.copy_(torch.rand(6, generator=draw) * 1e-3)
    network = deployed_network(network)
    x = torch.rand(500, 6, generator=draw)
    graph = trace(network.double(), (6,))
    box = sound_bounds(graph, sound_input_box(x.double(), Fraction(0)), PRECISIONS["float32"]).features
    found = network.float()[0](x).double()
    assert ((found >= box.lower) & (found <= box.upper)).all()
    assert (box.radius < 1e-4 * (1 + box.center.abs())).all()


# Refusals ----------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self._forward = nn.Parameter(torch.ones(3, 4, dtype=torch.float64)), forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x, self.weight)


def test_an_operation_without_a_rule_is_named_with_the_way_to_add_one() -> None:
    graph = trace(Odd(lambda x, w: torch.nn.functional.linear(torch.erf(x), w)), (4,))
    with pytest.raises(
        UsageError, match=r"node erf \(aten.erf.default\) of Odd has no float-sound rule.*sound_rule"
    ):
        sound_margins(
            graph, torch.zeros(1, 4).double(), Fraction(0), torch.tensor([0]), PRECISIONS["float32"]
        )


def test_weights_computed_in_forward_are_refused() -> None:
    graph = trace(Odd(lambda x, w: torch.nn.functional.linear(x, w / 3)), (4,))
    with pytest.raises(UsageError, match="computes with weights alone"):
        sound_margins(
            graph, torch.zeros(1, 4).double(), Fraction(0), torch.tensor([0]), PRECISIONS["float32"]
        )


@pytest.mark.parametrize(
    ("pixel", "eps", "words"), [(1.5, 0.1, "pixel"), (math.nan, 0.1, "pixel"), (0.5, math.nan, "radius")]
)
def test_bad_inputs_are_refused(pixel: float, eps: float, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        sound_input_box(tensor([[pixel]]), tensor([eps]))


def test_overflow_at_deployment_proves_nothing() -> None:
    network = classifier([[60000.0, 60000.0]], [0.0])
    image = tensor([1.0, 1.0])
    assert all_margins(network, image, Fraction(0), PRECISIONS["fp16"]).isnan().all()
    assert all_margins(network, image, Fraction(0), PRECISIONS["float32"])[0].item() > 0
    hidden = nn.Sequential(*classifier([[60000.0, 60000.0]], [0.0])[:1], nn.Sigmoid(), *network[1:])
    assert all_margins(hidden, image, Fraction(0), PRECISIONS["fp16"]).isnan().all(), (
        "a sigmoid hides no overflow"
    )


# Folding -------------------------------------------------------------------------------------------------------------


def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights drawn from the seed; batch norms with statistics and signs worth folding."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter[0].numel() ** -0.5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            with torch.no_grad():
                for values in (module.weight, module.bias, module.running_mean):
                    values.copy_(torch.randn(values.shape, generator=draw))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=draw) + 0.1)
    return network


def norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in network.modules())


def residual_network() -> nn.Module:
    return nn.Sequential(
        Normalize((0.1, 0.2), (0.3, 0.4)),
        nn.Conv2d(2, 4, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(4),
        basic_block(4, 6, 2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.Dropout(),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


def test_the_folded_network_computes_the_same_and_has_no_batch_norm() -> None:
    network = shaken(residual_network())
    x = torch.rand(50, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    before = {name: values.clone() for name, values in network.state_dict().items()}
    folded = deployed_network(network)
    assert norms(network) == 5
    assert norms(folded) == 0
    torch.testing.assert_close(folded(x), network.eval()(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], values) for name, values in network.state_dict().items())
    assert {t.dtype for t in folded.state_dict().values()} == {torch.float32}
    again = deployed_network(folded).state_dict()
    assert all(torch.equal(values, again[name]) for name, values in folded.state_dict().items())


class Twice(nn.Module):
    """A convolution that two branches read, one through a batch norm; and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.norm_a, self.norm_b, self.last = nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.norm_a(x)
        x = self.norm_b(self.b(self.b(x)))
        return self.last(x.flatten(1))


def test_batch_norms_that_cannot_be_folded_stay_and_are_certified() -> None:
    network = shaken(Twice())
    folded = deployed_network(network)
    assert norms(folded) == 2
    x = torch.rand(5, 2, 4, 4)
    torch.testing.assert_close(folded(x), network.eval()(x))
    graph = trace(folded.double(), (2, 4, 4))
    margins = sound_margins(graph, x.double(), Fraction(0), torch.zeros(5).long(), PRECISIONS["float32"])
    assert margins.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_bounds_of_a_residual_network_hold_its_evaluations_and_never_grow_with_the_radius(name: str) -> None:
    deployed = deployed_network(shaken(residual_network()))
    images = torch.rand(6, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    graph = trace(deployed_network(deployed).double(), (2, 8, 8))
    labels, last = torch.tensor([0, 1, 2, 0, 1, 2]), None
    for eps in (0.0, 1e-6, 1e-3, 0.01):
        radius = torch.full((6,), eps, dtype=torch.float64)
        margins = sound_margins(graph, images.double(), radius, labels, PRECISIONS[name])
        plain = graph.bound(input_box(images.double(), radius)).margins(labels)
        assert (margins < plain).all()
        assert last is None or (margins <= last + 1e-9).all()
        last = margins
        noise = (torch.rand(40, *images.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1).sign()
        points = (images + eps * noise).clamp(0, 1)
        inside = ((points.double() - images.double()).abs() <= eps).flatten(2).all(2)
        with plain_kernels():
            logits = deployed(points.flatten(0, 1)).view(40, 6, 3).double()
        wrong = ~nn.functional.one_hot(labels, 3).bool()
        gaps = (logits.gather(2, labels.view(1, 6, 1).expand(40, 6, 1)) - logits)[:, wrong].view(40, 6, 2)
        if name != "float64":  # float32 is no float64 evaluation
            assert (gaps >= margins)[inside].all()


# The certifier -----------------------------------------------------------------------------------------------------


def task(network: nn.Module, count: int = 12, **certify: str) -> CertifyTask:
    table = {
        "dataset": "digits",
        "model": "cnn-small",
        "threat": {"norm": "linf", "radius": "0.001"},
        "method": {"name": "fast-ibp"},
        "train": {"epochs": 1},
        "certify": {"cap": "0.2", **certify},
    }
    draw = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, 2, 8, 8), generator=draw, dtype=torch.uint8)
    with torch.no_grad():
        labels = deployed_network(network)(images.float() / 255).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    recipe = parse_recipe(table, "test")
    return CertifyTask(
        recipe,
        None,
        network,
        Split(images, labels),
        255,
        0,
        recipe.threat.radius,
        recipe.cap,
        torch.device("cpu"),
    )


def certified(task: CertifyTask) -> Certificates:
    task.network.eval()
    (found,) = certifier(task).certify(task)
    return found


def certifier(task: CertifyTask) -> Certifier:
    asked = task.recipe.certify
    return find_certifier("ibp", asked.guarantee or "float_sound", asked.deploy)


def test_rows_say_what_is_guaranteed_for_which_deployment_and_repeat_to_the_bit() -> None:
    network = shaken(residual_network())
    rows = {name: certified(task(network, deploy=name)) for name in ("float32", "bf16")}
    real = certified(task(network, guarantee="real_arith"))
    assert (real.guarantee, real.deploy) == ("real_arith", "float32")
    for name, found in rows.items():
        assert (found.guarantee, found.deploy) == ("float_sound", name)
        assert found.verdict[0] == "misclassified"
        assert (found.radius <= real.radius + 1e-9).all()
        again = certified(task(network, deploy=name))
        assert np.array_equal(found.margin, again.margin)
        assert np.array_equal(found.radius, again.radius)
    assert rows["bf16"].radius.sum() < 0.99 * rows["float32"].radius.sum() < real.radius.sum()


def test_a_reported_radius_was_itself_proved() -> None:
    network = shaken(residual_network())
    asked = task(network)
    found = certified(asked)
    graph = trace(deployed_network(network).double(), (2, 8, 8))
    images = (asked.split.images.float() / 255).double()
    radius = torch.tensor(found.radius)
    margins = sound_margins(graph, images, radius, asked.split.labels, PRECISIONS["float32"]).amin(1)
    assert (margins[radius > 0] > 0).all()
    assert (radius > 0).sum() > 5
    above = sound_margins(graph, images, radius + 1e-5, asked.split.labels, PRECISIONS["float32"]).amin(1)
    assert (above[(radius > 0) & (radius < 0.19)] <= 0).all()


def test_overflow_gives_unknown_and_not_error() -> None:
    network = shaken(residual_network())
    with torch.no_grad():
        network[-1].weight.mul_(1e7)
    found = certified(task(network, deploy="fp16"))
    assert set(found.verdict[1:]) == {"unknown"}
    assert np.isnan(found.margin).all()
    assert (found.radius == 0).all()


def test_a_proof_that_an_evaluation_contradicts_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        certifiers, "sound_margins", lambda graph, images, *_: images.new_ones(len(images), 2)
    )
    with pytest.raises(RunError, match="contradicted"):
        certified(task(shaken(residual_network())))


def test_settings_and_switches_are_part_of_the_settings_digest() -> None:
    network = residual_network()
    tasks = [
        task(network, **settings)
        for settings in ({}, {"deploy": "bf16"}, {"deploy": "float64"}, {"guarantee": "real_arith"})
    ]
    assert len({digest_settings(certifier(t), t.recipe) for t in tasks}) == 4
    assert "'cudnn': 'off'" in str(certify_settings(certifier(tasks[0]), tasks[0].recipe))
    with pytest.raises(UsageError, match="says nothing unless"):
        task(network, guarantee="real_arith", deploy="bf16")


def test_kernels_are_plain_while_it_lasts_and_as_before_afterwards() -> None:
    before = torch.backends.cudnn.enabled, torch.get_float32_matmul_precision()
    with plain_kernels():
        assert not torch.backends.cudnn.enabled
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert (torch.backends.cudnn.enabled, torch.get_float32_matmul_precision()) == before
