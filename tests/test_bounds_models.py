"""Networks of torchvision and timm bounded as they are, and the operations that no random network draws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from certbench.bounds import PRECISIONS, Box, input_box, sound_input_box, trace
from certbench.bounds.interval import RULES
from certbench.bounds.sound import sound_bounds
from certbench.errors import UsageError

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "torchvision googlenet": lambda: torchvision.models.googlenet(
        num_classes=10, aux_logits=False, init_weights=False
    ),
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=10),
    "timm regnetx_002": lambda: timm.create_model("regnetx_002", num_classes=10),
}


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_networks_of_others_are_bounded_without_changes(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().double().eval().requires_grad_(False)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    graph = trace(network, (3, 32, 32))
    clean = network(images)
    slack = 1e-9 * float(clean.abs().max())
    torch.testing.assert_close(graph.run(images).logits, clean)
    # hardly anything could be proved of such random networks, but every operation has its rule
    sound_bounds(graph, sound_input_box(images, torch.zeros(2, dtype=torch.float64)), PRECISIONS["float64"])
    for eps in (1e-5, 1e-7):
        box = graph.bound(input_box(images, eps)).logits
        assert (box.lower < box.upper).all()
        for _ in range(4):
            near = (images + eps * torch.randn_like(images).sign()).clamp(0, 1)
            logits = network(near)
            assert ((logits >= box.lower - slack) & (logits <= box.upper + slack)).all()
    exact = graph.bound(input_box(images, 0.0)).logits
    torch.testing.assert_close(exact.lower, clean, rtol=0, atol=slack)


def test_a_transformer_is_refused_by_node_and_operation() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10).eval()
    graph = trace(network, (3, 32, 32))
    box = input_box(torch.rand(1, 3, 32, 32), 0.01)
    with pytest.raises(
        UsageError, match=r"node \S+ \(aten\.\S+\) of VisionTransformer has no interval rule; add one"
    ):
        graph.bound(box)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda x: x.clamp(-0.2, 0.4),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: x.clamp_max(0.1),
    "abs": torch.abs,
    "exp": torch.exp,
    "rsub": lambda x: 1 - x,
    "neg": lambda x: -x,
    "divided": lambda x: x / -2,
    "scaled sum": lambda x: x.add(x, alpha=-2),
    "amax": lambda x: x.amax((2, 3)),
    "sum": lambda x: x.sum((2, 3)),
    "max_pool1d": lambda x: nn.functional.max_pool1d(x.flatten(2), 2),
    "avg_pool1d": lambda x: nn.functional.avg_pool1d(x.flatten(2), 2),
    "adaptive_max_pool2d": lambda x: nn.functional.adaptive_max_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: nn.functional.adaptive_avg_pool2d(x, (2, 1)),
    "chunk": lambda x: torch.chunk(x, 2, 1)[1],
    "split": lambda x: torch.split(x, [1, 1], 1)[0],
    "select": lambda x: x[:, 0],
    "slice": lambda x: x[:, :, 1::2],
    "unflatten": lambda x: x.unflatten(1, (2, 1)),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1) * 1,
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "transpose": lambda x: x.transpose(1, 3),
    "cat with a constant": lambda x: torch.cat([x, torch.zeros_like(x)], 1),
    "view by size": lambda x: x.view(x.size(0), -1),
    "pad": lambda x: nn.functional.pad(x, (1, 0), value=-3.0),
    "reflect": lambda x: nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"),
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=False),
    "softplus at its switch": lambda x: nn.functional.softplus(x, 1.0, 0.1),
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_the_interval_rule_of_an_operation_holds_its_samples_and_nothing_more(name: str) -> None:
    """Every operation is elementwise, a move or an average: its interval is the hull, which samples come near."""
    torch.manual_seed(0)
    function = FUNCTIONS[name]
    graph = trace(Function(lambda x: function(2 * x - 1)), (2, 4, 4))
    images = torch.rand(3, 2, 4, 4, dtype=torch.float64)
    box = graph.bound(input_box(images, 0.2)).features
    known = input_box(images, 0.2)
    share = torch.rand(400, *images.shape, dtype=torch.float64)
    share[:200] = share[:1]  # all entries move together, and against each other in pairs
    share[:200] = torch.linspace(0, 1, 200, dtype=torch.float64).view(-1, 1, 1, 1, 1)
    points = known.lower + share * (known.upper - known.lower)
    values = torch.stack([function(2 * p - 1) for p in points])
    assert (values >= box.lower - 1e-12).all()
    assert (values <= box.upper + 1e-12).all()
    if name not in {"scaled sum", "softplus at its switch"}:  # the first loses what it shares with itself
        torch.testing.assert_close(values.amin(0), box.lower, rtol=0, atol=0.02)
        torch.testing.assert_close(values.amax(0), box.upper, rtol=0, atol=0.02)


REFUSED = {"exp", "scaled sum"}
"""Operations with an interval rule and no float-sound one."""


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_the_float_sound_rule_of_an_operation_holds_its_interval_and_hardly_more(name: str) -> None:
    torch.manual_seed(1)
    graph = trace(Function(lambda x: FUNCTIONS[name](2 * x - 1)), (2, 4, 4))
    images, eps = torch.rand(3, 2, 4, 4, dtype=torch.float64), torch.full((3,), 0.2, dtype=torch.float64)
    box = sound_input_box(images, eps)
    if name in REFUSED:
        with pytest.raises(UsageError, match="has no float-sound rule"):
            sound_bounds(graph, box, PRECISIONS["float64"])
        return
    found, plain = (
        sound_bounds(graph, box, PRECISIONS["float64"]).features,
        graph.bound(input_box(images, eps)),
    )
    slack = 1.0 if "softplus" in name else 1e-12  # that one steps down by exp(-0.1) somewhere
    for inner, outer in ((plain.features.lower, found.lower), (-plain.features.upper, -found.upper)):
        assert (outer <= inner + 1e-15).all()
        assert (outer >= inner - slack).all()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x * x, "multiplies two values that both depend on the input"),
        (lambda x: 1 / (x + 2), r"reciprocal.* has no interval rule"),
        (lambda x: nn.functional.leaky_relu(x, -0.1), "negative slope"),
        (lambda x: nn.functional.elu(x, -1.0), "negative factor"),
        (lambda x: x / (x + 2), "parameters depend on the input"),
        (lambda x: nn.functional.batch_norm(x, None, None, training=True), "depend on other images"),
    ],
)
def test_what_has_no_sound_rule_is_refused(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trace(Function(function), (2, 4, 4)).bound(input_box(torch.rand(2, 2, 4, 4), 0.1))


def test_every_rule_has_an_operation() -> None:
    for name in RULES:
        if name.startswith("aten."):
            _, family, overload = name.split(".")
            assert hasattr(getattr(torch.ops.aten, family), overload), name
    assert isinstance(Box(lower=torch.zeros(1), upper=torch.ones(1)).center, Tensor)
