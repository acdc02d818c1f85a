"""Interval bounds over traced networks: sound, nested, and honest about what they cannot do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.bounds import Box, Graph, input_box, interval_rule, trace
from certbench.bounds.interval import RULES
from certbench.bounds.radius import Bracket, largest_proved_radius
from certbench.errors import UsageError

CLASSES = 4


class Zoo(nn.Module):
    """A small random network with every kind of layer the rules cover; which ones is drawn from the seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        pick = torch.randint(0, 2, (8,), generator=draw).tolist()
        self.first = nn.Conv2d(2, 4, 3, stride=1 + pick[0], padding=1, groups=1 + pick[1])
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=bool(pick[2]))
        self.pick = pick
        self.hidden = nn.Linear(4 * 4 * 4 * (1 + pick[3]), 6)
        self.last = nn.Linear(6, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * fan_in**-0.5)
            self.norm.running_mean.copy_(torch.randn(4, generator=draw))
            self.norm.running_var.copy_(torch.rand(4, generator=draw) + 0.1)
        self.double().eval()

    def forward(self, images: Tensor) -> Tensor:
        x = (images - 0.3) / torch.tensor([[[0.5]], [[0.25]]], dtype=images.dtype)
        x = self.norm(self.first(x))
        x = F.relu(x, inplace=bool(self.pick[4]))
        branch = torch.tanh(self.second(x)) if self.pick[5] else F.leaky_relu(self.second(x), 0.2)
        x = x + branch if self.pick[6] else x - 0.5 * branch
        pool = F.max_pool2d if self.pick[7] else F.avg_pool2d
        x = pool(x, 2) if x.shape[-1] == 8 else x
        x = torch.cat([x, -x], dim=1) if self.pick[3] else x
        return self.last(torch.sigmoid(self.hidden(x.flatten(1))))


def images_of(seed: int, count: int = 3) -> Tensor:
    return torch.rand(count, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def points_in(box: Box, count: int, seed: int) -> Tensor:
    """Random points and corners of a box, shape (count, batch, ...)."""
    draw = torch.Generator().manual_seed(seed)
    shares = torch.rand(count, *box.shape, dtype=torch.float64, generator=draw)
    shares[: count // 2] = shares[: count // 2].round()
    return box.lower + shares * (box.upper - box.lower)


def attacked_points(graph: Graph, box: Box, labels: Tensor) -> Tensor:
    """Points found by following the sign of the gradient of the label's margin, shape (steps, batch, ...)."""
    x, found = box.center.clone(), []
    for _ in range(5):
        x = x.detach().requires_grad_()
        logits = graph.network(x)
        margin = logits.gather(1, labels[:, None]).sum() * CLASSES - logits.sum()
        (gradient,) = torch.autograd.grad(margin, x)
        x = (x - gradient.sign() * box.radius).maximum(box.lower).minimum(box.upper)
        found.append(x.detach())
    return torch.stack(found)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), eps=st.floats(1e-6, 1.0))
def test_no_point_of_the_box_leaves_the_bounds(seed: int, eps: float) -> None:
    graph = trace(Zoo(seed), (2, 8, 8))
    images, labels = images_of(seed), torch.arange(3)
    box = input_box(images, eps)
    with torch.no_grad():
        bounds = graph.bound(box)
        logits_box, margins = bounds.logits, bounds.margins(labels)
    points = torch.cat([points_in(box, 100, seed), attacked_points(graph, box, labels)])
    with torch.no_grad():
        logits = graph.network(points.flatten(0, 1)).view(len(points), 3, CLASSES)
    slack = 1e-9 * (1 + logits.abs().max())
    assert (logits >= logits_box.lower - slack).all()
    assert (logits <= logits_box.upper + slack).all()
    wrong = ~F.one_hot(labels, CLASSES).bool()
    true = (logits.gather(2, labels.expand(len(points), 3)[..., None]) - logits)[:, wrong].view(
        len(points), 3, -1
    )
    assert (true >= margins - slack).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), eps=st.floats(1e-6, 0.5))
def test_larger_boxes_never_have_larger_margins_and_radius_zero_is_the_clean_network(
    seed: int, eps: float
) -> None:
    graph = trace(Zoo(seed), (2, 8, 8))
    images, labels = images_of(seed), torch.arange(3)
    with torch.no_grad():
        margins = [graph.bound(input_box(images, e)).margins(labels) for e in (0.0, eps, 2 * eps)]
        logits = graph.run(images).logits
    wrong = ~F.one_hot(labels, CLASSES).bool()
    clean = (logits.gather(1, labels[:, None]) - logits)[wrong].view(3, -1)
    torch.testing.assert_close(margins[0], clean, rtol=1e-9, atol=1e-9)
    slack = 1e-9 * (1 + logits.abs().max())
    assert (margins[1] <= margins[0] + slack).all()
    assert (margins[2] <= margins[1] + slack).all()


def test_the_clean_pass_equals_the_module_and_a_wrong_rule_would_be_seen() -> None:
    network = Zoo(1)
    graph = trace(network, (2, 8, 8))
    images = images_of(1)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(images).logits, network(images), rtol=1e-12, atol=1e-12)
        honest = RULES["aten.relu.default"]
        RULES["aten.relu.default"] = lambda x: Box(center=torch.relu(x.center), radius=x.radius * 0.01)
        try:
            bounds = graph.bound(input_box(images, 0.3))
        finally:
            RULES["aten.relu.default"] = honest
        logits = network(points_in(input_box(images, 0.3), 200, 0).flatten(0, 1)).view(200, 3, CLASSES)
    assert not ((logits >= bounds.logits.lower) & (logits <= bounds.logits.upper)).all()


def test_training_mode_batch_norm_equals_the_modules_own_training_forward() -> None:
    one, two = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 2)) for _ in "ab"
    )
    two.load_state_dict(one.state_dict())
    images = images_of(0, 5).float()
    logits = trace(one, (2, 8, 8)).run(images).logits
    torch.testing.assert_close(logits, two(images))
    for name, value in two.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, msg=name)


def test_training_mode_needs_statistics_and_evaluation_mode_does_not() -> None:
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(128, 2))
    graph = trace(network, (2, 8, 8))
    box = input_box(images_of(0).float(), 0.1)
    with pytest.raises(UsageError, match="is in training mode: pass the statistics"):
        graph.bound(box)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    graph.bound(box, graph.run(images_of(1).float()).statistics)
    assert not torch.equal(network.state_dict()["0.running_mean"], before["0.running_mean"])
    network.eval()
    graph.bound(box)


def test_batch_norm_on_one_value_per_channel_is_refused() -> None:
    graph = trace(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(128), nn.Linear(128, 2)), (2, 8, 8))
    with pytest.raises(UsageError, match="more than one value per channel"):
        graph.run(images_of(0, 1).float())


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x.flatten(1))


def test_an_operation_without_a_rule_is_named_and_a_plugin_can_add_one() -> None:
    graph = trace(Sine(), (1, 2, 2))
    box = input_box(torch.full((1, 1, 2, 2), 0.5), 0.25)
    with pytest.raises(
        UsageError, match=r"node sin \(aten.sin.default\) of Sine has no interval rule; add one"
    ):
        graph.bound(box)
    interval_rule("aten.sin.default")(lambda x: x.ends(torch.sin))  # increasing on [0, 1]
    try:
        assert graph.bound(box).logits.upper.max() == torch.sin(torch.tensor(0.75))
        with pytest.raises(UsageError, match="already has an interval rule"):
            interval_rule("aten.sin.default")(lambda x: x)
    finally:
        del RULES["aten.sin.default"]


def test_networks_that_cannot_be_traced_are_refused_in_one_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(UsageError, match="cannot trace Branching") as caught:
        trace(Branching(), (1, 2, 2))
    assert "\n" not in str(caught.value)


def test_the_ball_is_cut_at_the_pixel_range_and_takes_one_radius_per_image() -> None:
    images = torch.tensor([0.05, 0.5, 0.99]).view(3, 1, 1, 1)
    box = input_box(images, torch.tensor([0.1, 0.2, 0.3]))
    assert box.lower.flatten().tolist() == pytest.approx([0.0, 0.3, 0.69])
    assert box.upper.flatten().tolist() == pytest.approx([0.15, 0.7, 1.0])


@settings(max_examples=60, deadline=None)
@given(
    roots=st.lists(st.floats(1e-5, 0.999), min_size=1, max_size=6),
    kinks=st.lists(st.floats(0.01, 50.0), min_size=3, max_size=3),
    flat=st.booleans(),
)
def test_radius_search_returns_proved_radii_next_to_the_root(
    roots: list[float], kinks: list[float], flat: bool
) -> None:
    """Continuous, non-increasing, piecewise linear margins with a known root, and flat stretches if asked."""
    root = torch.tensor(roots, dtype=torch.float64)
    proved: list[tuple[int, float]] = []

    def f(which: Tensor, eps: Tensor) -> Tensor:
        distance = root[which] - eps
        value = torch.where(
            distance > 0, distance * kinks[0] + (distance - 0.1).clamp_min(0) * kinks[1], distance * kinks[2]
        )
        value = value.clamp(-0.01, 0.01) if flat else value
        proved.extend((int(i), float(e)) for i, e, v in zip(which, eps, value, strict=True) if v > 0)
        return value

    everything = torch.arange(len(root))
    zeros, ones = torch.zeros_like(root), torch.ones_like(root)
    bracket = Bracket(zeros, f(everything, zeros), ones, f(everything, ones))
    found, passes = largest_proved_radius(f, bracket, tolerance=1e-6)
    assert (found < root).all()
    assert (found > root - 1.01e-6).all()
    assert all((i, float(r)) in proved for i, r in enumerate(found)), (
        "a radius that was never proved was returned"
    )
    assert passes.max() <= 60


def test_radius_search_takes_few_passes_and_nan_proves_nothing() -> None:
    slope = torch.linspace(0.5, 3, 50, dtype=torch.float64)

    def f(which: Tensor, eps: Tensor) -> Tensor:
        return 1 - slope[which] * eps - (eps - 0.3).clamp_min(0) * 4

    everything = torch.arange(50)
    zeros = torch.zeros(50, dtype=torch.float64)
    bracket = Bracket(zeros, f(everything, zeros), zeros + 1, f(everything, zeros + 1))
    _, passes = largest_proved_radius(f, bracket, tolerance=1e-6)
    assert passes.double().mean() < 9, "bisection would take 20"
    nan = Bracket(zeros, zeros + 1, zeros + 1, zeros - 1)
    found, _ = largest_proved_radius(lambda which, eps: eps * torch.nan, nan, tolerance=1e-3)
    assert (found == 0).all()


def aliasing_networks() -> dict[str, nn.Module]:
    """Networks that write in place into memory seen under another name, each in another way."""

    def write(body: Callable[[Tensor], Tensor]) -> nn.Module:
        class Writes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(body(self.first(x.flatten(1))))

        return Writes()

    def column(h: Tensor) -> Tensor:
        h[:, 0:1].mul_(20.0)
        return h

    def assignment(h: Tensor) -> Tensor:
        h[:, 0] = 0.0
        return h

    def view_read_later(h: Tensor) -> Tensor:
        v = h.view(h.shape[0], 2, 3)
        h.mul_(-1.0)
        return v.reshape(h.shape[0], 6)

    def through_detach(h: Tensor) -> Tensor:
        h.detach().mul_(-1.0)
        return h

    def chunked(h: Tensor) -> Tensor:
        a, b = h.chunk(2, dim=1)
        a.neg_()
        return torch.cat([a, b], dim=1)

    bodies = (column, assignment, view_read_later, through_detach, chunked)
    return {body.__name__: write(body) for body in bodies}


@pytest.mark.parametrize("name", sorted(aliasing_networks()))
def test_writing_into_shared_memory_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"in place|inplace|writes to"):
        trace(aliasing_networks()[name].eval(), (1, 2, 2))


def test_pure_in_place_operations_are_followed() -> None:
    class Ordinary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.view(x.size(0), -1))
            h = F.relu_(h)
            h += 0.5
            h.mul_(-1.0)
            return self.last(h)

    network = Ordinary().eval()
    images = torch.rand(3, 1, 2, 2)
    with torch.no_grad():
        graph = trace(network, (1, 2, 2))
        torch.testing.assert_close(graph.run(images).logits, network(images))
        torch.testing.assert_close(graph.bound(input_box(images, 0.0)).logits.center, network(images))


def test_normalising_by_the_batch_in_evaluation_mode_is_refused() -> None:
    class Batchwise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x.flatten(1), None, None, training=True)

    for network in (Batchwise(), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, track_running_stats=False))):
        with pytest.raises(UsageError, match=r"depend on other images"):
            trace(network.eval(), (1, 2, 2))


def test_operations_that_change_the_number_type_or_the_sign_of_a_mean_are_refused() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3), dtype=torch.float16)

    class Negative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 2, divisor_override=-1).flatten(1)

    box = input_box(torch.rand(2, 3, 2, 2), 0.1)
    for network, reason in ((Half(), "number type"), (Negative(), "negative divisor")):
        with pytest.raises(UsageError, match=reason):
            trace(network, (3, 2, 2)).bound(box)
