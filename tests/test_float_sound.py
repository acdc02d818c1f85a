"""Float-sound bounds: they hold for every admissible evaluation, and each of their terms is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certbench.bounds import (
    PRECISIONS,
    Graph,
    Precision,
    SoundBox,
    alpha_crown_margins,
    crown_ibp_margins,
    crown_margins,
    input_box,
    sound_input_box,
    sound_margins,
    tape,
    trace,
)
from certbench.bounds.precision import gamma
from certbench.bounds.sound import Deployment, rounding, sound_bounds
from certbench.bounds.sound.deployment import SLACK_RULES, SOUND_RULES
from certbench.errors import UsageError
from certbench.models.fold import deployed_network

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


LINEAR: dict[str, Callable[..., Tensor]] = {
    "crown-ibp": crown_ibp_margins,
    "crown": crown_margins,
    "alpha-crown": partial(alpha_crown_margins, steps=2),
}
BOUNDS = ["ibp", *LINEAR]


def margins_of(
    bound: str, graph: Graph, images: Tensor, eps: Fraction | Tensor, labels: Tensor, precision: Precision
) -> Tensor:
    with torch.no_grad():
        if bound == "ibp":
            return sound_margins(graph, images, eps, labels, precision)
        return LINEAR[bound](graph, sound_input_box(images, eps), labels, precision=precision)


def all_margins(
    network: nn.Module, image: Tensor, eps: Fraction, precision: Precision, bound: str = "ibp"
) -> Tensor:
    """One image against every label, shape (classes, classes - 1)."""
    graph = trace(network, tuple(image.shape))
    classes = graph.run(image[None]).logits.shape[1]
    images = image.expand(classes, *image.shape)
    return margins_of(bound, graph, images, eps, torch.arange(classes), precision)


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
    precision: Precision,
    deploy: Precision,
    eps: Fraction,
    size: float = 1.0,
    nets: int = 2,
    bounds: Sequence[str] = ("ibp",),
) -> int:
    """Bounds computed for ``precision`` that evaluations at ``deploy`` break."""
    found = 0
    for seed in range(nets):
        network, image = small_network(seed, size), small_images(seed, 1)[0]
        margins = [all_margins(network, image, eps, precision, bound) for bound in bounds]
        assert torch.stack(margins).isfinite().all()
        for number, x in enumerate(ball_points(image, eps, seed)):
            for lean in (0.0, 0.5, 1.0):
                logits = Adversary(deploy, number, lean).run(network, x)
                found += sum(violations(proved, logits) for proved in margins)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eps", [Fraction(0), Fraction(8, 255)])
def test_no_admissible_evaluation_in_exact_arithmetic_leaves_the_bounds(name: str, eps: Fraction) -> None:
    assert broken_bounds(PRECISIONS[name], PRECISIONS[name], eps, bounds=BOUNDS) == 0


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
@pytest.mark.parametrize("bound", ["ibp", "crown"])
def test_without_a_round_off_term_the_bounds_break(bound: str, name: str, term: str) -> None:
    """All weights are positive and all errors go down, which is the worst case that the bounds allow for."""
    network, image = classifier([[0.7] * 6], [0.1]), tensor([0.9] * 6)
    deploy = replace(PRECISIONS[name], flush=2.0**-126)  # the larger one of float16 would hide the others
    logits = Adversary(deploy, 0, lean=0.0).run(network, fractions(image))
    assert violations(all_margins(network, image, Fraction(0), deploy, bound), logits) == 0
    without = replace(deploy, **{term: 0.0})
    assert violations(all_margins(network, image, Fraction(0), without, bound), logits) == 1


def test_operands_that_flush_are_covered_and_the_term_is_needed() -> None:
    deploy = PRECISIONS["fp16"]
    size = 2.0**-13  # many weights are below the smallest normal number
    for bound in ("ibp", "crown-ibp"):
        assert broken_bounds(deploy, deploy, Fraction(0), size, nets=5, bounds=[bound]) == 0
        without = replace(deploy, flush=0.0)
        assert broken_bounds(without, deploy, Fraction(0), size, nets=5, bounds=[bound]) > 0


def test_products_that_flush_are_covered_and_the_term_is_needed() -> None:
    network = classifier([[2.0**-70]], [0.0])
    deploy, image = replace(PRECISIONS["float32"], flush=0.0), tensor([2.0**-70])
    for bound, (precision, positive) in product(
        ("ibp", "crown"), ((deploy, False), (replace(deploy, sum_flush=0.0), True))
    ):
        margins = all_margins(network, image, Fraction(0), precision, bound)
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


def exact_margin(layers: Sequence[nn.Linear], x: list[Fraction]) -> Fraction:
    """``z_0 - z_1`` of linear layers in rational arithmetic."""
    for layer in layers:
        rows = zip(layer.weight, layer.bias.tolist(), strict=True)
        x = [sum((w * v for w, v in zip(fractions(W), x, strict=True)), Fraction(b)) for W, b in rows]
    return x[0] - x[1]


def test_computed_coefficients_are_off_and_the_term_for_them_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two layers that nearly cancel: what is left of the coefficients is mostly round-off."""

    def broken() -> int:
        found = 0
        for seed in range(4):
            draw = np.random.default_rng(seed)
            back = draw.normal(size=(12, 12))
            first = linear(np.concatenate([back, back * (1 + draw.normal() * 2.0**-40)]), np.zeros(24))
            last = draw.normal(size=(2, 12))
            network = nn.Sequential(first, linear(np.concatenate([last, -last], 1), np.zeros(2)))
            image = torch.tensor(draw.random(12))
            graph = trace(network, (12,))
            bound = margins_of(
                "crown-ibp", graph, image[None], Fraction(0), torch.tensor([0]), own_arithmetic()
            )
            found += Fraction(float(bound)) > exact_margin(list(network), fractions(image))
        return found

    assert broken() == 0
    monkeypatch.setattr(Deployment, "own", 0.0)
    assert broken() > 0


class Branches(nn.Module):
    """``h + h * small`` of two equal numbers, one minus the other: coefficients that meet in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("small", tensor([2.0**-53 + 2.0**-60, 0.0]))
        self.first = linear(np.zeros((2, 2)), np.ones(2))
        self.last = linear(np.array([[1.0, -1.0], [0.0, 0.0]]), np.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        result: Tensor = self.last(h + h * self.small)
        return result


def test_coefficients_added_up_are_off_and_the_term_for_them_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, image = trace(Branches(), (2,)), tensor([[1.0, 1.0]])
    exact = Fraction(2) ** -53 + Fraction(2) ** -60
    monkeypatch.setattr(Deployment, "own", 0.0)  # it would hide the other
    for adding, holds in ((Deployment.adding, True), (lambda _run, x: torch.zeros_like(x.lower), False)):
        monkeypatch.setattr(Deployment, "adding", adding)
        bound = margins_of("crown-ibp", graph, image, Fraction(0), torch.tensor([0]), own_arithmetic())
        assert (Fraction(float(bound)) <= exact) is holds


def test_sums_of_the_constant_are_rounded_down_and_would_not_hold_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The biases of two layers, of which the second is lost beside the first to nearest."""
    first = linear(np.array([[0.0]]), np.array([2.0**-60]))
    last = linear(np.array([[-1.0], [0.0]]), np.array([1.0, 0.0]))
    graph, image = trace(nn.Sequential(first, last), (1,)), tensor([[0.0]])
    exact = 1 - Fraction(2) ** -60
    monkeypatch.setattr(Deployment, "own", 0.0)
    for rounded, holds in ((rounding.down, True), (lambda values: values, False)):
        monkeypatch.setattr(tape, "down", rounded)
        bound = margins_of("crown-ibp", graph, image, Fraction(0), torch.tensor([0]), own_arithmetic())
        assert (Fraction(float(bound)) <= exact) is holds


def test_underflow_of_coefficients_is_covered_and_the_term_is_needed() -> None:
    """Two factors whose product is no float64, times an input that makes it one."""
    first = linear(np.array([[2.0**-600]]), np.zeros(1))
    last = linear(np.array([[-(2.0**-500)], [0.0]]), np.zeros(2))
    network = nn.Sequential(linear(np.array([[2.0**200]]), np.zeros(1)), first, last)
    graph, image = trace(network, (1,)), tensor([[1.0]])
    exact = -(Fraction(2) ** -900)
    for precision, holds in ((own_arithmetic(), True), (own_arithmetic(unit_flush=0.0), False)):
        bound = margins_of("crown-ibp", graph, image, Fraction(0), torch.tensor([0]), precision)
        assert (Fraction(float(bound)) <= exact) is holds


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
    monkeypatch.setattr(rounding, "FOUR_UNITS", 1.0)
    assert escapes(from_ends) > 0
    monkeypatch.setattr(rounding, "down", lambda values: values)
    monkeypatch.setattr(rounding, "up", lambda values: values)
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
    monkeypatch.setattr(rounding, "down", lambda values: values)
    monkeypatch.setattr(rounding, "up", lambda values: values)
    monkeypatch.setattr(rounding, "FOUR_UNITS", 1.0)
    network, images, labels = small_network(5), small_images(5, 4), torch.tensor([0, 1, 2, 0])
    graph, eps = trace(network, (1, 3, 3)), torch.full((4,), 0.05, dtype=torch.float64)
    with torch.no_grad():
        plain = graph.bound(input_box(images, eps)).margins(labels)
        found = sound_margins(graph, images, eps, labels, EXACT)
        torch.testing.assert_close(found, plain, rtol=1e-13, atol=1e-13)
        for bound, margins in LINEAR.items():
            found = margins_of(bound, graph, images, eps, labels, EXACT)
            plain = margins(graph, input_box(images, eps), labels)
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
        margins = np.maximum.reduce([
            margins_of(bound, graph, center.expand(3, -1), radius, torch.arange(3), PRECISIONS[name])
            for bound in ("ibp", "crown-ibp", "crown")
        ])  # fmt: skip
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
    assert float(real) > 0
    for bound in BOUNDS:
        found = {n: float(margins_of(bound, graph, image, eps, label, PRECISIONS[n])) for n in NAMES}
        assert found["float64"] > 0
        assert not any(found[name] > 0 for name in NAMES if name != "float64")


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


def arguments_of(rule: str, x: SoundBox, y: SoundBox) -> list[Any]:
    if rule == "average":
        lower, upper = torch.stack([x.lower, y.lower], -1), torch.stack([x.upper, y.upper], -1)
        return [SoundBox(lower=lower[:, :, None], upper=upper[:, :, None]), [1, 2]]
    return {"add": [x, y], "shift": [x, 0.1], "scale": [0.1, x], "div": [x, 0.3], "leaky": [x, 0.1]}[rule]


OPERATIONS = {
    "add": "aten.add.Tensor",
    "shift": "aten.sub.Tensor",
    "scale": "aten.mul.Tensor",
    "div": "aten.div.Tensor",
    "leaky": "aten.leaky_relu.default",
    "average": "aten.avg_pool2d.default",
}


def rule_escapes(rule: str, bound: Precision, deploy: Precision, width: float) -> int:
    draw = torch.Generator().manual_seed(0)
    xs, ys = torch.randn(2, 40, dtype=torch.float64, generator=draw)
    boxes = [SoundBox(lower=v[None] - width, upper=v[None] + width) for v in (xs, ys)]
    run = Deployment(bound, boxes[0].lower)
    out = SOUND_RULES[OPERATIONS[rule]](run, *arguments_of(rule, *boxes))
    out = run.stored(out) if rule == "leaky" else out
    found = 0
    for which, lean in product((-1, 0, 1), (0.0, 1.0)):
        a = Adversary(deploy, which, lean) if which >= 0 else Adversary(deploy, 7, lean)
        rows = zip(fractions(xs), fractions(ys), out.lower.flatten(), out.upper.flatten(), strict=True)
        for x, y, lower, upper in rows:
            value = values_of(rule, a, x + which * Fraction(width), y + which * Fraction(width))
            found += not Fraction(float(lower)) <= value <= Fraction(float(upper))
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", sorted(OPERATIONS))
def test_elementwise_rules_hold_and_their_widening_is_needed(rule: str, name: str) -> None:
    deploy = PRECISIONS[name]
    width = 2.0**-10
    assert rule_escapes(rule, deploy, deploy, width) == 0
    assert rule_escapes(rule, deploy, deploy, 0.0) == 0
    bare = replace(deploy, accumulator=0.0, storage=0.0, flush=0.0)
    if name != "float64":  # there one step outward is as much as the term
        assert rule_escapes(rule, bare, deploy, 0.0) > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", sorted(OPERATIONS))
def test_slack_covers_what_a_deployed_result_is_off_and_is_needed(rule: str, name: str) -> None:
    deploy = PRECISIONS[name]
    draw = torch.Generator().manual_seed(1)
    xs, ys = torch.randn(2, 40, dtype=torch.float64, generator=draw)
    boxes = [SoundBox(lower=v[None], upper=v[None]) for v in (xs, ys)]
    escapes = {}
    for kind, bound in (
        ("whole", deploy),
        ("bare", replace(deploy, accumulator=0.0, storage=0.0, flush=0.0)),
    ):
        run = Deployment(bound, xs[None])
        slack = SLACK_RULES[OPERATIONS[rule]](run, 0.0, *arguments_of(rule, *boxes)) * run.cover
        escapes[kind] = 0
        for lean in (0.0, 1.0):
            a = Adversary(deploy, 3, lean)
            for x, y, allowed in zip(fractions(xs), fractions(ys), fractions(slack), strict=True):
                value, exact = values_of(rule, a, x, y), values_of(rule, Adversary(EXACT, 0, 0.0), x, y)
                if rule == "leaky" and x > 0:
                    value = x  # rounded by whoever reads it
                escapes[kind] += abs(value - exact) > allowed
    assert escapes["whole"] == 0
    assert escapes["bare"] > 0


ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((
        "sigmoid", "tanh", "log_sigmoid", "softplus", "elu", "celu", "selu", "silu", "mish", "gelu", "hardsigmoid",
        "hardswish", "leaky_relu", "relu6", "hardtanh", "abs", "relu",
    ), ()),
    "clamp": (-0.3, 1.7), "clamp_min": (0.1,), "clamp_max": (0.1,),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "float64": torch.float64}
GRID = torch.cat(
    [torch.linspace(-120, 120, 40_001), torch.linspace(-9, 9, 40_001), torch.linspace(-1e-3, 1e-3, 4_001)]
)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_as_pytorch_computes_them_stay_in_their_bounds(name: str) -> None:
    """At a point, in an interval, and around the linear bound; the boxes hold what was not yet written back."""
    function, options = getattr(torch.ops.aten, name).default, ACTIVATIONS[name]
    operation = f"aten.{name}.default"
    points = GRID.double()[None]
    exact = function(points, *options)
    exact = exact[0] if isinstance(exact, tuple) else exact
    for precision, dtype in DTYPES.items():
        run = Deployment(PRECISIONS[precision], points)
        found = function(GRID.to(dtype), *options).double()
        for width in (0.0, 2.0**-8):
            box = SoundBox(lower=points - width, upper=points + width)
            image = run.stored(SOUND_RULES[operation](run, box, *options))
            assert ((found >= image.lower) & (found <= image.upper)).all(), precision
        slack = SLACK_RULES[operation](run, 2.0**-50, SoundBox(lower=points, upper=points), *options)
        storing = run.storing(exact.abs() + slack)
        assert ((found - exact).abs() <= slack + storing).all(), precision


@pytest.mark.parametrize("name", ["sigmoid", "gelu", "softplus", "elu", "hardswish"])
def test_without_units_for_the_library_an_activation_escapes(name: str) -> None:
    points, function = GRID.double()[None], getattr(torch.ops.aten, name).default
    exact = replace(PRECISIONS["float32"], accumulator=0.0)
    rule = SOUND_RULES[f"aten.{name}.default"]
    tight = rule(Deployment(exact, points), SoundBox(lower=points, upper=points))
    found = function(GRID).double()
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
