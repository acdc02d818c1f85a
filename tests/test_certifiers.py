"""Certifiers: verdicts, radii and cascades against oracle arrays and counterexamples, and what they refuse."""

from __future__ import annotations

import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certbench.bounds import RELU, crown_ibp_margins, input_box, trace
from certbench.bounds.cascade import Bound
from certbench.bounds.certifiers import BOUNDS, find_certifier
from certbench.bounds.decide import certify
from certbench.bounds.radius import search_radii
from certbench.contract import Certificates, CertifyTask
from certbench.data.dataset import Split
from certbench.errors import RunError, UsageError
from certbench.training import robust_cross_entropy

LEVELS = 16


def task_for(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    radius: str = "1/16",
    cap: str = "1/4",
    levels: int = LEVELS,
) -> CertifyTask:
    return CertifyTask(
        recipe=cast(Any, None),
        settings=None,
        network=network.eval(),
        split=Split(images, labels),
        levels=levels,
        start=0,
        radius=Fraction(radius),
        cap=Fraction(cap),
        device=torch.device("cpu"),
    )


def certificates(name: str, task: CertifyTask) -> Certificates:
    """All certificates of a task in one."""
    return joined(list(find_certifier(name).certify(task)))


def joined(parts: list[Certificates]) -> Certificates:
    columns = ("index", "prediction", "verdict", "radius", "margin", "proved_by", "passes")
    found = {column: np.concatenate([getattr(part, column) for part in parts]) for column in columns}
    return Certificates(**found, guarantee=parts[0].guarantee)


# The digits network of the adaptive-radii oracle -----------------------------------------------------------------------


class Digits:
    def __init__(self, folder: Path) -> None:
        with np.load(folder / "adaptive_radii" / "adaptive_radii.npz", allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.x, self.y = torch.tensor(self.arrays["x"]), torch.tensor(self.arrays["y"])
        self.pixels = (self.x * LEVELS).to(torch.uint8)
        conv1, conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, 2, 1)
        layers = [conv1, conv2, nn.Linear(96, 16), nn.Linear(16, 10)]
        for k, layer in enumerate(layers, 1):
            layer.weight.data = torch.tensor(self.arrays[f"w{k}"])
            layer.bias.data = torch.tensor(self.arrays[f"b{k}"])
        body = nn.Sequential(
            conv1, nn.ReLU(), conv2, nn.ReLU(), nn.Flatten(), layers[2], nn.ReLU(), layers[3]
        )
        self.network = Normalized(body, self.arrays["data_mean"], self.arrays["data_std"]).double().eval()
        self.graph = trace(self.network.requires_grad_(False), (1, 8, 8))

    def task(self, radius: str = "1/16", cap: str | None = None, count: int = 32) -> CertifyTask:
        largest = str(Fraction(float(self.arrays["eps_max"])))
        return task_for(self.network, self.pixels[:count], self.y[:count], radius, cap or largest)


class Normalized(nn.Module):
    def __init__(self, body: nn.Module, mean: np.ndarray, std: np.ndarray) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body((x - self.mean) / self.std)
        return result


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits(Path(__file__).parent / "data")


def test_margins_and_losses_over_a_grid_of_radii_equal_the_oracle(digits: Digits) -> None:
    expected = digits.arrays
    np.testing.assert_allclose(digits.graph.run(digits.x).logits, expected["logits"], rtol=1e-10, atol=1e-12)
    for k, eps in enumerate(expected["eps_grid"]):
        margins = digits.graph.bound(input_box(digits.x, float(eps))).margins(digits.y)
        np.testing.assert_allclose(margins, expected["lower_margin"][k], rtol=1e-10, atol=1e-10)
        np.testing.assert_array_equal(margins.amin(1) > 0, expected["certified"][k])
        losses = [float(robust_cross_entropy(margins[i : i + 1])) for i in range(32)]
        np.testing.assert_allclose(losses, expected["robust_ce"][k], rtol=1e-10)


def test_bounds_entering_every_relu_equal_the_oracle(digits: Digits) -> None:
    box = input_box(digits.x[:4], float(digits.arrays["bounds_eps"]))
    for j, known in enumerate(digits.graph.bound(box, keep={RELU}).kept, 1):
        np.testing.assert_allclose(known.lower, digits.arrays[f"pre_lo_{j}"], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(known.upper, digits.arrays[f"pre_hi_{j}"], rtol=1e-10, atol=1e-12)


def test_radii_equal_the_oracle(digits: Digits) -> None:
    expected, found = digits.arrays, certificates("ibp", digits.task())
    cap = float(expected["eps_max"])
    exact, status = expected["radius_exact"], expected["status"]
    assert (found.radius <= exact + 1e-12).all()
    assert (found.radius >= exact - 2.0**-20 * cap).all()
    assert (found.radius[status == 2] == cap).all()
    assert (found.radius[status == 0] == 0).all()
    assert ((found.verdict == "misclassified") == (status == 0)).all()
    assert (found.radius > 0).mean() == pytest.approx(float(expected["clean_acc"]))
    assert found.radius.mean() == pytest.approx(float(expected["acr"]), abs=2.0**-20 * cap)
    assert ((found.radius >= 1 / 16) == (found.verdict == "certified")).all()
    np.testing.assert_array_equal(found.prediction, expected["logits"].argmax(1))


def test_acr_lies_between_the_sums_of_certified_accuracy_over_a_grid(digits: Digits) -> None:
    """The layer-cake identity, ACR = integral of CA(e) de up to the cap, with CA decided radius by radius."""
    cap = float(digits.arrays["eps_max"])
    acr = certificates("ibp", digits.task()).radius.mean()
    right = digits.graph.run(digits.x).logits.argmax(1) == digits.y
    grid = np.linspace(0, cap, 33)[1:]
    proved = [
        (digits.graph.bound(input_box(digits.x, float(eps))).margins(digits.y).amin(1) > 0) & right
        for eps in grid
    ]
    certified = np.array([float(right.double().mean()), *(float(p.double().mean()) for p in proved)])
    step, tolerance = cap / 32, 2.0**-20 * cap
    assert step * certified[1:].sum() - tolerance <= acr <= step * certified[:-1].sum()
    assert certified[0] > certified[-1], "the bracket is not empty"


def test_every_radius_was_itself_proved(digits: Digits) -> None:
    for name in ("ibp", "crown", "ibp>crown-ibp>alpha-crown"):
        found = certificates(name, digits.task(count=12))
        for i in np.flatnonzero(found.radius > 0):
            bound = BOUNDS[found.proved_by[i].split("radius ")[-1]]
            eps = torch.tensor([found.radius[i]])
            margins = bound.margins(digits.graph, digits.x[i : i + 1], eps, digits.y[i : i + 1])
            assert margins.amin() > 0
        certified = found.verdict == "certified"
        assert (found.margin[certified] > 0).all()
        assert ((found.proved_by == "") == (found.radius == 0)).all()


def test_a_cascade_spends_the_expensive_bound_on_what_is_open(digits: Digits) -> None:
    asked: dict[str, list[int]] = {}

    def counting(bound: Bound) -> Bound:
        def margins(graph: Any, images: Tensor, eps: Tensor, labels: Tensor) -> Tensor:
            asked.setdefault(bound.name, []).append(len(images))
            return bound.margins(graph, images, eps, labels)

        return Bound(bound.name, "", margins, bound.monotone, bound.chunk, bound.tolerance)

    cascade = [counting(BOUNDS[name]) for name in ("ibp", "crown-ibp", "crown")]
    task = digits.task(cap="1/16")
    found = joined(list(certify(cascade, task)))
    alone = {name: certificates(name, task) for name in ("ibp", "crown-ibp", "crown")}
    by = [alone[name].verdict == "certified" for name in alone]
    assert ((found.verdict == "certified") == (by[0] | by[1] | by[2])).all()
    open_after_ibp = (found.verdict != "misclassified") & ~by[0]
    assert asked["ibp"][0] == 32
    assert asked["crown-ibp"][0] == open_after_ibp.sum()
    assert asked["crown"][0] == (open_after_ibp & ~by[1]).sum()
    assert (found.proved_by[by[0]] == "ibp").all()
    assert (found.proved_by[by[1] & ~by[0]] == "crown-ibp").all()
    assert len({name for name in found.proved_by if "radius" not in name} - {""}) >= 2
    best = np.maximum.reduce([alone[name].radius for name in alone])
    assert (found.radius >= np.minimum(best, found.radius.max()) - 2.0**-10 / 16).all()


def test_radii_of_a_cascade_name_the_bound_that_proved_them(digits: Digits) -> None:
    found = certificates("ibp>crown", digits.task(radius="1/64", cap="1/2", count=12))
    ibp = certificates("ibp", digits.task(radius="1/64", cap="1/2", count=12))
    grown = found.radius > ibp.radius
    assert grown.any()
    assert (found.radius >= ibp.radius).all()
    both = grown & (ibp.verdict == "certified")
    assert both.any()
    assert (found.proved_by[both] == "ibp; radius crown").all()
    assert (found.proved_by[~grown] == ibp.proved_by[~grown]).all()
    assert (found.passes >= ibp.passes).all()


def test_a_bound_that_decides_at_the_radius_only_leaves_larger_ones_to_the_others(digits: Digits) -> None:
    task = digits.task(radius="1/16", cap="1/8", count=32)
    full, short, ibp = (certificates(name, task) for name in ("ibp>crown", "ibp>crown@radius", "ibp"))
    decided = (short.verdict == "certified") & (ibp.verdict != "certified")
    assert decided.any(), "crown proves more at the radius"
    assert (short.proved_by[decided] == "crown").all()
    assert (short.radius[decided] == np.float64(1 / 16)).all()
    fine = BOUNDS["ibp"].tolerance / 8  # batches of another shape differ in their last bits
    np.testing.assert_allclose(short.radius[~decided], ibp.radius[~decided], rtol=0, atol=fine)
    assert (short.radius <= full.radius + fine).all()
    assert (short.radius < full.radius).any()
    assert (short.passes < full.passes).any()
    assert find_certifier("ibp>crown@radius").settings != find_certifier("ibp>crown").settings


def test_a_monotone_bound_is_not_asked_beyond_a_radius_where_it_failed(digits: Digits) -> None:
    task = digits.task(radius="1/16", cap="1/2", count=32)
    ibp, cascade = certificates("ibp", task), certificates("ibp>crown@radius", task)
    decided = (cascade.verdict == "certified") & (ibp.verdict != "certified")
    assert decided.any()
    assert (cascade.passes[decided] == 2).all()  # one of each bound, at the radius


def test_certificates_do_not_depend_on_threads(digits: Digits) -> None:
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(certificates("ibp>crown-ibp", digits.task()))
    torch.set_num_threads(threads)
    np.testing.assert_array_equal(found[0].radius, found[1].radius)
    np.testing.assert_array_equal(found[0].margin, found[1].margin)


# Bounds that are not monotone in the radius ----------------------------------------------------------------------------


class OneNeuron(nn.Module):
    """``f_0 - f_1 = relu(x - 0.6) + 0.2``, always positive; its linear bound is negative at 0.45, positive at 0.55."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, 1), nn.Linear(1, 2)
        self.first.weight.data, self.first.bias.data = torch.tensor([[1.0]]), torch.tensor([-0.6])
        self.last.weight.data, self.last.bias.data = torch.tensor([[1.0], [0.0]]), torch.tensor([0.2, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.relu(self.first(x.flatten(1))))
        return result


def test_the_linear_bound_of_one_neuron_is_not_monotone() -> None:
    graph = trace(OneNeuron().double().requires_grad_(False), (1, 1, 1))
    image, label = torch.tensor([[[[0.7]]]], dtype=torch.float64), torch.tensor([0])

    def margin(eps: float) -> float:
        return float(crown_ibp_margins(graph, input_box(image, eps), label))

    assert margin(0.45) == pytest.approx(-0.15)
    assert margin(0.55) == pytest.approx(0.2)


def test_the_downward_scan_finds_what_lies_above_a_failure() -> None:
    pixels, label = torch.full((1, 1, 1, 1), 7, dtype=torch.uint8), torch.tensor([0])
    task = task_for(OneNeuron(), pixels, label, radius="9/20", cap="11/20", levels=10)
    found = certificates("crown-ibp", task)
    assert found.radius[0] == pytest.approx(0.55)
    # the proof on the larger ball covers the recipe's, where the bound itself had failed
    assert found.verdict[0] == "certified"
    assert found.margin[0] == pytest.approx(0.2)


def test_the_scan_brackets_above_the_largest_proved_point() -> None:
    """Proved on [0, 0.3] and [0.6, 0.7] of a cap of 1: the answer is 0.7, which bisection from below would miss."""
    tries: list[float] = []

    def margin(which: Tensor, eps: Tensor) -> Tensor:
        tries.extend(eps.tolist())
        inside = (eps <= 0.3) | ((eps >= 0.6) & (eps <= 0.7))
        return torch.where(inside, 1.0, -1.0).double()

    def search(low: float, monotone: bool) -> float:
        start = torch.tensor([low], dtype=torch.float64)
        unknown = torch.full_like(start, torch.nan)
        found, passes = search_radii(
            margin, low=start, margin_low=unknown, radius=0.1, margin_radius=unknown, cap=1.0,
            tolerance=1e-6, monotone=monotone,
        )  # fmt: skip
        assert int(passes) == len(tries)
        tries.clear()
        assert float(found) == low or float(margin(torch.tensor([0]), found)) > 0
        tries.clear()
        return float(found)

    assert search(0.0, monotone=False) == pytest.approx(0.7, abs=2e-6)
    assert search(0.65, monotone=False) == pytest.approx(0.7, abs=2e-6)
    assert search(0.8, monotone=False) == 0.8, "a radius proved by another bound is kept"


def test_an_interval_search_takes_few_passes(digits: Digits) -> None:
    found = certificates("ibp", digits.task())
    assert found.passes.max() <= 20
    assert found.passes[found.radius > 0].mean() < 12


# Names -----------------------------------------------------------------------------------------------------------------


def test_certifiers_are_found_by_name_and_cascade() -> None:
    found = find_certifier("ibp > crown-ibp>alpha-crown")
    assert found.name == "ibp>crown-ibp>alpha-crown"
    assert found.settings != find_certifier("ibp>crown-ibp").settings
    for name, message in [
        ("ipb", "unknown certifier 'ipb'; did you mean 'ibp'"),
        ("ibp>crwn", "unknown certifier 'crwn' in 'ibp>crwn'; did you mean 'crown'"),
        ("ibp>", "unknown certifier ''"),
        ("ibp>ibp", "names a bound twice"),
        ("ibp>crown@radius>crown", "names a bound twice"),
        ("ibp@radius", "its first bound must search radii"),
        ("ibp>crown@radios", "unknown certifier 'crown@radios' in .*; did you mean 'crown'"),
    ]:
        with pytest.raises(UsageError, match=message):
            find_certifier(name)


# Bad input -------------------------------------------------------------------------------------------------------------


def small(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, changes.get("classes", 3)))


PIXELS = torch.randint(0, LEVELS + 1, (6, 1, 2, 2), generator=torch.Generator().manual_seed(1)).to(
    torch.uint8
)


def labels_of(network: nn.Module) -> Tensor:
    return network(PIXELS / LEVELS).argmax(1)


@pytest.mark.parametrize("name", ["ibp", "ibp>crown"])
def test_one_bad_image_is_an_error_of_its_own(name: str) -> None:
    network = small()
    good = certificates(name, task_for(network, PIXELS, labels_of(network)))
    assert set(good.verdict) <= {"certified", "unknown"}
    pixels, labels = PIXELS.clone(), labels_of(network)
    pixels[1, 0, 0, 0] = LEVELS + 1  # above 1
    labels[2], labels[3] = 3, -1
    found = certificates(name, task_for(network, pixels, labels))
    bad = np.array([1, 2, 3])
    assert (found.verdict[bad] == "error").all()
    assert np.isnan(found.radius[bad]).all()
    assert np.isnan(found.margin[bad]).all()
    assert (found.proved_by[bad] == "").all()
    others = [0, 4, 5]
    np.testing.assert_array_equal(found.verdict[others], good.verdict[others])
    np.testing.assert_allclose(found.radius[others], good.radius[others], rtol=1e-12)


class Overflowing(nn.Module):
    """Finite logits for every image; the bounds of bright images overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.exp((x.flatten(1)[:, :1] - 0.6) * 4000))
        return result


@pytest.mark.parametrize("name", ["ibp", "ibp>crown-ibp"])
def test_bounds_that_overflow_are_an_error_of_that_image(name: str) -> None:
    network = Overflowing()
    network.last.bias.data = torch.tensor([1.0, 0.0])
    pixels = torch.tensor([0, 9], dtype=torch.uint8).view(2, 1, 1, 1)
    labels = network(pixels / LEVELS).argmax(1)
    found = certificates(name, task_for(network, pixels, labels, radius="1/4"))
    assert found.verdict.tolist() == ["certified", "error"]
    assert np.isnan(found.radius[1])


def refuse(
    network: nn.Module, pixels: Tensor, message: str, prepare: Callable[[], object] | None = None
) -> None:
    task = task_for(network, pixels, torch.zeros(len(pixels), dtype=torch.int64))
    if prepare is not None:
        prepare()
    for name in ("ibp", "crown"):
        with pytest.raises(RunError, match=message) as raised:
            certificates(name, task)
        assert "\n" not in str(raised.value)


def test_a_network_that_cannot_be_certified_is_refused() -> None:
    refuse(small(), PIXELS[:0], "no image to certify")
    network = small()
    refuse(network, PIXELS, "training mode .*call eval", prepare=network.train)
    network = small()
    refuse(network, PIXELS, "training mode .2.", prepare=network[2].train)
    for value in (torch.nan, torch.inf):
        network = small()
        network[1].weight.data[0, 0] = value
        refuse(network, PIXELS, "weight 1.weight holds NaN or infinity")
    refuse(small(classes=1), PIXELS, "shape .6, 1. for 6 images; it must return logits")
    refuse(nn.Conv2d(1, 2, 1), PIXELS, r"shape .6, 2, 2, 2. for 6 images; it must return logits")


def test_running_out_of_memory_halves_the_batch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    network = small()
    sizes: list[int] = []

    def bound_of(largest: int, message: str) -> Bound:
        def margins(graph: Any, images: Tensor, eps: Tensor, labels: Tensor) -> Tensor:
            sizes.append(len(images))
            if len(images) > largest:
                raise RuntimeError(message)
            return BOUNDS["ibp"].margins(graph, images, eps, labels)

        return Bound("ibp", "", margins, True, 250, 2.0**-20)

    task = task_for(network, PIXELS, labels_of(network))
    expected = certificates("ibp", task)
    with caplog.at_level(logging.WARNING):
        found = joined(list(certify([bound_of(2, "DefaultCPUAllocator: can't allocate memory")], task)))
    assert max(sizes) == 6
    assert "out of memory on images 0 to 5: going on with batches of 3" in caplog.text
    np.testing.assert_array_equal(found.index, expected.index)
    np.testing.assert_array_equal(found.verdict, expected.verdict)
    np.testing.assert_allclose(found.radius, expected.radius, atol=1e-7)
    found = joined(list(certify([bound_of(0, "CUDA out of memory")], task)))
    assert (found.verdict == "error").all()
    with pytest.raises(RuntimeError, match="something else"):
        list(certify([bound_of(0, "something else")], task))


@pytest.mark.parametrize("cause", ["tie", "constant"])
def test_a_tie_is_never_certified(cause: str) -> None:
    network = small()
    if cause == "tie":
        network[3].weight.data.zero_()
        network[3].bias.data.zero_()
    else:
        network[3].weight.data[1] = network[3].weight.data[0]
        network[3].bias.data[1] = network[3].bias.data[0] = 100.0
    found = certificates("ibp>crown", task_for(network, PIXELS, torch.zeros(6, dtype=torch.int64)))
    assert (found.verdict != "certified").all()
    assert (found.radius == 0).all()
