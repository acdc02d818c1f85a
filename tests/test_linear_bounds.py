"""Linear bounds against arrays of the reference implementation, and their rules one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certbench.bounds import (
    Box,
    Graph,
    Terms,
    alpha_crown_margins,
    backward_rule,
    crown_ibp_margins,
    crown_margins,
    input_box,
    trace,
)
from certbench.errors import UsageError

MARGINS: dict[str, Callable[..., Tensor]] = {
    "margin_lb_crown_ibp": crown_ibp_margins,
    "margin_lb_crown": crown_margins,
}
CASES = [
    (name, mode) for name in ("seq_cnn", "resnet_small", "at_init_eps1e-6") for mode in ("train", "eval")
]


class OracleNetwork(nn.Module):
    """The network that an oracle file describes node by node."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[str, str, list[str], str]] = []
        self.register_buffer("mean", torch.tensor(arrays["mean"]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(arrays["std"]).view(-1, 1, 1))
        columns = ("names", "inputs", "param", "stride", "padding", "groups")
        for row in zip(*(arrays[f"node_{column}"] for column in columns), strict=True):
            name, inputs, prefix, *geometry = (value.item() for value in row)
            kind = name.partition("_")[2]
            self.steps.append((name, kind, inputs.split(","), f"p{prefix}"))
            if prefix:
                weight = arrays[f"param/{prefix}.weight"]
                self.layers[f"p{prefix}"] = _layer(kind, weight, *geometry)
        self.double()
        for key, values in arrays.items():
            if key.startswith("param/"):
                prefix, _, attribute = key.removeprefix("param/").rpartition(".")
                getattr(self.layers[f"p{prefix}"], attribute).data.copy_(torch.tensor(values))

    def forward(self, images: Tensor) -> Tensor:
        values = {"input": (images - self.mean) / self.std}
        for name, kind, inputs, prefix in self.steps:
            first, *others = (values[i] for i in inputs)
            if kind == "relu":
                values[name] = torch.relu(first)
            elif kind == "add":
                values[name] = first + others[0]
            elif kind == "flatten":
                values[name] = first.flatten(1)
            else:
                values[name] = self.layers[prefix](first)
        return values[name]


class BatchNorm(nn.BatchNorm2d):
    """Batch norm after convolutions and linear layers alike."""

    def _check_input_dim(self, x: Tensor) -> None: ...


def _layer(kind: str, weight: np.ndarray, stride: int, padding: int, groups: int) -> nn.Module:
    if kind == "conv":
        c_out, c_in, side, _ = weight.shape
        return nn.Conv2d(c_in * groups, c_out, side, stride, padding, groups=groups)
    return nn.Linear(weight.shape[1], weight.shape[0]) if kind == "linear" else BatchNorm(len(weight))


class Case:
    """One oracle network in one mode."""

    def __init__(self, folder: Path, name: str, mode: str) -> None:
        with np.load(folder / "fast_ibp" / f"{name}.npz", allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.mode = mode
        self.network = OracleNetwork(self.arrays).train(mode == "train")
        images = torch.tensor(self.arrays["x_raw"])
        self.labels = torch.tensor(self.arrays["y"])
        self.graph = trace(self.network, tuple(images.shape[1:]))
        self.statistics = self.graph.run(images).statistics
        self.eps = float(self.arrays["eps"])
        self.box = input_box(images, self.eps)
        self.images = images

    def margins(self, bound: Callable[..., Tensor], **options: int) -> Tensor:
        return bound(self.graph, self.box, self.labels, self.statistics, **options)


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, oracle_folder: Path) -> Case:
    return Case(oracle_folder, *request.param)


def test_margins_equal_the_oracle(case: Case) -> None:
    for name, bound in MARGINS.items():
        expected = case.arrays[f"{case.mode}/{name}"]
        np.testing.assert_allclose(case.margins(bound).detach(), expected, rtol=1e-9, atol=1e-12)


def test_a_small_memory_changes_the_parts_and_not_the_margins(oracle_folder: Path) -> None:
    case = Case(oracle_folder, "seq_cnn", "eval")
    case.box, case.labels = input_box(case.images[:3], case.eps), case.labels[:3]
    with torch.no_grad():
        for bound in (*MARGINS.values(), alpha_crown_margins):
            whole = case.margins(bound)
            for memory in (1, 400_000):  # one image and one row at a time; a few of each
                torch.testing.assert_close(case.margins(bound, memory=memory), whole, rtol=1e-9, atol=1e-12)


def test_optimised_slopes_never_loosen_and_sometimes_tighten(oracle_folder: Path) -> None:
    gains = []
    for name, mode in CASES[:4]:
        case = Case(oracle_folder, name, mode)
        case.box = input_box(case.images, 2 * case.eps)
        with torch.no_grad():
            crown, alpha = case.margins(crown_margins), case.margins(alpha_crown_margins)
        assert (alpha >= crown).all()
        gains.append(float((alpha - crown).max()))
        differentiable = case.margins(alpha_crown_margins)
        assert differentiable.requires_grad
        torch.testing.assert_close(differentiable.detach(), alpha, rtol=1e-12, atol=1e-13)
    assert max(gains) > 0.01


@pytest.mark.parametrize("bound", [crown_ibp_margins, crown_margins])
def test_gradients_equal_finite_differences(bound: Callable[..., Tensor], oracle_folder: Path) -> None:
    case = Case(oracle_folder, "seq_cnn", "train")
    generator = torch.Generator().manual_seed(0)
    weights = [p for p in case.network.parameters() if p.ndim > 1]
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * 1e-7 for p in weights]

    def value() -> Tensor:
        statistics = case.graph.run(case.images).statistics
        return bound(case.graph, case.box, case.labels, statistics).mean()

    gradients = torch.autograd.grad(value(), weights)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(weights, directions, strict=True):
                p += sign * d
            ends.append(float(value()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-4)


class Pieces(nn.Module):
    """Operations that linear bounds follow exactly, so that without activations nothing is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 2), (2, 1), (0, 1), (1, 2))
        self.norm = nn.BatchNorm2d(4)
        self.line = nn.Conv1d(4, 3, 3, stride=2, padding=1, groups=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x.mean(1, keepdim=True)], 1)[:, 1:]
        x = self.norm(self.conv(nn.functional.pad(x, (1, 2, 0, 1), value=0.3)))
        x = nn.functional.avg_pool2d(x, 2, 1, ceil_mode=True).flatten(2)
        x = 2 - self.line(x).transpose(1, 2).reshape(x.size(0), -1, 3)
        x = nn.functional.adaptive_avg_pool1d(x.permute(0, 2, 1), 4).sum(1).unsqueeze(1).squeeze(1)
        result: Tensor = self.head(-x * 0.5)
        return result


def test_linear_bounds_of_a_linear_network_are_exact() -> None:
    torch.manual_seed(0)
    network = Pieces().double().eval().requires_grad_(False)
    images, labels = torch.rand(2, 3, 7, 6, dtype=torch.float64), torch.tensor([0, 2])
    graph, eps = trace(network, (3, 7, 6)), 0.1
    margins = crown_ibp_margins(graph, input_box(images, eps), labels)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: network(x[None])[0]))(images).flatten(2)
    box = input_box(images, eps)
    for image in range(2):
        wrong = [j for j in range(3) if j != labels[image]]
        rows = jacobian[image, labels[image]] - jacobian[image, wrong]
        middle = network(box.center[image : image + 1])[0]
        exact = middle[labels[image]] - middle[wrong] - rows.abs() @ box.radius[image].flatten()
        torch.testing.assert_close(margins[image], exact, rtol=1e-10, atol=1e-12)


def test_max_pooling_takes_a_sure_winner_exactly() -> None:
    network = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 2)).double()
    network[2].weight.data = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    network[2].bias.data.zero_()
    images = torch.tensor([[[[0.9, 0.2], [0.1, 0.3]]], [[[0.5, 0.45], [0.1, 0.3]]]], dtype=torch.float64)
    graph, labels = trace(network, (1, 2, 2)), torch.tensor([0, 1])
    with torch.no_grad():
        margins = crown_ibp_margins(graph, input_box(images, 0.1), labels)
    # below: twice (winner - eps); above, where both of 0.5 and 0.45 may win: minus twice the largest upper bound
    torch.testing.assert_close(margins[:, 0], torch.tensor([1.6, -1.2], dtype=torch.float64))


class Softmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x.flatten(1), 1)


def test_an_operation_without_a_rule_is_named_with_the_way_to_add_one() -> None:
    graph = trace(Softmax(), (1, 1, 3))
    box, labels = input_box(torch.rand(2, 1, 1, 3), 0.1), torch.tensor([0, 1])
    with pytest.raises(
        UsageError, match="node softmax .aten.softmax.int. of Softmax has no .* rule.*_rule\\(.aten.softmax"
    ):
        crown_ibp_margins(graph, box, labels)
    with pytest.raises(UsageError, match="already has a backward rule"):
        backward_rule("aten.relu.default")(lambda a, x: Terms([(x, a)]))


class OnlyIntervals(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_max_pool2d(x, 1).flatten(1)


def test_an_operation_without_a_backward_rule_points_at_intervals() -> None:
    graph: Graph = trace(OnlyIntervals(), (3, 2, 2))
    box, labels = input_box(torch.rand(2, 3, 2, 2), 0.1), torch.tensor([0, 1])
    assert graph.bound(box).margins(labels).shape == (2, 2)
    with pytest.raises(
        UsageError, match="adaptive_max_pool2d.* has no backward rule.* or use the certifier ibp"
    ):
        crown_ibp_margins(graph, box, labels)


def test_a_box_must_be_one() -> None:
    for images, eps, message in [
        (torch.tensor([[1.1]]), 0.1, "images must lie in"),
        (torch.tensor([[torch.nan]]), 0.1, "images must lie in"),
        (torch.tensor([[0.5]]), -0.1, "a radius must be 0 or above"),
        (torch.tensor([[0.5]]), float("nan"), "a radius must be 0 or above"),
        (torch.tensor([[0.5]]), torch.tensor([torch.nan]), "a radius must be 0 or above"),
        (torch.tensor([[0.5]]), torch.tensor([0.1, 0.2]), "radii of shape"),
    ]:
        with pytest.raises(UsageError, match=message):
            input_box(images, eps)
    assert isinstance(input_box(torch.tensor([[0.5]]), torch.tensor([0.1])), Box)
