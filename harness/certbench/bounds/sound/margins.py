"""Float-sound interval margins: lower bounds of deployed logit differences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from certbench.bounds.graph import Graph
from certbench.bounds.precision import Precision
from certbench.bounds.sound.affine import linear_layer
from certbench.bounds.sound.deployment import Deployment, as_sound, per_image
from certbench.bounds.sound.rounding import SoundBox, down, sound_input_box
from certbench.bounds.specification import difference_rows


@dataclass(frozen=True)
class SoundBounds:
    """What enters the classification layer (or the logits, where there is none), and the layer."""

    run: Deployment
    features: SoundBox
    weight: Tensor | None
    bias: Tensor | None

    def margins(self, labels: Tensor) -> Tensor:
        """Lower bounds of deployed ``z_y - z_j``, j ascending, shape (batch, classes - 1); NaN after overflow."""
        if self.weight is None:
            margins = separate_margins(self.run, self.features, labels)
        else:
            margins = merged_margins(self.run, self.features, self.weight, self.bias, labels)
        return margins.masked_fill(self.run.unsafe[:, None], math.nan)


def sound_margins(
    graph: Graph, images: Tensor, eps: Fraction | Tensor, labels: Tensor, precision: Precision
) -> Tensor:
    """Lower bounds of the computed logit of the label minus any other, shape (batch, classes - 1).

    A positive bound holds for every deployed evaluation at ``precision`` and every input of the ball. Nested balls
    have nested boxes, so the bounds never increase with eps but for the last bits of float64; a radius search needs
    no more, as it returns a radius whose own bound was positive.

    Args:
        graph: a network traced in float64 that holds the deployed weights exactly.
        images: (batch, channels, height, width) in float64, the exact values of the deployed pixels.
        eps: an exact fraction, or one float64 per image, shape (batch,).
        labels: (batch,).

    Raises:
        UsageError: see :func:`sound_input_box` and :func:`sound_bounds`.
    """
    return sound_bounds(graph, sound_input_box(images, eps), precision).margins(labels)


def sound_bounds(graph: Graph, box: SoundBox, precision: Precision) -> SoundBounds:
    """Push a box of raw images through an evaluation-mode network.

    Raises:
        UsageError: an operation has no float-sound rule, or the network computes with its own weights.
    """
    run = Deployment(precision, box.lower)
    bounds = graph.bound(box, rules=run)
    return SoundBounds(run, as_sound(bounds.features), bounds.weight, bounds.bias)


def merged_margins(
    run: Deployment, x: SoundBox, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> Tensor:
    """``(W_y - W_j) c + b_y - b_j - |W_y - W_j| r`` less what both logits may lose at deployment, (batch, classes - 1).

    All losses are one product of ``|W|`` with a multiple of ``|h|`` per class, added for the label and the other.
    """
    p, n, layer = run.precision, weight.shape[1], linear_layer(x, weight, bias)
    relative = p.logit(n, bias is not None)
    magnitude = x.magnitude
    largest = per_image(magnitude)
    layer.guard(run, largest, relative)
    bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
    sizes = F.linear(magnitude, weight.abs(), bias.abs())
    run.guard(per_image(sizes) * (1 + relative) * (1 + 2.0**-20), p.largest)
    lost = (relative + p.own(n + 2)) * sizes + layer.flushed(p, largest, relative) + p.flush
    lost = lost + F.linear((1 + relative) * magnitude.clamp_max(p.flush), weight.abs())
    wrong = ~F.one_hot(labels, len(weight)).bool()
    lost = lost.gather(1, labels[:, None]) + lost[wrong].view(len(labels), -1)
    C = difference_rows(labels, len(weight), weight.dtype)
    W_C = C @ weight  # each entry one rounded difference: the other terms of the sum are zeros
    middle = (W_C @ x.center[:, :, None]).squeeze(-1) + C @ bias
    spread = (W_C.abs() @ x.radius[:, :, None]).squeeze(-1)
    return down(middle - (spread + lost) * p.cover(n + 8))


def separate_margins(run: Deployment, logits: SoundBox, labels: Tensor) -> Tensor:
    """``lower_y - upper_j`` of stored logits: for networks that do not end in a linear layer."""
    logits = run.stored(logits)
    wrong = ~F.one_hot(labels, logits.shape[1]).bool()
    lower = logits.lower.gather(1, labels[:, None])
    return down(lower - logits.upper[wrong].view(len(labels), -1))
