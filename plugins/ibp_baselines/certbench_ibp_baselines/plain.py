"""Standard training, and the classifier that always says the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.contract import TrainTask
from certbench.errors import UsageError
from certbench.training import Step


class Standard:
    """``CE(f(x), y)``."""

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        self.network = network

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        return F.cross_entropy(self.network(images), labels), {}


def constant_network(task: TrainTask) -> nn.Module:
    """The recipe's network with a classification layer that ignores its input and names the commonest training class.

    Raises:
        UsageError: the network does not end in a linear layer with a bias.
    """
    network = task.build_network()
    last = [m for m in network.modules() if not list(m.children())][-1]
    if not isinstance(last, nn.Linear) or last.bias is None:
        raise UsageError(
            f"{task.recipe.name}: method constant sets the bias of a last linear layer, and model "
            f"{task.recipe.model!r} does not end in one; choose another model"
        )
    counts = torch.bincount(task.dataset.train.labels, minlength=last.out_features)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(counts == counts.max())
        last.bias[int(counts.argmax())] += 1  # one winner, also among equally common classes
    return network.eval()
