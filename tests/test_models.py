"""Architectures and their initialisation, against the published definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from certbench.bounds import input_box, trace
from certbench.bounds.applicability import applicability
from certbench.bounds.certifiers import BOUNDS, find_certifier
from certbench.data.catalog import DATASETS
from certbench.errors import UsageError
from certbench.models import MODELS, build_network
from certbench.models.summary import summarize
from certbench.training import ibp_initialization
from certbench.training.initialization import _weights_after_sums, ibp_sigma


def on_meta(model: str, dataset: str) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_network(model, DATASETS[dataset], seed=0)


@pytest.mark.parametrize(
    ("model", "dataset", "parameters"),
    [
        ("cnn7", "cifar10", 17_192_650),
        ("cnn7", "mnist", 13_259_338),
        ("cnn7", "tinyimagenet", 17_290_120),
        ("wide-resnet-8", "cifar10", 21_547_882),
        ("wide-resnet-8", "mnist", 17_615_434),
        ("wide-resnet-8", "tinyimagenet", 91_424_776),
        ("resnext-2x32", "cifar10", 17_611_018),
        ("resnext-2x32", "mnist", 13_677_706),
        ("resnext-2x32", "tinyimagenet", 16_981_960),
        ("resnet18", "imagenet", 11_689_512),
        ("resnet50", "imagenet", 25_557_032),
        ("alexnet", "imagenet", 61_100_840),
        ("vgg11", "imagenet", 132_863_336),
        ("vgg16", "imagenet", 138_357_544),
        ("timm:vit_tiny_patch16_224", "imagenet", 5_717_416),
    ],
)
def test_published_networks_have_the_published_number_of_parameters(
    model: str, dataset: str, parameters: int
) -> None:
    assert sum(p.numel() for p in on_meta(model, dataset).parameters()) == parameters


@pytest.mark.parametrize(
    ("model", "millions", "million_multiply_adds"),
    [("resnet20", 0.27, 41), ("resnet110", 1.73, 255), ("resnext29", 34.4, None)],
)
def test_published_networks_have_the_size_that_papers_round_to(
    model: str, millions: float, million_multiply_adds: int | None
) -> None:
    summary = summarize(on_meta(model, "cifar10"), (3, 32, 32))
    assert summary.parameters / 1e6 == pytest.approx(millions, abs=0.06)
    assert summary.parameters == sum(layer.parameters for layer in summary.layers)
    assert summary.multiply_adds == sum(layer.multiply_adds for layer in summary.layers)
    if million_multiply_adds:
        assert summary.multiply_adds / 1e6 == pytest.approx(million_multiply_adds, rel=0.01)


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("dataset", ["mnist", "cifar10", "tinyimagenet"])
def test_every_model_maps_raw_pixels_to_logits_or_says_that_it_does_not_fit(model: str, dataset: str) -> None:
    info = DATASETS[dataset]
    if model in {"vgg11", "vgg16"} and dataset == "mnist":
        with pytest.raises(UsageError, match=f"model '{model}' does not fit images of 1x28x28 in 10 classes"):
            on_meta(model, dataset)
        return
    network = on_meta(model, dataset).eval()
    assert network(torch.rand(3, *info.shape, device="meta")).shape == (3, info.classes)


def test_small_images_lose_no_resolution_in_the_stem() -> None:
    for model in ("resnet18", "timm:resnet18", "timm:regnetx_002"):
        layers = summarize(on_meta(model, "cifar10"), (3, 32, 32)).layers
        first = next(layer for layer in layers if layer.kind == "Conv2d")
        assert first.output[1:] == (32, 32)
    published = summarize(on_meta("timm:resnet18", "imagenet"), (3, 224, 224)).layers
    assert next(layer for layer in published if layer.kind == "Conv2d").output[1:] == (112, 112)


TIMM = ("timm:resnet18", "timm:regnetx_002", "timm:vit_tiny_patch16_224", "timm:convnext_atto")


@pytest.mark.parametrize("model", TIMM)
def test_networks_of_timm_train_and_are_bounded_or_refused(model: str) -> None:
    info = DATASETS["cifar10"]
    network = build_network(model, info, seed=0).train()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    images = torch.rand(2, *info.shape)
    torch.nn.functional.cross_entropy(network(images), torch.tensor([1, 7])).backward()
    optimizer.step()
    assert any(not torch.equal(before[name], p) for name, p in network.named_parameters())
    network.eval()
    if model in TIMM[:2]:
        box = trace(network, info.shape).bound(input_box(images, 1 / 255)).logits
        logits = network(images)
        assert ((box.lower <= logits) & (logits <= box.upper)).all()
        return
    found = applicability(network, info.shape)
    assert found.applies == []
    assert "has no interval rule" in found.refusal("ibp", "float_sound")
    with pytest.raises(UsageError, match="has no interval rule"):
        trace(network, info.shape).bound(input_box(images, 1 / 255))


@pytest.mark.parametrize("model", ["timm:no_such_network", "timm:resnet_18"])
def test_unknown_networks_of_timm_are_named(model: str) -> None:
    with pytest.raises(UsageError, match=f"unknown model '{model}'; "):
        build_network(model, DATASETS["cifar10"], seed=0)


def test_a_network_of_timm_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="'timm:vgg11' does not fit images of 1x8x8"):
        on_meta("timm:vgg11", "digits")


@pytest.mark.parametrize("model", ["cnn-small", "resnet20", "timm:regnetx_002"])
def test_first_weights_depend_on_the_seed_alone(model: str) -> None:
    info = DATASETS["cifar10"]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = build_network(model, info, seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before), (
        "building a network must not touch the global generator"
    )
    torch.manual_seed(6)
    same = build_network(model, info, seed=1).state_dict()
    other = build_network(model, info, seed=2).state_dict()
    assert all(torch.equal(one[k], same[k]) for k in one)
    weight = next(name for name in one if name.endswith("weight"))
    assert not torch.equal(one[weight], other[weight])


# What a trace tells


def test_the_structure_is_seen_and_the_weights_are_not() -> None:
    info = DATASETS["cifar10"]
    on_cpu = [applicability(build_network("resnet20", info, seed), info.shape).structure for seed in (0, 1)]
    digests = {
        model: applicability(on_meta(model, "cifar10"), info.shape).structure
        for model in ("timm:resnet18", "resnet18", "resnet20", "resnet32")
    }
    assert set(on_cpu) == {digests["resnet20"]}
    assert digests["resnet18"] == digests["timm:resnet18"], "two libraries, one network"
    assert len(set(digests.values())) == len(digests) - 1


def test_another_operation_with_the_same_weights_is_another_structure() -> None:
    def of(activation: nn.Module, stride: int = 1) -> str:
        network = nn.Sequential(nn.Conv2d(1, 2, 3, stride), activation, nn.Flatten(), nn.LazyLinear(3))
        network(torch.zeros(1, 1, 4, 4))
        return applicability(network, (1, 4, 4)).structure

    assert of(nn.ReLU()) == of(nn.ReLU())
    assert len({of(nn.ReLU()), of(nn.LeakyReLU()), of(nn.LeakyReLU(0.2))}) == 3


def test_bounds_that_lack_a_rule_are_refused_by_node() -> None:
    def peculiar() -> nn.Module:
        return nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(1, 3))

    found = applicability(peculiar(), (1, 2, 2))
    assert "ibp" in found.applies
    assert "crown" not in found.applies
    for certifier in ("ibp", "crown-ibp", "ibp>crown", "crown"):
        find_certifier(certifier)
        try:
            graph = trace(peculiar().double(), (1, 2, 2))
            images, labels = torch.rand(1, 1, 2, 2, dtype=torch.float64), torch.tensor([0])
            for part in certifier.split(">"):
                BOUNDS[part].margins(graph, images, torch.tensor([0.1], dtype=torch.float64), labels)
            works = True
        except UsageError:
            works = False
        assert works == (not found.refusal(certifier, "real_arith")), certifier


def test_the_cost_of_bounds_is_counted_in_clean_passes() -> None:
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4)
    )
    clean = 6 * 10 + 10 * 20 + 20 * 4
    cost = applicability(network, (1, 2, 3)).cost
    assert cost["ibp"] == 2
    assert cost["crown-ibp"] == 2 + 3
    assert cost["crown"] == pytest.approx(2 + 3 + (10 * 60 + 20 * (60 + 200)) / clean)


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'cnn7'"):
        build_network("cnn-7", DATASETS["mnist"], seed=0)


@pytest.mark.parametrize(
    ("prefix", "model", "dataset"),
    [
        ("cnn7_cifar", "cnn7", "cifar10"),
        ("resnext_cifar", "resnext-2x32", "cifar10"),
        ("wide_resnet_8_mnist", "wide-resnet-8", "mnist"),
    ],
)
def test_ibp_initialization_equals_the_oracle(
    prefix: str, model: str, dataset: str, oracle_folder: Path
) -> None:
    with np.load(oracle_folder / "fast_ibp" / "ibp_init.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    rows = [i for i, name in enumerate(arrays["layer"]) if str(name).startswith(f"{prefix}/")]
    network = build_network(model, DATASETS[dataset], seed=0)
    default = {name: p.detach().clone() for name, p in network.named_parameters()}
    graph = trace(network, DATASETS[dataset].shape)
    halved = _weights_after_sums(graph)
    ibp_initialization(graph, seed=3)
    weights = [(name, p) for name, p in network.named_parameters() if p.ndim > 1]
    assert len(weights) == len(rows)
    for (name, weight), row in zip(weights, rows, strict=True):
        shape = [*weight.shape, *[1] * (4 - weight.ndim)]
        assert shape == arrays["shape4"][row].tolist(), name
        assert weight[0].numel() == arrays["fan_in"][row]
        assert (name in halved) == arrays["halved"][row], name
        if np.isnan(arrays["sigma"][row]):
            assert torch.equal(weight, default[name]), "the classification layer keeps PyTorch's default"
            continue
        sigma = ibp_sigma(weight) * (0.5 if name in halved else 1.0)
        assert sigma == pytest.approx(float(arrays["sigma"][row]), rel=1e-12)
        tolerance = 5 * sigma / np.sqrt(2 * weight.numel())
        assert float(weight.detach().std()) == pytest.approx(sigma, abs=tolerance)
        assert float(arrays["empirical_std"][row]) == pytest.approx(sigma, abs=tolerance)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, default[name]), f"{name} must keep PyTorch's default"
