"""CRT against arrays of its released code, teachers of every kind, and teachers it must refuse."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench_crt.objective import transfer_loss

ARRAYS = np.load(Path(__file__).parent / "data" / "crt.npz", allow_pickle=False)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


def array(name: str) -> Tensor:
    return torch.from_numpy(ARRAYS[name])


def tiny(start: str) -> nn.Module:
    """The tiny network of the arrays with the weights that begin with ``start``."""
    weights = {key.removeprefix(start): array(key) for key in ARRAYS if key.startswith(start)}
    parts: list[tuple[str, nn.Module]] = [("conv", nn.Conv2d(1, 4, 3, padding=1))]
    parts += [("bn", nn.BatchNorm2d(4))] if "bn.weight" in weights else []
    parts += [("relu", nn.ReLU()), ("pool", nn.AvgPool2d(2)), ("flatten", nn.Flatten()), ("fc", nn.Linear(64, 5))]
    network = nn.Sequential(OrderedDict(parts)).double()
    network.load_state_dict(weights, strict=False)
    return network


@pytest.mark.parametrize("case", ["crt_a", "crt_b"])
def test_three_steps_as_the_released_code_takes_them(case: str) -> None:
    a, sigma, _, momentum, weight_decay = array(f"{case}_hp").tolist()
    teacher, student = tiny(f"{case}_teacher_").eval(), tiny(f"{case}_w0_").train()
    optimizer = torch.optim.SGD(student.parameters(), 1.0, momentum, weight_decay=weight_decay)
    for k in range(3):
        optimizer.param_groups[0]["lr"] = float(array(f"{case}_lr")[k])
        x = array(f"{case}_x")[k] + sigma * array(f"{case}_z")[k]
        z_S, z_T = student(x), teacher(x).detach()
        transfer, natural = transfer_loss(z_S, z_T), F.cross_entropy(z_S, array(f"{case}_y")[k])
        loss = a * transfer + (1 - a) * natural
        for name, value in (("logit_loss", transfer), ("cls_loss", natural), ("loss", loss)):
            torch.testing.assert_close(value, array(f"{case}_{name}")[k], **TOLERANCE)
        optimizer.zero_grad()
        loss.backward()
        grad = torch.cat([p.grad.flatten() for p in student.parameters()])
        torch.testing.assert_close(grad, array(f"{case}_grad")[k], **TOLERANCE)
        optimizer.step()
    for key, value in tiny(f"{case}_w1_").state_dict().items():
        if key in {name.removeprefix(f"{case}_w1_") for name in ARRAYS}:
            torch.testing.assert_close(student.state_dict()[key], value, **TOLERANCE)
