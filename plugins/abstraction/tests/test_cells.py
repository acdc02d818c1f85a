"""Reachable cells and bounds over them: exact, and never above what any reachable input gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from certbench.bounds import PRECISIONS, Box, input_box, sound_margins, trace
from certbench.data.catalog import DATASETS
from certbench.errors import UsageError
from certbench.models import MODELS
from certbench_abstraction.bounds import CellBounds, smallest_margin
from certbench_abstraction.cells import Cells, on_grid, pixels_of, radius_until_change, reachable
from certbench_abstraction.complete import branch, enumerate_cells
from certbench_abstraction.layer import Abstraction
from certbench_abstraction.network import build_classifier
from certbench_abstraction.zonotope import Zonotope, over_box, relu_boxes

Arrays = dict[str, Tensor]
Load = Callable[[str], Arrays]
NAMES = ["verify_fc", "verify_fc_dyadic", "verify_dmsmall"]


def network_of(name: str, arrays: Arrays, with_weights: Callable[..., nn.Module]) -> nn.Sequential:
    """The fixture's classifier, its end points in float64 as the reference has them."""
    layer = Abstraction(int(arrays["n"])).double()
    ends = 2 * torch.arange(layer.n + 1, dtype=torch.float64) / layer.n - 1
    layer.upper, layer.lower = ends[1:], ends[:-1]
    if name.startswith("verify_fc"):
        f = nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, 10))
    else:
        f = MODELS["dm-small"](replace(DATASETS["digits"], shape=(2, 4, 4)))
        f[5], f[7] = nn.Linear(512, 10), nn.Linear(10, 10)
    return nn.Sequential(layer, with_weights(f.double(), arrays)).eval()


def images_of(arrays: Arrays) -> Tensor:
    x = arrays["x"]
    side = int(x[0].numel() ** 0.5)
    return ((x + 1) / 2).view(len(x), 1, side, side)


def like(values: Tensor, images: Tensor) -> Tensor:
    return values.long().view(images.shape)


@pytest.mark.parametrize("name", NAMES)
def test_cells_counts_and_radii_are_those_of_the_oracle(oracle: Load, name: str) -> None:
    arrays = oracle(name)
    layer, images = Abstraction(int(arrays["n"])), images_of(arrays)
    for i, eps in enumerate(arrays["eps"].tolist()):
        radius = torch.full((len(images),), eps / 2, dtype=torch.float64)
        cells = reachable(images, radius, layer)
        assert torch.equal(cells.lo, like(arrays["cell_lo"][i], images))
        assert torch.equal(cells.hi, like(arrays["cell_hi"][i], images))
        assert torch.equal(cells.count, arrays["count"][i])
        assert torch.equal(cells.straddling.double(), arrays["n_straddle"][i])
    own = reachable(images, torch.zeros(len(images), dtype=torch.float64), layer)
    found = radius_until_change(images, own, layer)
    # the border of n intervals is a float32 number here, and the oracle leaves out that upper borders are open
    torch.testing.assert_close(found, arrays["single_cell_radius"] / 2, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", [None, PRECISIONS["float32"]])
def test_bounds_and_enumeration_are_those_of_the_oracle(
    oracle: Load, name: str, precision: object, with_weights: Callable[..., nn.Module]
) -> None:
    """In real arithmetic equal to the independent reference; float-sound never above it, and near."""
    arrays = oracle(name)
    images, labels = images_of(arrays), arrays["y"].long()
    bounds = CellBounds(network_of(name, arrays, with_weights), tuple(images.shape[1:]), precision)  # type: ignore[arg-type]
    for i in range(len(arrays["eps"])):
        cells = Cells(like(arrays["cell_lo"][i], images), like(arrays["cell_hi"][i], images))
        exact, coupled = arrays["exact_margin"][i], arrays["ibp_margin_coupled"][i]
        known = ~exact.isnan()
        interval = bounds.interval(cells, labels)
        assert (interval[known] <= exact[known] + 1e-9).all()
        linear = {
            kind: bounds.linear(cells, labels, kind)
            for kind in ("crown-ibp", "crown", "zonotope", "zonotope-crown")
        }
        for kind, margins in linear.items():
            assert (margins[known] <= exact[known] + 1e-9).all(), kind
        assert (linear["zonotope"] >= linear["crown-ibp"] - 1e-9).double().mean() > 0.9
        which = (known & (cells.count <= 20_000)).nonzero().squeeze(1)
        result = enumerate_cells(bounds, cells[which], labels[which])
        proved, robust = result.margin > 0, arrays["exact_robust"][i][which] > 0
        assert torch.equal(result.evaluated[proved].double(), arrays["count"][i][which][proved])
        assert torch.equal(bounds.points(result.worst, labels[which]) > 0, proved)
        if precision is None:
            torch.testing.assert_close(interval, coupled, atol=1e-9, rtol=0)
            assert (arrays["ibp_margin_indep"][i] <= interval + 1e-9).all()
            assert torch.equal(proved, robust), "exact_robust, not official_verified"
            torch.testing.assert_close(result.margin[robust], exact[which][robust], atol=1e-9, rtol=0)
        else:  # what a float32 evaluation may lose at worst is of the order of 1e-4 of the margins here
            torch.testing.assert_close(interval, coupled, atol=0.02, rtol=1e-3)
            assert (interval <= coupled + 1e-12).all()
            assert (robust | ~proved).all()
            assert (result.margin[proved] <= exact[which][proved]).all()


@pytest.mark.parametrize("name", NAMES)
def test_branching_decides_as_the_oracle_does(
    oracle: Load, name: str, with_weights: Callable[..., nn.Module]
) -> None:
    arrays = oracle(name)
    images, labels = images_of(arrays), arrays["y"].long()
    bounds = CellBounds(network_of(name, arrays, with_weights), tuple(images.shape[1:]), None)
    for i in range(len(arrays["eps"])):
        cells = Cells(like(arrays["cell_lo"][i], images), like(arrays["cell_hi"][i], images))
        for image in range(0, len(images), 3):
            one = torch.tensor([image])
            exact = float(arrays["exact_margin"][i][image])
            found = branch(bounds, cells[one], labels[one], passes=100_000, seconds=60.0)
            if arrays["exact_robust"][i][image]:
                assert found.margin is not None
                assert 0 < found.margin <= exact + 1e-6
            else:
                assert found.margin is None
                assert found.worst is not None
                assert (found.worst >= cells.lo[one]).all()
                assert (found.worst <= cells.hi[one]).all()
                assert (bounds.points(found.worst, labels[one]) <= 0).all()
    gave_up = branch(bounds, cells, labels[:1], passes=0, seconds=60.0)
    assert (gave_up.margin, gave_up.worst) == (None, None)


@pytest.mark.parametrize("n", [2, 3, 4, 9])
@pytest.mark.parametrize("radius", ["1/16", "1/8", "1/8-", "1/8+", "0.1", "1/3", "1"])
def test_reachable_cells_are_exactly_those_of_rational_arithmetic(n: int, radius: str) -> None:
    """Every code of an image with 16 levels, at radii on, just below and just above borders."""
    layer = Abstraction(n)
    eps = float(Fraction(radius.rstrip("+-")))
    if radius[-1] in "+-":
        towards = 2.0 if radius[-1] == "+" else 0.0
        eps = float(torch.nextafter(torch.tensor(eps).double(), torch.tensor(towards).double()))
    codes = torch.arange(17)
    images = (codes.float() / 16).double().view(-1, 1, 1, 1)
    cells = reachable(images, torch.full((17,), eps, dtype=torch.float64), layer)
    borders = [Fraction(float(b)) for b in layer.borders]

    def interval(t: Fraction) -> int:
        return sum(b <= t for b in borders)

    for code in codes.tolist():
        low, high = max(Fraction(code, 16) - Fraction(eps), 0), min(Fraction(code, 16) + Fraction(eps), 1)
        lo, hi = int(cells.lo[code]), int(cells.hi[code])
        assert (lo, hi) == (interval(Fraction(low)), interval(Fraction(high)))
    if radius == "1":
        assert (int(cells.lo.max()), int(cells.hi.min())) == (0, n - 1), "every cell is reachable"


@pytest.mark.parametrize("n", [2, 3, 9, 16])
def test_cells_change_just_beyond_the_radius_that_is_reported(n: int) -> None:
    layer = Abstraction(n)
    images = (torch.randint(0, 256, (40, 1, 3, 3)).float() / torch.tensor(255.0)).double()
    eps = torch.rand(40, dtype=torch.float64) * 0.2
    cells = reachable(images, eps, layer)
    end = radius_until_change(images, cells, layer)
    assert (end >= eps).all()
    same = reachable(images, end, layer)
    assert torch.equal(same.lo, cells.lo)
    assert torch.equal(same.hi, cells.hi)
    beyond = reachable(images, torch.nextafter(end, end + 1), layer)
    changed = (beyond.lo != cells.lo) | (beyond.hi != cells.hi)
    assert changed.flatten(1).any(1)[end.isfinite()].all()
    assert end.isfinite().any()


def test_cells_of_an_image_that_can_go_anywhere_never_change() -> None:
    layer = Abstraction(4)
    images = torch.rand(2, 1, 3, 3).double()
    everything = reachable(images, torch.ones(2, dtype=torch.float64), layer)
    assert radius_until_change(images, everything, layer).isinf().all()
    wide = Cells(torch.zeros(1, 3, 224, 224).long(), torch.full((1, 3, 224, 224), 3))
    assert wide.count.isinf().all(), "too many to count is many, not an overflow"


def test_pixels_realise_the_cells_they_are_made_for() -> None:
    layer = Abstraction(5)
    images = torch.rand(50, 1, 4, 4)
    cells = reachable(images.double(), torch.full((50,), 0.3, dtype=torch.float64), layer)
    k = cells.lo + (torch.rand(cells.lo.shape) * (cells.hi - cells.lo + 1)).long()
    pixels = pixels_of(k, images, layer)
    assert torch.equal(layer.index(pixels), k)
    stay = k == layer.index(images)
    assert torch.equal(pixels[stay], images[stay])
    assert ((pixels - images).abs() <= 0.3 + 1e-6).all()
    assert ((pixels >= 0) & (pixels <= 1)).all()


def test_images_off_the_grid_are_noticed() -> None:
    grid = (torch.randint(0, 256, (3, 1, 4, 4)).float() / torch.tensor(255.0)).double()
    assert on_grid(grid, 255).all()
    grid[1, 0, 2, 2] += 1e-6
    assert on_grid(grid, 255).tolist() == [True, False, True]


@pytest.mark.parametrize("model", ["dm-small", "fc3", "fc5-tanh", "cnn-small", "lenet5"])
def test_float_sound_bounds_hold_for_float32_evaluations(model: str) -> None:
    """Random reachable inputs, evaluated in float32 in several batch shapes, stay above the bound."""
    info = DATASETS["mnist"]
    network = build_classifier(model, info, 7, 3).eval()
    bounds = CellBounds(network, info.shape, PRECISIONS["float32"])
    images = torch.rand(3, *info.shape)
    labels = network(images).argmax(1)
    for eps in (0.0, 1e-3, 0.05):
        cells = reachable(images.double(), torch.full((3,), eps, dtype=torch.float64), network[0])
        least = bounds.interval(cells, labels)
        assert least.isfinite().all()
        for _ in range(10):
            k = cells.lo + (torch.rand(cells.lo.shape) * (cells.hi - cells.lo + 1)).long()
            with torch.no_grad():
                z = network[0].encode(k)
                together = smallest_margin(network[1](z), labels).double()
                alone = torch.cat(
                    [
                        smallest_margin(network[1](one), label)
                        for one, label in zip(z.split(1), labels.split(1), strict=True)
                    ]
                )
            assert (least <= together).all()
            assert (least <= alone.double()).all()
        if eps == 0.0:  # the worst case over all orders of summation, of up to 1,568 terms
            assert (least >= together - 0.1).all()


def test_coupling_the_end_points_is_tighter_than_boxing_them_apart() -> None:
    info = DATASETS["digits"]
    network = build_classifier("dm-small", info, 5, 0).eval()
    images = torch.rand(8, *info.shape)
    labels = network(images).argmax(1)
    eps = torch.full((8,), 0.1, dtype=torch.float64)
    cells = reachable(images.double(), eps, network[0])
    real = CellBounds(network, info.shape, None).interval(cells, labels)
    sound = CellBounds(network, info.shape, PRECISIONS["float32"]).interval(cells, labels)
    graph = trace(network.double(), info.shape)
    apart = graph.bound(input_box(images.double(), 0.1)).margins(labels).amin(1)
    sound_apart = sound_margins(graph, images.double(), eps, labels, PRECISIONS["float32"]).amin(1)
    assert (real > apart).all()
    assert (sound > sound_apart).all()
    assert (sound < real).all()
    torch.testing.assert_close(sound, real, atol=1e-2, rtol=1e-2)


def test_enumeration_is_complete_and_counts_its_passes() -> None:
    """Against a plain product over cells, with 1, 2 and 3 cells per pixel."""
    network = nn.Sequential(
        Abstraction(4), nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    )
    bounds = CellBounds(network.eval(), (1, 2, 2), None)
    lo = torch.randint(0, 2, (30, 1, 2, 2))
    cells = Cells(lo, (lo + torch.randint(0, 3, lo.shape)).clamp_max(3))
    labels = network[1].double()(network[0].double().encode(lo)).argmax(1)
    result = enumerate_cells(bounds, cells, labels)
    for image in range(30):
        ranges = [
            range(a, b + 1)
            for a, b in zip(
                cells.lo[image].flatten().tolist(), cells.hi[image].flatten().tolist(), strict=True
            )
        ]
        points = torch.tensor(list(itertools.product(*ranges))).view(-1, 1, 2, 2)
        margins = bounds.points(points, labels[image].expand(len(points)))
        assert bool(result.margin[image] > 0) == bool(margins.min() > 0)
        if margins.min() > 0:
            assert int(result.evaluated[image]) == len(points)
            assert float(result.margin[image]) == pytest.approx(float(margins.min()))
        else:
            assert int(result.evaluated[image]) <= len(points)


def exact_radius(z: Zonotope, weight: Tensor) -> Tensor:
    """The radius after a linear layer, in float64."""
    return (z.G.double() @ weight.T).abs().sum(1) + z.r @ weight.abs().T


def test_what_float32_rounds_off_is_covered_and_the_term_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(300, 50).double().requires_grad_(False)
    radius = torch.rand(4, 300).double()
    box = Box(center=torch.zeros_like(radius), radius=radius)
    z = over_box(box, torch.rand(4, 300) < 0.7)
    assert (z.spread + z.r >= radius).all()
    found, exact = z.affine(layer).box.radius, exact_radius(z, layer.weight)
    assert (found >= exact).all()
    assert (found <= exact * (1 + 1e-4)).all()
    opened = z.affine(layer)
    slope = torch.rand(4, 50).double()
    center = slope * opened.box.radius  # every ReLU is open, each by another share
    after = replace(opened, c=center).relu()
    upper = center + opened.box.radius
    assert (after.box.upper >= upper).all()
    assert (after.box.lower <= 0).all()
    monkeypatch.setattr("certbench_abstraction.zonotope.gamma", lambda operations: 0.0)
    assert not (z.affine(layer).box.radius >= exact).all()


def test_zonotopes_hold_every_value_and_name_what_they_cannot_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 6),
        nn.ReLU(),
    ).double()
    center, radius = torch.randn(3, 2, 5, 5).double(), 0.3 * torch.rand(3, 2, 5, 5).double()
    radius[1] = 0.0
    variable = torch.rand(3, 2, 5, 5) < 0.5
    for limit in (0, 60, 10_000):  # new ReLUs become variables nowhere, in the first layer, everywhere
        monkeypatch.setattr("certbench_abstraction.zonotope.VARIABLES", limit)
        boxes = relu_boxes(network, over_box(Box(center=center, radius=radius), variable))
        assert len(boxes) == 3
        for corner in range(60):
            share = torch.rand_like(radius) * 2 - 1 if corner % 2 else torch.randn_like(radius).sign()
            value, found = center + share * radius, iter(boxes)
            for layer in network:
                if isinstance(layer, nn.ReLU):
                    box = next(found)
                    assert (box.lower - 1e-12 <= value).all()
                    assert (value <= box.upper + 1e-12).all()
                value = layer(value)
    with pytest.raises(UsageError, match="forward through Tanh"):
        relu_boxes(nn.Sequential(nn.Tanh()), over_box(Box(center=center, radius=radius), variable))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "Conv2d with padding mode circular"),
        (nn.Flatten(2), "Flatten"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)), "ParametrizedLinear"),
        (nn.Softmax(1), "Softmax"),
    ],
)
def test_zonotopes_pass_through_no_layer_that_does_otherwise_than_its_kind(
    layer: nn.Module, words: str
) -> None:
    radius = torch.rand(1, 2, 5, 5).double()
    z = over_box(Box(center=torch.zeros_like(radius), radius=radius), radius > 0)
    with pytest.raises(UsageError, match=f"forward through {words};"):
        relu_boxes(nn.Sequential(layer.double()), z)


def test_zonotopes_allow_no_kernel_whose_round_off_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(z: Zonotope, layer: nn.Conv2d | nn.Linear) -> Zonotope:
        seen.append((torch.backends.cudnn.enabled, torch.get_float32_matmul_precision()))
        return z

    monkeypatch.setattr(Zonotope, "affine", watched)
    radius = torch.rand(1, 4).double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        relu_boxes(nn.Sequential(nn.Linear(4, 4)), over_box(Box(center=radius, radius=radius), radius > 0))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [(False, "highest")]
