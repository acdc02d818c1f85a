"""The training loop and what methods share: schedules, initialisation, regularisers, losses.

``fit(task, objective)`` owns devices, clipping, learning rate, progress, checkpoints and resume; an objective prepares
the network and gives the loss of a batch.
"""

from certbench.training.attack import projected_gradient
from certbench.training.fit import Objective, Step, fit
from certbench.training.initialization import ibp_initialization
from certbench.training.interval import NATURAL_EPS, Batch, IntervalObjective
from certbench.training.losses import robust_cross_entropies, robust_cross_entropy
from certbench.training.noise import gaussian_noise
from certbench.training.regularizers import relu_balance, tightness
from certbench.training.schedules import LinearRamp, SmoothedRamp
from certbench.training.smoothed import (
    NoisyObjective,
    climb,
    fastest_layout,
    frozen,
    keep_near,
    noisy_logits,
    soft_vote,
    warm_up,
)

__all__ = [
    "NATURAL_EPS",
    "Batch",
    "IntervalObjective",
    "LinearRamp",
    "NoisyObjective",
    "Objective",
    "SmoothedRamp",
    "Step",
    "climb",
    "fastest_layout",
    "fit",
    "frozen",
    "gaussian_noise",
    "ibp_initialization",
    "keep_near",
    "noisy_logits",
    "projected_gradient",
    "relu_balance",
    "robust_cross_entropies",
    "robust_cross_entropy",
    "soft_vote",
    "tightness",
    "warm_up",
]
