"""What objectives of smoothed classifiers share: the soft smoothed classifier and the attack on it.

One draw of m noises has the shape (m, batch, channels, height, width): every image has m noises of its own. Its noisy
images run through the network in one pass, m * batch of them, the first noise of all images first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from certbench.contract import TrainTask
from certbench.data.dataset import Split
from certbench.errors import DataError
from certbench.training.fit import Step
from certbench.training.noise import gaussian_noise


class NoisyObjective:
    """Base of objectives that train on Gaussian noise of standard deviation ``sigma``, in raw pixel units.

    Where this class changes numbers, every method on it raises its own ``numerics``.
    """

    network: nn.Module

    def __init__(self, task: TrainTask) -> None:
        self.task = task
        self.settings = task.settings
        self.sigma = task.recipe.sigma

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        """Keep the network; on a CPU, lay it out channels-last, in which noisy images take two thirds of the time.

        Raises:
            DataError: a training image leaves [0, 1], where attacks and radii live.
        """
        train, info = self.task.dataset.train, self.task.dataset.info
        if isinstance(train, Split) and (most := int(train.images.max())) > info.levels:
            raise DataError(
                f"training images of {info.name} leave [0, 1]: one holds {most}, and 1 is {info.levels}"
            )
        self.network = fastest_layout(network, self.task.device)

    def noises(self, images: Tensor, count: int, step: Step) -> Tensor:
        """The step's draw of ``count`` noises for every image, shape (count, *images.shape)."""
        return gaussian_noise(images, self.sigma, self.task.seed, step, count)


def fastest_layout(network: nn.Module, device: torch.device) -> nn.Module:
    """``network`` with its weights channels-last on a CPU, where that is faster in float32; as it is elsewhere."""
    if device.type != "cpu":
        return network
    return network.to(memory_format=torch.channels_last)


def noisy_logits(network: nn.Module, images: Tensor, noises: Tensor) -> Tensor:
    """Logits of every image under each of its noises, in one pass; shape (m, batch, classes).

    ``images`` may have a batch of their own for each noise, shape (m, batch, channels, height, width).
    """
    logits: Tensor = network((images + noises).flatten(0, 1))
    return logits.reshape(*noises.shape[:2], -1)


def soft_vote(logits: Tensor) -> Tensor:
    """The soft smoothed classifier: the average over noises of the softmaxes, (m, batch, K) to (batch, K)."""
    return logits.softmax(-1).mean(0)


def climb(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    noises: Tensor,
    iterations: int,
    length: float,
    radius: float | None = None,
) -> list[Tensor]:
    """Walk uphill on ``-log Fbar(x)[label]`` of the soft smoothed classifier Fbar, in steps of one L2 length.

    The log is of the average softmax and the gradient flows through all noises. After each step an image is brought
    back into the L2 ball of ``radius`` around its start, where one is given, and then into [0, 1]. The network is in
    evaluation mode meanwhile: its batch norms do not see the attack.

    Returns:
        The points in order, ``iterations`` + 1 tensors of the images' shape, the images themselves first.
    """
    path = [images]
    with frozen(network):
        for _ in range(iterations):
            x = path[-1].detach().requires_grad_()
            hit = soft_vote(noisy_logits(network, x, noises)).gather(1, labels[:, None])
            (slope,) = torch.autograd.grad(-hit.clamp_min(1e-20).log().sum(), x)
            norm = slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            x = x.detach() + length * slope / (norm + 1e-8)
            path.append(keep_near(x, images, radius))
    return path


def keep_near(x: Tensor, images: Tensor, radius: float | None) -> Tensor:
    """``x`` within L2 distance ``radius`` of ``images`` where it is given, then within [0, 1], which lies no farther."""
    if radius is not None:
        x = images + (x - images).renorm(2, 0, radius)
    return x.clamp(0, 1)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode and without gradients of its parameters; both are put back at the end."""
    training, learned = network.training, [p for p in network.parameters() if p.requires_grad]
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        network.train(training)
        for parameter in learned:
            parameter.requires_grad_()


def warm_up(epoch: int, epochs: int) -> float:
    """A factor that rises linearly to 1 at epoch ``epochs``, counted from 1; 1 throughout where ``epochs`` is 0."""
    return min(1.0, epoch / epochs) if epochs else 1.0
