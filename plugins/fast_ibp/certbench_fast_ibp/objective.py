"""The objective of Fast IBP, with the symbols of arXiv 2103.17268."""

from __future__ import annotations

from certbench.training import IntervalObjective


class FastIBP(IntervalObjective):
    """``L_rob + lambda (L_tight + L_relu)``, lambda = lambda_0 (1 - eps / eps_max); the clean loss while eps is 0.

    All of it is what the core offers to every method that trains on interval bounds: ``L_rob`` is the cross entropy
    of the worst margins in the ball of radius eps, the regularisers see the bounds that enter the ReLUs.
    """
