"""The warm-up regularisers of Fast IBP (arXiv 2103.17268, section 3), on the boxes that enter the ReLUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from certbench.bounds.box import Box

TINY = 1e-12


def tightness(input_radius: Tensor, relu_inputs: Sequence[Box], tau: float = 0.5) -> Tensor:
    """``L_tight = 1/m sum_i relu(tau - mean(r_0) / mean(r_i)) / tau``.

    Penalises layers whose intervals are much wider than the input's. ``input_radius`` is r_0, the half-width of the
    clipped input box as the network's first layer sees it (after normalisation).
    """
    r_0 = input_radius.mean()
    terms = [torch.relu(tau - r_0 / box.radius.mean().clamp_min(TINY)) / tau for box in relu_inputs]
    return torch.stack(terms).mean()


def relu_balance(relu_inputs: Sequence[Box], tau: float = 0.5) -> Tensor:
    """``L_relu``: active and inactive ReLUs should balance, in the mean and the variance of their centres.

    As in the reference implementation, a layer without inactive ReLUs is left out of the sum though not of m, and
    one with inactive but no active ReLUs counts as the constant 2.
    """
    terms = torch.stack([_imbalance(box, tau) for box in relu_inputs])
    return torch.where(terms.isfinite(), terms, 0.0).sum() / len(relu_inputs)


def _imbalance(box: Box, tau: float) -> Tensor:
    c = box.center
    active, inactive = (box.lower > 0).to(c.dtype), (box.upper < 0).to(c.dtype)
    spread = (c - c.mean()).square()
    mean_ratio = _ratio((c * active).sum(), -(c * inactive).sum())
    variance_ratio = _ratio((spread * active).sum(), (spread * inactive).sum())
    alpha = torch.minimum(mean_ratio, 1 / mean_ratio.clamp_min(TINY))
    beta = torch.minimum(variance_ratio, 1 / variance_ratio.clamp_min(TINY))
    term = (torch.relu(tau - alpha) + torch.relu(tau - beta)) / tau
    return torch.where(inactive.any(), term, torch.nan)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, with an empty group's 0 in b replaced so that no gradient turns NaN; the caller drops that layer."""
    return a / torch.where(b == 0, torch.ones_like(b), b)
