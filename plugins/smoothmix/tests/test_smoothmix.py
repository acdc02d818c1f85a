"""SmoothMix against arrays of its released code, its parts against brute force, and its bad input."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certbench.training import climb, keep_near
from certbench_smoothmix.objective import mixed_loss

ARRAYS = np.load(Path(__file__).parent / "data" / "smoothmix.npz", allow_pickle=False)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


@dataclass(frozen=True)
class Case:
    """One case of the released code's arrays: its settings by name, and its tensors by theirs."""

    name: str

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(ARRAYS[f"smix_{self.name}_{key}"])

    def __getattr__(self, key: str) -> float:
        names = "m T alpha mix_step eta w sigma maxnorm lr momentum weight_decay".split()
        return float(self["hp"][names.index(key)])

    def network(self, prefix: str) -> nn.Module:
        """The README's tiny network with the weights before (``w0_``) or after (``w1_``) the batch."""
        start = f"smix_{self.name}_{prefix}"
        weights = {key.removeprefix(start): torch.from_numpy(ARRAYS[key]) for key in ARRAYS if key.startswith(start)}
        parts: list[tuple[str, nn.Module]] = [("conv", nn.Conv2d(1, 4, 3, padding=1))]
        parts += [("bn", nn.BatchNorm2d(4))] if "bn.weight" in weights else []
        parts += [("relu", nn.ReLU()), ("pool", nn.AvgPool2d(2)), ("flatten", nn.Flatten()), ("fc", nn.Linear(64, 5))]
        network = nn.Sequential(OrderedDict(parts)).double()
        network.load_state_dict(weights, strict=False)
        return network.train()


@pytest.mark.parametrize("name", "abcd")
def test_a_batch_as_the_released_code_takes_it(name: str) -> None:
    case = Case(name)
    network = case.network("w0_")
    optimizer = torch.optim.SGD(network.parameters(), case.lr, case.momentum, weight_decay=case.weight_decay)
    m, size = int(case.m), len(case["y"]) // int(case.m)
    radius = case.maxnorm if case.maxnorm >= 0 else None
    for k in range(m):
        x, y = case["x"][k * size : (k + 1) * size], case["y"][k * size : (k + 1) * size]
        delta, lam = case.sigma * case["z"][k], case["u"][k] / 2
        path = climb(network, x, y, delta, int(case.T), case.alpha, radius)
        s = keep_near(path[int(case.mix_step)], x, case.alpha * case.mix_step * case.w)
        torch.testing.assert_close(s, case["init"][k], **TOLERANCE)
        torch.testing.assert_close(path[-1], case["adv"][k], **TOLERANCE)
        loss, mask = mixed_loss(network, s, path[-1], y, delta, lam, case.eta * case.w)
        assert torch.equal(mask, case["mask"][k])
        torch.testing.assert_close(loss, case["loss"][k], **TOLERANCE)
        optimizer.zero_grad()
        loss.backward()
        grad = torch.cat([p.grad.flatten() for p in network.parameters()])
        torch.testing.assert_close(grad, case["grad"][k], **TOLERANCE)
        optimizer.step()
    for key, value in case.network("w1_").state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(network.state_dict()[key], value, **TOLERANCE)
