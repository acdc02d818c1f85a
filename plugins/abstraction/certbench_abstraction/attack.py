"""The cell attack: pixels have no gradient through the abstraction, but the end points do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from certbench_abstraction.bounds import smallest_margin
from certbench_abstraction.cells import Cells
from certbench_abstraction.layer import Abstraction


def cell_attack(
    network: nn.Sequential,
    start: Tensor,
    cells: Cells,
    labels: Tensor,
    steps: int,
    restarts: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Look for reachable abstract inputs that are misclassified.

    Each step adds up the gradients of the margin by U and by L and moves straddling pixels to the end of their cells
    that lowers it: all of them at first, then a random share that shrinks to a tenth, so that it does not leap between
    two corners for ever. The first start is the image itself, the others are random.

    Args:
        network: ``abstraction`` then f, float32.
        start: the image's own intervals, (batch, C, H, W).

    Returns:
        found, bool (batch,); k (batch, C, H, W), a misclassified input where one was found; passes spent (batch,).
    """
    abstraction, f = network[0], network[1]
    assert isinstance(abstraction, Abstraction)  # what build_classifier puts there
    found = torch.zeros_like(labels, dtype=torch.bool)
    best, passes = start.clone(), torch.zeros_like(labels)
    for restart in range(restarts):
        k = start.clone() if not restart else _anywhere(cells, generator)
        for step in range(steps):
            which = (~found).nonzero().squeeze(1)
            if not len(which):
                return found, best, passes
            margins, slope = _look(f, abstraction, k[which], labels[which])
            passes[which] += 1
            hit = which[~(margins > 0)]
            found[hit], best[hit] = True, k[hit]
            share = max(0.1, 1 - step / max(1, steps - 1))
            moved = torch.rand(k[which].shape, generator=generator).to(k.device) < share
            end = torch.where(slope > 0, cells.lo[which], cells.hi[which])
            k[which] = torch.where(moved & (slope != 0), end, k[which])
    return found, best, passes


def _look(f: nn.Module, abstraction: Abstraction, k: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Margins at intervals k, and their slope in each pixel."""
    with torch.enable_grad():
        z = abstraction.encode(k).requires_grad_()
        margins = smallest_margin(f(z), labels)
        upper, lower = torch.autograd.grad(margins.sum(), z)[0].chunk(2, 1)
    return margins.detach(), upper + lower


def _anywhere(cells: Cells, generator: torch.Generator) -> Tensor:
    share = torch.rand(cells.lo.shape, generator=generator, dtype=torch.float64).to(cells.lo.device)
    return cells.lo + (share * (cells.hi - cells.lo + 1)).floor().long()
