"""The objective of CRT, with the symbols of arXiv 2210.14283."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.contract import TrainTask
from certbench.errors import RunError
from certbench.training import NoisyObjective, Step, fastest_layout


class CRT(NoisyObjective):
    """``a ||z_S - z_T||_2 + (1 - a) CE(z_S, y)`` of student and teacher on the same noisy images, one noise each.

    ``teacher_held`` says whether the teacher's logits could be compared on all images so far.
    """

    def __init__(self, task: TrainTask) -> None:
        super().__init__(task)
        self.teacher = task.teacher
        # on the device, since a look at every step would stall it
        self.teacher_held = torch.ones((), dtype=torch.bool, device=task.device)

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        """
        Raises:
            RunError: the teacher's logits, or their length, are not finite on images of noise alone; of training images
                :attr:`teacher_held` tells.
        """
        super().prepare(network, batches_per_epoch)
        if self.teacher is None:  # the finished student is only loaded
            return
        fastest_layout(self.teacher.network, self.task.device)
        images = torch.rand(16, *self.task.dataset.info.shape, device=self.task.device)
        x = images + self.noises(images, 1, Step(0, 1, batches_per_epoch))[0]
        if not can_be_compared(self.teacher_logits(x)):
            raise self.useless_teacher("noise")

    def useless_teacher(self, images: str) -> RunError:
        name = self.teacher.name if self.teacher else ""
        return RunError(
            f"{self.task.recipe.name}: teacher {name} gives logits on {images} that are NaN, infinite or too large to "
            "compare; train it again"
        )

    @torch.no_grad()
    def teacher_logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.teacher.network(x)
        return logits

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        x = images + self.noises(images, 1, step)[0]
        z_S, z_T = self.network(x), self.teacher_logits(x)
        self.teacher_held &= can_be_compared(z_T)
        transfer = transfer_loss(z_S, z_T, self.settings.space)
        natural = F.cross_entropy(z_S, labels)
        a = self.settings.transfer_weight
        agree = (z_S.argmax(1) == z_T.argmax(1)).float().mean()
        return a * transfer + (1 - a) * natural, {"transfer": transfer.detach(), "agree": agree}


def can_be_compared(logits: Tensor) -> Tensor:
    """Whether all logits of a batch, and the length of each image's, are finite; a tensor of one entry."""
    return torch.linalg.vector_norm(logits, dim=1).isfinite().all()


def transfer_loss(z_S: Tensor, z_T: Tensor, space: str = "logits") -> Tensor:
    """Mean Euclidean distance of the student's and the teacher's outputs, (batch, classes) each; not squared.

    The gradient by an image's logits has length 1 however far they are apart, and is 0 where they are equal.
    """
    if space == "probs":
        z_S, z_T = z_S.softmax(1), z_T.softmax(1)
    return torch.linalg.vector_norm(z_S - z_T, dim=1).mean()
