"""Properties of all bounds over random small networks: no point of the box, sampled or attacked, leaves them.

``CERTBENCH_NIGHTLY=1`` draws more networks and more points: over a million instead of over ten thousand.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.bounds import (
    PRECISIONS,
    Box,
    Graph,
    alpha_crown_margins,
    crown_ibp_margins,
    crown_margins,
    input_box,
    interval,
    sound_input_box,
    trace,
)
from certbench.bounds.backward import BACKWARD, Terms
from certbench.bounds.sound import sound_bounds
from certbench.models.kernels import plain_kernels

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel:UserWarning"
)  # it is meant

NIGHTLY = os.environ.get("CERTBENCH_NIGHTLY") == "1"
NETWORKS = 120 if NIGHTLY else 15
POINTS = 10_000 if NIGHTLY else 1_500
"""Points per network, over all images; a third each sampled inside, sampled at corners, and attacked."""
IMAGES, CLASSES, SIDE = 3, 4, 6
SLACK = 1e-9

settings.register_profile(
    "bounds",
    max_examples=NETWORKS,
    deadline=None,
    derandomize=not NIGHTLY,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
bounds_profile = settings(settings.get_profile("bounds"))

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "steep": lambda: nn.LeakyReLU(1.5),
    "prelu": lambda: nn.PReLU(init=-0.3),
    "elu": lambda: nn.ELU(1.5),
    "celu": lambda: nn.CELU(0.5),
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "logsigmoid": nn.LogSigmoid,
    "tanh": nn.Tanh,
    "softplus": lambda: nn.Softplus(2.0, 1.0),
    "hardtanh": nn.Hardtanh,
    "relu6": nn.ReLU6,
    "hardsigmoid": nn.Hardsigmoid,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
}
LAYERS = [
    "conv",
    "strided",
    "dilated",
    "grouped",
    "same",
    "norm",
    "avgpool",
    "maxpool",
    "residual",
    "concat",
    "affine",
    "pad",
]


class Join(nn.Module):
    """``f(x) + x`` or the concatenation of both."""

    def __init__(self, branch: nn.Module, concatenate: bool) -> None:
        super().__init__()
        self.branch, self.concatenate = branch, concatenate

    def forward(self, x: Tensor) -> Tensor:
        other: Tensor = self.branch(x)
        return torch.cat([x, other], 1) if self.concatenate else other + x


class Affine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.3 - (x - 0.1) * -1.7 / 2


@dataclass(frozen=True)
class Plan:
    """What to build; hypothesis draws it and shrinks it."""

    seed: int
    layers: tuple[str, ...]
    activations: tuple[str, ...]
    eps: float

    def network(self) -> nn.Sequential:
        torch.manual_seed(self.seed)
        modules: list[nn.Module] = []
        channels, side = 2, SIDE
        for layer, activation in zip(self.layers, self.activations, strict=True):
            modules += [_layer(layer, channels, side), ACTIVATIONS[activation]()]
            with torch.no_grad():
                shape = nn.Sequential(*modules).eval()(torch.zeros(1, 2, SIDE, SIDE)).shape
            channels, side = shape[1], shape[2]
        modules += [nn.Flatten(), nn.Linear(channels * side**2, 6), ACTIVATIONS[self.activations[-1]]()]
        network = nn.Sequential(*modules, nn.Linear(6, CLASSES)).double().eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)  # half of the scales are negative
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.3, 2.0)
        return network.requires_grad_(False)


def _layer(kind: str, channels: int, side: int) -> nn.Module:
    if kind in {"avgpool", "maxpool", "strided", "dilated"} and side < 4:
        kind = "conv"
    return {
        "conv": lambda: nn.Conv2d(channels, 4, 3, padding=1),
        "strided": lambda: nn.Conv2d(channels, 4, 3, stride=2, padding=1),
        "dilated": lambda: nn.Conv2d(channels, 4, 2, dilation=2),
        "grouped": lambda: nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels),
        "same": lambda: nn.Conv2d(channels, 3, 2, padding="same"),
        "norm": lambda: nn.BatchNorm2d(channels),
        "avgpool": lambda: nn.AvgPool2d(2, stride=1),
        "maxpool": lambda: nn.MaxPool2d(3, stride=2, padding=1),
        "residual": lambda: Join(nn.Conv2d(channels, channels, 3, padding=1), False),
        "concat": lambda: Join(nn.Conv2d(channels, 1, 3, padding=1), True),
        "affine": Affine,
        "pad": lambda: nn.ConstantPad2d((1, 0, 0, 1), 0.4),
    }[kind]()


def square(seed: int, layers: list[str], activations: list[str], eps: float) -> Plan:
    return Plan(seed, tuple(layers), tuple(activations[: len(layers)]), eps)


plans = st.builds(
    square,
    st.integers(0, 10**6),
    st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3),
    st.lists(st.sampled_from(sorted(ACTIVATIONS)), min_size=3, max_size=3),
    st.sampled_from([0.01, 0.05, 0.2, 1.0]),
)

MARGINS: dict[str, Callable[[Graph, Box, Tensor], Tensor]] = {
    "ibp": lambda graph, box, labels: graph.bound(box).margins(labels),
    "crown-ibp": crown_ibp_margins,
    "crown": crown_margins,
    "alpha-crown": lambda graph, box, labels: alpha_crown_margins(graph, box, labels, steps=4),
}


@dataclass(frozen=True)
class Drawn:
    """A network with images, some pixels at 0 and 1, their labels, and points of the balls around them."""

    graph: Graph
    images: Tensor
    labels: Tensor
    eps: float
    points: Tensor

    @classmethod
    def of(cls, plan: Plan) -> Drawn:
        network = plan.network()
        images = (torch.rand(IMAGES, 2, SIDE, SIDE, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
        labels = torch.randint(CLASSES, (IMAGES,))
        graph = trace(network, (2, SIDE, SIDE))
        box = input_box(images, plan.eps)
        return cls(graph, images, labels, plan.eps, _points(network, box, labels))


def _points(network: nn.Module, box: Box, labels: Tensor) -> Tensor:
    """(points, images, channels, height, width)."""
    count = POINTS // (3 * IMAGES)
    share = torch.rand(2 * count, *box.shape, dtype=torch.float64)
    share[count:] = share[count:].round()
    inside = box.lower + share * (box.upper - box.lower)
    return torch.cat([inside, _attacked(network, box, labels, inside[:count])])


def _attacked(network: nn.Module, box: Box, labels: Tensor, start: Tensor) -> Tensor:
    """Signed gradient steps against one margin per point."""
    points = start.clone()
    target = (labels + torch.randint(1, CLASSES, (len(points), IMAGES))) % CLASSES
    for step in (0.5, 0.25, 0.1):
        points.requires_grad_(True)
        logits = network(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        own = logits.gather(2, labels.expand(len(points), -1)[..., None])
        margin = own - logits.gather(2, target[..., None])
        (gradient,) = torch.autograd.grad(margin.sum(), points)
        points = (points - step * (box.upper - box.lower) * gradient.sign()).detach()
        points = points.maximum(box.lower).minimum(box.upper)
    return points


def true_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(points, images, classes) -> (points, images, classes - 1), wrong classes in ascending order."""
    others = ~F.one_hot(labels, CLASSES).bool()
    own = logits.gather(2, labels.expand(len(logits), -1)[..., None])
    return (own - logits)[:, others].view(len(logits), len(labels), CLASSES - 1)


def check_points_stay_inside(plan: Plan) -> None:
    drawn = Drawn.of(plan)
    box = input_box(drawn.images, drawn.eps)
    logits = drawn.graph.run(drawn.points.flatten(0, 1)).logits.unflatten(0, drawn.points.shape[:2])
    known = drawn.graph.bound(box).logits
    slack = SLACK * (1 + logits.abs().max())
    assert (logits >= known.lower - slack).all()
    assert (logits <= known.upper + slack).all()
    true = true_margins(logits, drawn.labels).amin(0)
    for name, margins in MARGINS.items():
        bound = margins(drawn.graph, box, drawn.labels)
        assert bound.shape == true.shape
        assert (bound <= true + slack).all(), f"{name} is violated by {float((bound - true).max())}"


@bounds_profile
@given(plans)
def test_no_point_of_the_box_leaves_the_bounds(plan: Plan) -> None:
    check_points_stay_inside(plan)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_no_point_leaves_the_bounds_of_any_activation(activation: str) -> None:
    check_points_stay_inside(Plan(5, ("conv",), (activation,), 0.3))


@pytest.mark.parametrize("layer", LAYERS)
def test_no_point_leaves_the_bounds_of_any_layer(layer: str) -> None:
    check_points_stay_inside(Plan(6, ("conv", layer), ("relu", "relu"), 0.1))


@bounds_profile
@given(plans)
@example(Plan(1, ("conv", "maxpool"), ("relu", "gelu"), 0.2))
def test_interval_bounds_are_nested_and_radius_0_gives_the_clean_network(plan: Plan) -> None:
    drawn = Drawn.of(plan)
    clean = drawn.graph.run(drawn.images).logits
    slack = SLACK * (1 + clean.abs().max())
    outer = drawn.graph.bound(input_box(drawn.images, drawn.eps)).logits
    for share in (0.5, 0.1, 0.0):
        inner = drawn.graph.bound(input_box(drawn.images, share * drawn.eps)).logits
        assert (inner.lower >= outer.lower - slack).all()
        assert (inner.upper <= outer.upper + slack).all()
        outer = inner
    torch.testing.assert_close(outer.lower, clean, rtol=0, atol=float(slack))
    torch.testing.assert_close(outer.upper, clean, rtol=0, atol=float(slack))
    true = true_margins(clean[None], drawn.labels)[0]
    for name, margins in MARGINS.items():
        bound = margins(drawn.graph, input_box(drawn.images, 0.0), drawn.labels)
        torch.testing.assert_close(bound, true, rtol=0, atol=1e-8 * (1 + float(clean.abs().max())), msg=name)


# Deployed evaluations ------------------------------------------------------------------------------------------------

EVALUATED = {
    "float32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
SOUND: dict[str, Callable[..., Tensor]] = {
    "ibp": lambda graph, box, labels, precision: sound_bounds(graph, box, precision).margins(labels),
    "crown-ibp": crown_ibp_margins,
    "crown": crown_margins,
    "alpha-crown": partial(alpha_crown_margins, steps=2),
}


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_no_deployed_evaluation_leaves_the_float_sound_bounds(activation: str) -> None:
    """Every activation, and with them in turn every layer; PyTorch's own kernels of each number type."""
    layer = LAYERS[sorted(ACTIVATIONS).index(activation) % len(LAYERS)]
    network = Plan(7, ("conv", layer), (activation, activation), 0.0).network().float()
    images, eps = torch.rand(IMAGES, 2, SIDE, SIDE), 2.0**-7
    labels, wide = torch.randint(CLASSES, (IMAGES,)), images.double()
    points = (images + eps * (2 * torch.rand(100, *images.shape) - 1).sign()).clamp(0, 1)
    points = torch.cat([images[None], points])
    inside = ((points.double() - wide).abs() <= eps).flatten(2).all(2)
    assert inside.float().mean() > 0.3
    true = {}
    with plain_kernels():
        for name, dtype in EVALUATED.items():
            logits = deepcopy(network).to(dtype)(points.to(dtype).flatten(0, 1)).double()
            margins = true_margins(logits.unflatten(0, points.shape[:2]), labels)
            true[name] = margins.masked_fill(~inside[..., None], torch.inf).amin(0)
    graph = trace(network.double(), (2, SIDE, SIDE))
    for name, (kind, bound) in product(EVALUATED, SOUND.items()):
        box = sound_input_box(wide, torch.full((IMAGES,), eps, dtype=torch.float64))
        found = bound(graph, box, labels, precision=PRECISIONS[name])
        assert found.isfinite().all()
        assert (found <= true[name]).all(), (name, kind)


# The properties above must be able to fail ----------------------------------------------------------------------------


def wrong_relu(x: Box) -> Box:
    return Box(lower=torch.relu(x.lower), upper=torch.relu(x.center))


def wrong_convolution(x: Box, weight: Tensor, bias: Tensor, *geometry: object) -> Box:
    return Box(
        center=torch.conv2d(x.center, weight, bias, *geometry),
        radius=torch.conv2d(x.radius, weight, None, *geometry),  # not the absolute values
    )


def wrong_norm(x: Box, *arguments: Tensor) -> Box:
    right = interval.batch_norm(x, *arguments)
    scale = interval.scale_and_shift(*arguments[:4], arguments[6])[0]
    return Box(center=right.center, radius=right.radius * scale.sign().view(-1, 1, 1))


WRONG = {
    "aten.relu.default": wrong_relu,
    "aten.conv2d.default": wrong_convolution,
    "aten.batch_norm.default": wrong_norm,
}


@pytest.mark.parametrize("operation", sorted(WRONG))
def test_a_wrong_interval_rule_is_caught(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong operation stands last among its like, where later slack hides least."""
    last = {"aten.relu.default": ("norm", "conv"), "aten.conv2d.default": ("norm", "conv")}
    plan = (
        Plan(3, last[operation], ("leaky", "relu"), 0.05)
        if operation in last
        else Plan(3, ("conv", "norm"), ("relu", "leaky"), 0.2)
    )
    check_points_stay_inside(plan)
    monkeypatch.setitem(interval.RULES, operation, WRONG[operation])
    with pytest.raises(AssertionError):
        check_points_stay_inside(plan)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "gelu"])
def test_a_wrong_relaxation_is_caught(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = f"aten.{activation}.default"
    right = BACKWARD[operation]

    def wrong(*arguments: object, **options: object) -> Terms:
        terms = right.rule(*arguments, **options)
        assert terms.constant is not None
        return replace(terms, constant=terms.constant + 0.3)

    monkeypatch.setitem(BACKWARD, operation, replace(right, rule=wrong))
    with pytest.raises(AssertionError, match="crown"):
        check_points_stay_inside(Plan(3, ("conv",), (activation,), 0.3))
