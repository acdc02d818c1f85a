"""Arrays made with the released implementation, and with an independent enumeration; see ``data/README.md``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
Arrays = dict[str, Tensor]


@pytest.fixture
def oracle() -> Callable[[str], Arrays]:
    def load(name: str) -> Arrays:
        with np.load(DATA / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return load


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(20231)


@pytest.fixture
def with_weights() -> Callable[..., nn.Module]:
    return _with_weights


def _with_weights(network: nn.Module, arrays: Arrays, prefix: str = "w__") -> nn.Module:
    """A network with the stored weights of a fixture, in the order in which layers hold them."""
    names = [key for key in arrays if key.startswith(prefix) and not key.endswith("__l2")]
    parameters = list(network.parameters())
    assert len(names) == len(parameters)
    with torch.no_grad():
        for parameter, name in zip(parameters, names, strict=True):
            parameter.data = arrays[name].to(parameter.dtype)
    return network
