"""Fast IBP: certified training with short warm-up (Shi et al., NeurIPS 2021, arXiv 2103.17268).

Smallest real run: ``certbench run fast-ibp/digits-linf-0.1``.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from certbench.contract import MethodCard, TrainTask
from certbench.hookspecs import hookimpl
from certbench_fast_ibp.settings import FastIBPSettings

if TYPE_CHECKING:
    from torch import nn


@hookimpl
def register_methods() -> list[MethodCard]:
    folder = files("certbench_fast_ibp")
    return [
        MethodCard(
            name="fast-ibp",
            summary="IBP training with IBP initialisation, full batch norm and warm-up regularisers",
            paper="Shi, Wang, Zhang, Yi, Hsieh: Fast Certified Robust Training with Short Warmup, arXiv 2103.17268",
            norm="linf",
            guarantee="float_sound",
            settings=FastIBPSettings,
            recipes=folder / "recipes",
            suites=folder / "suites",
            published=folder / "published",
            certifier="ibp",
            limits="Trained for interval bounds: other certifiers gain little on its networks.",
        )
    ]


@hookimpl
def train(task: TrainTask) -> nn.Module:
    from certbench.training import fit
    from certbench_fast_ibp.objective import FastIBP

    return fit(task, FastIBP(task))
