"""Linear bounds with optimised lower lines (alpha-CROWN, arXiv 2011.13824)."""

from __future__ import annotations

import torch
from torch import Tensor

from certbench.bounds.box import Box
from certbench.bounds.graph import Graph, Statistics
from certbench.bounds.linear import MEMORY_CAP, Plan, margin_rows
from certbench.bounds.precision import Precision
from certbench.bounds.tape import Slopes, Tape

STEPS = 20
LEARNING_RATE = 0.1


def alpha_crown_margins(
    graph: Graph,
    box: Box,
    labels: Tensor,
    statistics: Statistics | None = None,
    memory: int = MEMORY_CAP,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    precision: Precision | None = None,
) -> Tensor:
    """As ``crown_margins``, with the slope of every open ReLU's lower line optimised for each image and margin.

    Any slope in [0, 1] is sound, so each step proves a bound, and the best one of each margin is kept: never looser
    than ``crown_margins``. The bounds of inner neurons stay as they are. Images and margins are independent of each
    other: Adam treats every slope by itself. The result is differentiable in the network's parameters at the slopes
    found; the search itself is not.

    Args:
        steps: gradient steps, each a backward pass of the bound and its gradient.
        learning_rate: of Adam, with a slope's range [0, 1] as the unit.
    """
    plan = Plan(graph, box, statistics, memory, precision, kept=True)
    parts = []
    for part, part_labels in plan.parts(box, labels):
        with torch.no_grad():
            tape = plan.refined(part)
        found = [
            _search(tape, graph.result, rows, steps, learning_rate)
            for rows in torch.split(margin_rows(tape, part_labels), plan.rows(len(part_labels)), 1)
        ]
        if torch.is_grad_enabled():
            tape = plan.refined(part)
            rows = margin_rows(tape, part_labels)
            slopes = {name: torch.cat([s[name] for _, s in found], 1) for name in found[0][1]}
            parts.append(tape.proved(tape.lower_bound(graph.result, rows, slopes)))
        else:
            parts.append(tape.proved(torch.cat([margins for margins, _ in found], 1)))
    return torch.cat(parts)


@torch.enable_grad()
def _search(tape: Tape, result: str, rows: Tensor, steps: int, learning_rate: float) -> tuple[Tensor, Slopes]:
    """The best bounds found, shape (batch, rows), and the slopes that prove them."""
    slopes = _adaptive(tape, rows.shape[1])
    margins = tape.lower_bound(result, rows, slopes)
    best, best_slopes = margins.detach(), {name: slope.detach().clone() for name, slope in slopes.items()}
    if not margins.requires_grad:  # no open ReLU on the way: nothing to choose
        return best, best_slopes
    optimizer = torch.optim.Adam(list(slopes.values()), lr=learning_rate)
    for _ in range(steps):
        gradients = torch.autograd.grad(-margins.sum(), list(slopes.values()), allow_unused=True)
        for slope, gradient in zip(slopes.values(), gradients, strict=True):
            slope.grad = gradient
        optimizer.step()
        for slope in slopes.values():
            slope.data.clamp_(0.0, 1.0)
        margins = tape.lower_bound(result, rows, slopes)
        better = margins.detach() > best
        best = torch.where(better, margins.detach(), best)
        for name, slope in slopes.items():
            mask = better.view(*better.shape, *[1] * (slope.ndim - 2))
            best_slopes[name] = torch.where(mask, slope.detach(), best_slopes[name])
    return best, best_slopes


def _adaptive(tape: Tape, rows: int) -> dict[str, Tensor]:
    """The slopes that ``crown_margins`` takes, as leaves, for the operations with open neurons."""
    slopes = {}
    for step in tape.steps:
        if step.rule.slopes and step.rule.needs is not None:
            box = step.arguments[0].box
            if bool(step.rule.needs(box).any()):
                start = (box.upper > -box.lower).to(box.lower.dtype).detach().unsqueeze(1)
                slopes[step.name] = start.repeat(1, rows, *[1] * (start.ndim - 2)).requires_grad_()
    return slopes
