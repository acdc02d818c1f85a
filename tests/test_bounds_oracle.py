"""Fast IBP's bounds, losses, regularisers and gradients against arrays of the reference implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certbench.bounds import RELU, Clean, input_box, trace
from certbench.models.registry import Normalize
from certbench.training import SmoothedRamp, relu_balance, robust_cross_entropy, tightness
from certbench.training.schedules import LinearRamp

NETWORKS = ["seq_cnn", "resnet_small", "at_init_eps1e-6"]
MODES = ["train", "eval"]
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


class OracleNetwork(nn.Module):
    """The network that an oracle file describes node by node, with its weights."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[str, str, list[str], str]] = []
        self.normalize = Normalize(tuple(arrays["mean"]), tuple(arrays["std"]))
        for row in zip(
            *(arrays[f"node_{k}"] for k in ("names", "inputs", "param", "stride", "padding", "groups")),
            strict=True,
        ):
            name, inputs, prefix, stride, padding, groups = (v.item() for v in row)
            kind = name.partition("_")[2]
            self.steps.append((name, kind, inputs.split(","), f"p{prefix}"))
            if prefix:
                weight = arrays[f"param/{prefix}.weight"]
                self.layers[f"p{prefix}"] = _layer(kind, weight, stride, padding, groups)
        self.double()
        for key, values in arrays.items():
            if key.startswith("param/"):
                prefix, _, attribute = key.removeprefix("param/").rpartition(".")
                getattr(self.layers[f"p{prefix}"], attribute).data.copy_(torch.tensor(values))
        self.normalize.mean.copy_(torch.tensor(arrays["mean"]).view_as(self.normalize.mean))
        self.normalize.std.copy_(torch.tensor(arrays["std"]).view_as(self.normalize.std))

    def forward(self, images: Tensor) -> Tensor:
        values = {"input": self.normalize(images)}
        for name, kind, inputs, prefix in self.steps:
            x = [values[i] for i in inputs]
            if kind == "relu":
                values[name] = torch.relu(x[0])
            elif kind == "add":
                values[name] = x[0] + x[1]
            elif kind == "flatten":
                values[name] = x[0].flatten(1)
            else:
                values[name] = self.layers[prefix](x[0])
        return values[name]


def _layer(kind: str, weight: np.ndarray, stride: int, padding: int, groups: int) -> nn.Module:
    if kind == "conv":
        shape = weight.shape
        return nn.Conv2d(shape[1] * groups, shape[0], shape[2], stride, padding, groups=groups)
    if kind == "linear":
        return nn.Linear(weight.shape[1], weight.shape[0])
    return _BatchNorm(len(weight))


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm after convolutions and linear layers alike."""

    def _check_input_dim(self, x: Tensor) -> None: ...


class Case:
    """One oracle network in one mode, run and bounded."""

    def __init__(self, folder: Path, name: str, mode: str) -> None:
        with np.load(folder / "fast_ibp" / f"{name}.npz", allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.mode = mode
        self.network = OracleNetwork(self.arrays).train(mode == "train")
        self.images = torch.tensor(self.arrays["x_raw"])
        self.labels = torch.tensor(self.arrays["y"])
        self.eps = float(self.arrays["eps"])
        self.graph = trace(self.network, tuple(self.images.shape[1:]))
        self.clean: Clean = self.graph.run(self.images)
        self.box = input_box(self.images, self.eps)
        self.bounds = self.graph.bound(self.box, self.clean.statistics, keep={RELU})
        self.margins = self.bounds.margins(self.labels)

    def expected(self, name: str) -> np.ndarray:
        return self.arrays[f"{self.mode}/{name}"]

    def regularisers(self) -> tuple[Tensor, Tensor]:
        std = torch.tensor(self.arrays["std"]).view(-1, 1, 1)
        return tightness(self.box.radius / std, self.bounds.kept), relu_balance(self.bounds.kept)


@pytest.fixture(params=[(n, m) for n in NETWORKS for m in MODES], ids="-".join)
def case(request: pytest.FixtureRequest, oracle_folder: Path) -> Case:
    return Case(oracle_folder, *request.param)


def close(actual: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, **CLOSE)


def test_bounds_entering_every_relu_equal_the_oracle(case: Case) -> None:
    names = [str(n) for n in case.arrays["node_names"]]
    inputs = dict(zip(names, map(str, case.arrays["node_inputs"]), strict=True))
    relus = [n for n in names if n.endswith("_relu")]
    assert len(case.bounds.kept) == len(relus)
    for box, relu in zip(case.bounds.kept, relus, strict=True):
        close(box.lower, case.expected(f"lower/{inputs[relu]}"))
        close(box.upper, case.expected(f"upper/{inputs[relu]}"))


def test_margins_and_logit_bounds_equal_the_oracle(case: Case) -> None:
    close(case.margins, case.expected("margin_lb_ibp"))
    close(case.bounds.logits.lower, case.expected("logit_lb_ibp"))
    close(case.bounds.logits.upper, case.expected("logit_ub_ibp"))
    last = str(case.arrays["node_names"][-1])
    close(case.clean.logits, case.expected(f"clean/{last}"))


def test_losses_and_regularisers_equal_the_oracle(case: Case) -> None:
    tight, balance = case.regularisers()
    lam = float(case.arrays["lambda0"]) * (1 - case.eps / float(case.arrays["max_eps"]))
    close(robust_cross_entropy(case.margins), case.expected("robust_ce"))
    close(nn.functional.cross_entropy(case.clean.logits, case.labels), case.expected("ce_clean"))
    close(tight, case.expected("L_tightness"))
    close(balance, case.expected("L_relu"))
    close(lam * (tight + balance), case.expected("reg_weighted"))
    wrong = (case.margins < 0).any(1).double().mean()
    close(wrong, case.expected("err_verified"))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_and_running_statistics_of_a_training_step_equal_the_oracle(
    name: str, oracle_folder: Path
) -> None:
    case = Case(oracle_folder, name, "train")
    tight, balance = case.regularisers()
    lam = float(case.arrays["lambda0"]) * (1 - case.eps / float(case.arrays["max_eps"]))
    (robust_cross_entropy(case.margins) + lam * (tight + balance)).backward()
    scale = float(case.arrays["train/grad_norm"])
    checked = 0
    for key, parameter in case.network.layers.named_parameters():
        assert parameter.grad is not None
        expected = case.arrays[f"train/grad/{key[1:]}"]
        np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-9, atol=1e-11 * scale)
        checked += 1
    for key, buffer in case.network.layers.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            close(buffer, case.arrays[f"train/after/{key[1:]}"])
            checked += 1
    assert checked == sum(k.startswith(("train/grad/", "train/after/")) for k in case.arrays)


def test_smoothed_and_linear_ramps_equal_the_oracle(oracle_folder: Path) -> None:
    ramps = {
        "mnist_0.4_start1_len20_L235": SmoothedRamp(0.4, 1, 20, 235),
        "toy_0.3_start2_len4_L10": SmoothedRamp(0.3, 2, 4, 10),
        "toy_linear_0.3_start2_len4_L10": LinearRamp(0.3, 2, 4, 10),
        "cifar_0.03137_start2_len80_L391": SmoothedRamp(0.03137, 2, 80, 391),
        "tin_0.00392_start2_len20_L782": SmoothedRamp(0.00392, 2, 20, 782),
    }
    with np.load(oracle_folder / "fast_ibp" / "eps_schedule.npz", allow_pickle=False) as arrays:
        assert {key.partition("__")[0] for key in arrays.files} == set(ramps)
        for name, ramp in ramps.items():
            sampled = f"{name}__index" in arrays.files
            index = arrays[f"{name}__index"] if sampled else np.arange(len(arrays[name]))
            expected = arrays[f"{name}__eps"] if sampled else arrays[name]
            np.testing.assert_allclose(
                [ramp(int(k)) for k in index], expected, rtol=1e-12, atol=0, err_msg=name
            )
