"""Networks whose gradient is zero almost everywhere: attacks follow a stand-in, and only the network decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from certbench.audit.ball import ball
from certbench.audit.enclosure import Enclosure, UnsupportedError
from certbench.audit.judges import DeployedJudge
from certbench.audit.registry import find_attack
from certbench.audit.search import Found, gradient_guide, hunt
from certbench.errors import RunError


class Steps(nn.Module):
    """Pixels rounded down to multiples of a quarter, by a table."""

    borders: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("borders", torch.tensor([0.25, 0.5, 0.75]))
        self.register_buffer("table", torch.tensor([0.0, 0.25, 0.5, 0.75]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.take(self.table, torch.bucketize(x, self.borders, right=True))


class Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: nn.Module) -> Tensor:
        rounded: Tensor = steps(x)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0], None


class StandIn(nn.Module):
    def __init__(self, steps: nn.Module) -> None:
        super().__init__()
        self.steps = [steps]

    def forward(self, x: Tensor) -> Tensor:
        passed: Tensor = Passing.apply(x, self.steps[0])  # type: ignore[no-untyped-call]
        return passed


class Guided(Steps):
    def gradient_surrogate(self) -> nn.Module:
        return StandIn(self)


class Lying(Steps):
    def gradient_surrogate(self) -> nn.Module:
        return Backwards()


class Backwards(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 100 * (1 - x)


def classifier(first: nn.Module) -> nn.Sequential:
    """Class 1 wins once the sum of 16 rounded pixels passes 6."""
    linear = nn.Linear(16, 2)
    with torch.no_grad():
        linear.weight[0], linear.weight[1] = 0.0, 1.0
        linear.bias.copy_(torch.tensor([0.0, -6.0]))
    return nn.Sequential(first, nn.Flatten(), linear).eval()


def attacked(first: nn.Module, radius: float) -> Any:
    """Only corners of the ball flip; random starts do not come near them."""
    network = classifier(first)
    images = torch.full((4, 1, 4, 4), 0.3)
    balls = ball(images, torch.full((4,), radius, dtype=torch.float64))
    labels = torch.zeros(4, dtype=torch.int64)
    draw = torch.Generator().manual_seed(0)
    return hunt(
        network,
        balls,
        labels,
        find_attack("standard"),
        DeployedJudge(network),
        lambda *_: torch.rand(images.shape, generator=draw),
    ), network


def test_a_stand_in_leads_attacks_to_what_plain_gradients_miss() -> None:
    with pytest.raises(RunError, match="attacks on it are blind"):  # never a robustness that is not there
        attacked(Steps(), 0.21)
    guided, network = attacked(Guided(), 0.21)
    assert (guided.found == Found.WITNESS).all()
    assert (network(guided.witness).argmax(1) == 1).all(), "the network itself is fooled"


def test_a_stand_in_that_lies_finds_nothing_that_is_not_there() -> None:
    state, network = attacked(Lying(), 0.1)
    assert (network(state.witness).argmax(1) == 0).all()
    assert (state.found == Found.NOTHING).all()


def test_the_guide_is_a_copy_wherever_the_module_stands() -> None:
    network = classifier(Guided())
    guide = gradient_guide(nn.Sequential(network, nn.Identity()))
    assert isinstance(guide.get_submodule("0.0"), StandIn)
    assert isinstance(network[0], Guided), "what is attacked stays what it is"
    assert isinstance(gradient_guide(Guided()), StandIn)


def test_real_logits_of_stepped_pixels_are_exact_and_computed_values_are_refused() -> None:
    network = classifier(Steps())
    images = torch.tensor([0.25, 0.2499999]).view(2, 1, 1, 1).expand(2, 1, 4, 4).contiguous()
    found = Enclosure(network, (1, 4, 4)).logits(images)
    assert found.value[:, 1].tolist() == [-2.0, -6.0]
    with pytest.raises(UnsupportedError, match="bucket of a computed value"):
        Enclosure(nn.Sequential(nn.Conv2d(1, 1, 1), Steps(), nn.Flatten(), nn.Linear(16, 2)), (1, 4, 4))
