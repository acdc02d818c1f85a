"""The map, its exactness, the networks behind it, and what the engines make of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.audit.enclosure import Enclosure, UnsupportedError
from certbench.audit.search import gradient_guide
from certbench.bounds import PRECISIONS, input_box, sound_margins, trace
from certbench.data.catalog import DATASETS
from certbench.errors import UsageError
from certbench.export.onnx import onnx_bytes
from certbench.models import MODELS
from certbench_abstraction.imagenet import IMAGENET
from certbench_abstraction.layer import Abstraction
from certbench_abstraction.network import build_classifier, split

Arrays = dict[str, Tensor]
Load = Callable[[str], Arrays]


def raw(x: Tensor) -> Tensor:
    return (x.double() + 1) / 2


def off_borders(x: Tensor, n: int) -> Tensor:
    """Where the released float32 formula cannot pick the other side of a border, for both ends of each pixel."""
    position = raw(x) * n
    nearest = position.round()
    inside = ((position - nearest).abs() > 1e-5) | (nearest <= 0) | (nearest >= n)
    return inside.repeat(1, 2, *[1] * (x.ndim - 2))


@pytest.mark.parametrize("name", ["gray", "rgb", "flat", "oob"])
def test_the_map_is_the_released_one_off_the_borders(oracle: Load, name: str) -> None:
    arrays = oracle("mapping")
    for i, n in enumerate(arrays["n_list"].int().tolist()):
        x = arrays[f"x_{name}"]
        found = Abstraction(n).double()(raw(x))
        inside = off_borders(x, n)
        wanted = arrays[f"abs_{name}"][i].double()
        torch.testing.assert_close(found[inside], wanted[inside], atol=1e-6, rtol=0)
        if name == "gray":
            torch.testing.assert_close(
                found[inside], arrays["abs_gray_formula64"][i][inside], atol=1e-6, rtol=0
            )


def test_every_8_bit_code_has_its_exact_interval_in_every_precision(oracle: Load) -> None:
    arrays = oracle("mapping")
    codes = torch.arange(256)
    pixels = codes.float() / torch.tensor(255.0)
    for i, n in enumerate(arrays["pix256_n"].int().tolist()):
        assert torch.equal(Abstraction(n).index(pixels).float(), arrays["pix256_idx_exact"][i])
    for n in range(2, 256):
        layer, wanted = Abstraction(n), (codes * n // 255).clamp_max(n - 1)
        assert torch.equal(layer.index(pixels), wanted), n
        assert torch.equal(layer.double().index(pixels.double()), wanted), n


@pytest.mark.parametrize("n", [2, 9, 41, 255])
def test_the_intervals_tile_the_range_with_one_bit_pattern_per_end(n: int) -> None:
    layer = Abstraction(n)
    assert layer.n == n
    assert torch.equal(layer.upper[:-1], layer.lower[1:])
    assert (float(layer.lower[0]), float(layer.upper[-1])) == (-1.0, 1.0)
    assert (layer.upper > layer.lower).all(), "no degenerate white cell"
    assert layer(torch.tensor([[1.0, 0.0]])).tolist() == [[1.0, layer.upper[0], layer.lower[-1], -1.0]]


def test_upper_ends_come_first_channel_by_channel() -> None:
    z = Abstraction(10)(torch.rand(2, 3, 4, 4))
    assert z.shape == (2, 6, 4, 4)
    assert (z[:, :3] > z[:, 3:]).all()


@pytest.mark.parametrize("n", [1, 0, -3])
def test_fewer_than_two_intervals_are_refused(n: int) -> None:
    with pytest.raises(UsageError, match="two intervals or more"):
        Abstraction(n)


def test_more_intervals_than_values_are_refused() -> None:
    with pytest.raises(UsageError, match="have 256 values"):
        build_classifier("dm-small", DATASETS["mnist"], 256, 0)
    assert build_classifier("dm-small", DATASETS["mnist"], 255, 0)[0].n == 255


# Networks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [0, 1])
def test_networks_have_the_published_number_of_parameters(oracle: Load, dataset: int) -> None:
    info = [DATASETS["mnist"], DATASETS["cifar10"]][dataset]
    counts = oracle("arch")["param_counts"]
    names = ["lenet5", "dm-small", "dm-medium", "dm-large", "fc3", "fc5"]
    for row, name in enumerate(names):
        network = build_classifier(name, info, 9, 0)
        found = list(network.parameters())
        _, wanted, tensors = counts[2 * row + dataset].int().tolist()
        assert (sum(p.numel() for p in found), len(found)) == (wanted, tensors), name


@pytest.mark.parametrize(
    ("model", "row"), [("alexnet-96", 12), ("vgg11", 13), ("resnet18-biased", 14), ("resnet34-biased", 15)]
)
def test_imagenet_networks_have_the_published_number_of_parameters(
    oracle: Load, model: str, row: int
) -> None:
    info = replace(DATASETS["mnist"], shape=(6, 224, 224), classes=1000)
    with torch.device("meta"):
        network = IMAGENET[model](info)
    assert sum(p.numel() for p in network.parameters()) == int(oracle("arch")["param_counts"][row, 1])
    split(network)


def test_vgg16_has_the_138_million_parameters_of_the_abstract() -> None:
    with torch.device("meta"):
        network = IMAGENET["vgg16"](replace(DATASETS["mnist"], shape=(6, 224, 224), classes=1000))
    assert 138e6 < sum(p.numel() for p in network.parameters()) < 139e6


def fixture_networks() -> dict[str, nn.Sequential]:
    small = replace(DATASETS["digits"], shape=(6, 4, 4))
    dm_small = MODELS["dm-small"](small)
    dm_small[5], dm_small[7] = nn.Linear(512, 10), nn.Linear(10, 10)
    return {
        "forward_fc3": nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 10)),
        "forward_fc5_tanh": nn.Sequential(
            nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 10)
        ),
        "forward_lenet": MODELS["lenet5"](replace(small, shape=(2, 12, 12))),
        "forward_dmsmall": dm_small,
    }


@pytest.mark.parametrize("name", ["forward_fc3", "forward_fc5_tanh", "forward_lenet", "forward_dmsmall"])
def test_forward_passes_losses_and_gradients_are_the_released_ones(
    oracle: Load, name: str, with_weights: Callable[..., nn.Module]
) -> None:
    arrays = oracle(name)
    network = with_weights(fixture_networks()[name].double(), arrays)
    z = arrays["z"].double().requires_grad_()
    n = int(arrays["n"])
    found, inside = Abstraction(n).double()(raw(arrays["x"])), off_borders(arrays["x"], n)
    torch.testing.assert_close(found[inside], z.detach()[inside], atol=1e-6, rtol=0)
    logits = network(z)
    loss = F.cross_entropy(logits, arrays["y"].long())
    loss.backward()
    close = {"rtol": 1e-7, "atol": 1e-12}
    torch.testing.assert_close(logits, arrays["logits"], **close)
    torch.testing.assert_close(loss.view(1), arrays["loss"], **close)
    torch.testing.assert_close(z.grad, arrays["grad_z"], **close)
    norms = [arrays[key] for key in arrays if key.startswith("g__")]
    for parameter, norm in zip(network.parameters(), norms, strict=True):
        torch.testing.assert_close(parameter.grad.norm().view(1), norm, **close)


def test_networks_whose_first_layer_cannot_be_told_apart_are_refused() -> None:
    for network in (nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), nn.Linear(3, 2)):
        with pytest.raises(UsageError, match="beginning with a convolution"):
            split(network)


# Engines ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier() -> nn.Sequential:
    return build_classifier("dm-small", DATASETS["digits"], 5, 1).eval()


def test_the_cores_bounds_read_the_composed_classifier(classifier: nn.Sequential) -> None:
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 3, 5, 9])
    double = copy.deepcopy(classifier).double()
    graph = trace(double, (1, 8, 8))
    eps = torch.full((4,), 0.1, dtype=torch.float64)
    real = graph.bound(input_box(images.double(), 0.1)).margins(labels)
    sound = sound_margins(graph, images.double(), eps, labels, PRECISIONS["float32"])
    assert (sound <= real + 1e-9).all()
    for _ in range(20):
        inside = (images + 0.2 * torch.rand_like(images) - 0.1).clamp(0, 1)
        logits = double(inside.double())
        margin = logits.gather(1, labels[:, None]) - logits
        margin = margin[~F.one_hot(labels, 10).bool()].view(4, 9)
        assert (real <= margin + 1e-9).all()
    with pytest.raises(UsageError, match="stored in bf16"):
        sound_margins(graph, images.double(), eps, labels, PRECISIONS["bf16"])


def test_the_auditors_own_evaluation_reads_it_too(classifier: nn.Sequential) -> None:
    images = torch.rand(6, 1, 8, 8)
    found = Enclosure(classifier, (1, 8, 8)).logits(images)
    exact = copy.deepcopy(classifier).double()(images.double())
    assert ((found.value - exact).abs() <= found.error + 1e-12).all()
    with pytest.raises(UnsupportedError, match="bucket of a computed value"):
        Enclosure(nn.Sequential(nn.Conv2d(1, 1, 1), classifier), (1, 8, 8))


def test_attacks_follow_the_end_points(classifier: nn.Sequential) -> None:
    images = torch.rand(3, 1, 8, 8)
    x = images.clone().requires_grad_()
    guide = gradient_guide(classifier)
    logits = guide(x)
    assert torch.equal(logits, classifier(images)), "the guide computes what the network computes"
    (slope,) = torch.autograd.grad(logits[:, 0].sum(), x)
    z = classifier[0](images).requires_grad_()
    (by_end,) = torch.autograd.grad(classifier[1](z)[:, 0].sum(), z)
    torch.testing.assert_close(slope, 2 * (by_end[:, :1] + by_end[:, 1:]))
    assert slope.abs().max() > 0
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    assert gradient_guide(plain) is plain


def test_it_exports_to_onnx_with_exact_intervals(classifier: nn.Sequential) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    codes = torch.randint(0, 256, (8, 1, 8, 8)).float() / 255
    assert onnx_bytes(classifier, codes)  # it compares logits; a wrong interval would move them far


def test_the_border_itself_belongs_to_the_upper_interval() -> None:
    layer = Abstraction(3)
    third = layer.borders[0]
    assert Fraction(float(third)) != Fraction(1, 3)
    below = torch.nextafter(third, torch.tensor(0.0))
    assert layer.index(torch.stack([below, third])).tolist() == [0, 1]
