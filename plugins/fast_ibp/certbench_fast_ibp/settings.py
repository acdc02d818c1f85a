"""The ``[method]`` table of Fast IBP."""

from __future__ import annotations

from certbench.settings import WarmUpSettings


class FastIBPSettings(WarmUpSettings):
    """The defaults are the published ones for MNIST and CIFAR-10 (arXiv 2103.17268 and its released code).

    Its parts are the switches ``batch_norm``, ``initialization``, ``tightness`` and ``relu_balance``.
    """
