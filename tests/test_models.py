"""Architectures and their initialisation, against the published definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from certbench.bounds import trace
from certbench.data.catalog import DATASETS
from certbench.errors import UsageError
from certbench.models import MODELS, build_network
from certbench.training import ibp_initialization
from certbench.training.initialization import _weights_after_sums, ibp_sigma


@pytest.mark.parametrize(
    ("model", "dataset", "parameters"),
    [
        ("cnn7", "cifar10", 17_192_650),
        ("cnn7", "mnist", 13_259_338),
        ("wide-resnet-8", "cifar10", 21_547_882),
        ("wide-resnet-8", "mnist", 17_615_434),
        ("resnext-2x32", "cifar10", 17_611_018),
        ("resnext-2x32", "mnist", 13_677_706),
    ],
)
def test_published_networks_have_the_published_number_of_parameters(
    model: str, dataset: str, parameters: int
) -> None:
    network = build_network(model, DATASETS[dataset], seed=0)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_every_model_maps_raw_pixels_to_logits(model: str, dataset: str) -> None:
    info = DATASETS[dataset]
    network = build_network(model, info, seed=0).eval()
    assert network(torch.rand(3, *info.shape)).shape == (3, info.classes)


def test_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = build_network("cnn-small", DATASETS["digits"], seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before), (
        "building a network must not touch the global generator"
    )
    torch.manual_seed(6)
    same = build_network("cnn-small", DATASETS["digits"], seed=1).state_dict()
    other = build_network("cnn-small", DATASETS["digits"], seed=2).state_dict()
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])


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
