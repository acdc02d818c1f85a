"""Activations as PyTorch computes them against 40 decimal digits: what both the bounds and the audit count on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import Tensor, nn

from certbench.audit import activations
from certbench.audit.bounded import Bounded
from certbench.audit.enclosure import MODULES
from certbench.bounds import PRECISIONS, SoundBox
from certbench.bounds.sound import Deployment
from certbench.bounds.sound.deployment import SOUND_RULES

mpmath.mp.dps = 40


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    return x if x * beta > threshold else mpmath.log1p(mpmath.exp(beta * x)) / beta


def elu(x: Any, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0) -> Any:
    return scale * (x if x > 0 else mpf(alpha) * mpmath.expm1(x * inner))


def gelu(x: Any) -> Any:
    return x / 2 * (1 + mpmath.erf(x / mpmath.sqrt(2)))


def gelu_tanh(x: Any) -> Any:
    return x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpf("0.044715") * x**3)))


def six(x: Any) -> Any:
    return min(max(x + 3, mpf(0)), mpf(6)) / 6


FUNCTIONS: dict[str, tuple[nn.Module, Callable[[Any], Any], str, tuple[Any, ...]]] = {
    "sigmoid": (nn.Sigmoid(), sigmoid, "sigmoid", ()),
    "log_sigmoid": (nn.LogSigmoid(), lambda x: -softplus(-x, threshold=math.inf), "log_sigmoid", ()),
    "tanh": (nn.Tanh(), mpmath.tanh, "tanh", ()),
    "softplus": (nn.Softplus(2.0, 3.0), lambda x: softplus(x, 2.0, 3.0), "softplus", (2.0, 3.0)),
    "elu": (nn.ELU(1.5), lambda x: elu(x, 1.5), "elu", (1.5,)),
    "celu": (nn.CELU(0.5), lambda x: elu(x, 0.5, 1.0, 2.0), "celu", (0.5,)),
    "selu": (nn.SELU(), lambda x: elu(x, 1.6732632423543772, 1.0507009873554805), "selu", ()),
    "silu": (nn.SiLU(), lambda x: x * sigmoid(x), "silu", ()),
    "mish": (nn.Mish(), lambda x: x * mpmath.tanh(softplus(x, threshold=math.inf)), "mish", ()),
    "gelu": (nn.GELU(), gelu, "gelu", ()),
    "gelu-tanh": (nn.GELU("tanh"), gelu_tanh, "gelu", ("tanh",)),
    "hardsigmoid": (nn.Hardsigmoid(), six, "hardsigmoid", ()),
    "hardswish": (nn.Hardswish(), lambda x: x * six(x), "hardswish", ()),
    "leaky": (nn.LeakyReLU(0.3), lambda x: max(x, mpf(0)) + mpf(0.3) * min(x, mpf(0)), "leaky_relu", (0.3,)),
    "relu6": (nn.ReLU6(), lambda x: min(max(x, mpf(0)), mpf(6)), "relu6", ()),
    "hardtanh": (nn.Hardtanh(-0.3, 0.7), lambda x: min(max(x, mpf(-0.3)), mpf(0.7)), "hardtanh", (-0.3, 0.7)),
}
GRID = torch.cat(
    [torch.linspace(-800, 800, 41), torch.linspace(-40, 40, 301), torch.linspace(-3, 3, 301)]
).double()
GRID = torch.cat(
    [GRID, 10 ** torch.linspace(-20, -1, 40).double(), -(10 ** torch.linspace(-20, -1, 40).double())]
)


def outside(values: list[Any], lower: Tensor, upper: Tensor) -> int:
    ends = zip(values, lower.flatten().tolist(), upper.flatten().tolist(), strict=True)
    return sum(not mpf(low) <= value <= mpf(high) for value, low, high in ends)


def beyond(exact: list[Any], found: Bounded) -> int:
    triples = zip(exact, found.value.tolist(), found.error.tolist(), strict=True)
    return sum(abs(x - mpf(value)) > mpf(error) for x, value, error in triples)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_the_error_of_an_audit_holds_and_is_small(name: str) -> None:
    """Half of the points are off themselves, by an error that they state."""
    module, reference, *_ = FUNCTIONS[name]
    for off in (0.0, 1e-9):
        found = MODULES[type(module)](module, Bounded(GRID.clone(), torch.full_like(GRID, off)))
        exact = [reference(mpf(x) + off) for x in GRID.tolist()]
        assert beyond(exact, found) == 0
        small = 1e-14 * (1 + GRID.abs()) + 1.8 * off
        assert (found.error <= small + (0.05 if name == "softplus" else 0.0)).all()


def test_an_error_rule_without_its_units_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "UNIT", 0.0)
    for name in ("gelu", "tanh", "elu", "softplus"):
        module, reference, *_ = FUNCTIONS[name]
        found = MODULES[type(module)](module, Bounded(GRID.clone(), torch.zeros_like(GRID)))
        exact = [reference(mpf(x)) for x in GRID.tolist()]
        assert beyond(exact, found) > 0, name


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_the_float_sound_box_holds_the_function_itself(name: str) -> None:
    """With an exact deployment only the round-off of float64 is left to cover."""
    _, reference, operation, options = FUNCTIONS[name]
    run = Deployment(replace(PRECISIONS["float64"], accumulator=0.0), GRID[None])
    box = SOUND_RULES[f"aten.{operation}.default"](
        run, SoundBox(lower=GRID[None], upper=GRID[None]), *options
    )
    assert outside([reference(mpf(x)) for x in GRID.tolist()], box.lower, box.upper) == 0


def test_softplus_may_step_only_where_its_input_may_pass_the_switch() -> None:
    module = nn.Softplus(2.0, 3.0)
    found = MODULES[nn.Softplus](
        module, Bounded(torch.tensor([1.4, 1.5, 1.6]).double(), torch.full((3,), 1e-9).double())
    )
    assert found.error[1] > 0.02 and found.error[[0, 2]].max() < 1e-8


class Mixed(nn.Module):
    """Activations as functions and methods, one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.prelu, self.last = nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.first(x.flatten(1)), approximate="tanh")
        x = nn.functional.leaky_relu(x, 0.1, inplace=True).sigmoid().tanh() - 0.3
        x = torch.clamp(self.prelu(x), -0.2, max=0.9) + nn.functional.elu(x, alpha=0.5)
        result: Tensor = self.last(nn.functional.softplus(x, beta=2).abs())
        return result


def test_functions_and_methods_have_the_rules_of_their_modules() -> None:
    from certbench.audit.enclosure import Enclosure

    network, images = Mixed().eval(), torch.rand(5, 1, 2, 2)
    found = Enclosure(network, (1, 2, 2)).logits(images)
    with torch.no_grad():
        expected = network.double()(images.double())
    assert (found.value - expected).abs().max() <= 2 * found.error.max() < 1e-13
