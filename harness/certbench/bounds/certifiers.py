"""The core's deterministic certifiers by name, and cascades of them: ``ibp>crown-ibp>crown``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from certbench.bounds.alpha import LEARNING_RATE, STEPS, alpha_crown_margins
from certbench.bounds.box import input_box
from certbench.bounds.cascade import Bound, Margins
from certbench.bounds.decide import certify
from certbench.bounds.graph import Graph
from certbench.bounds.linear import crown_ibp_margins, crown_margins
from certbench.bounds.precision import Precision, find_precision
from certbench.bounds.radius import GRID
from certbench.bounds.sound import sound_input_box, sound_margins
from certbench.contract import Certifier
from certbench.errors import UsageError, nearest
from certbench.models.kernels import SWITCHES
from certbench.recipe import RADIUS_TOLERANCE, VERDICT_ONLY, cascade_parts


def _interval(
    graph: Graph, images: Tensor, eps: Tensor, labels: Tensor, precision: Precision | None = None
) -> Tensor:
    if precision is not None:
        return sound_margins(graph, images, eps, labels, precision)
    return graph.bound(input_box(images, eps)).margins(labels)


def _linear(margins: Callable[..., Tensor]) -> Margins:
    def bound(
        graph: Graph, images: Tensor, eps: Tensor, labels: Tensor, precision: Precision | None = None
    ) -> Tensor:
        box = input_box(images, eps) if precision is None else sound_input_box(images, eps)
        found: Tensor = margins(graph, box, labels, precision=precision)
        return found

    return bound


FINE, COARSE = RADIUS_TOLERANCE["ibp"], RADIUS_TOLERANCE["crown"]
BOUNDS = {
    bound.name: bound
    for bound in (
        Bound("ibp", "interval bounds, classification layer merged", _interval, True, 250, FINE),
        Bound(
            "crown-ibp", "linear bounds over interval bounds", _linear(crown_ibp_margins), False, 50, COARSE
        ),
        Bound("crown", "linear bounds over linear bounds", _linear(crown_margins), False, 50, COARSE),
        Bound(
            name="alpha-crown",
            summary="linear bounds with optimised lower slopes",
            margins=_linear(alpha_crown_margins),
            monotone=False,
            chunk=50,
            tolerance=COARSE,
            settings={"steps": STEPS, "learning_rate": LEARNING_RATE},
        ),
    )
}


def _certifier(bounds: Sequence[Bound]) -> Certifier:
    name = ">".join(bound.part for bound in bounds)
    settings = {
        "certifier": name,
        "precision": "float64",
        "chunk": min(bound.chunk for bound in bounds),
        "grid": GRID,
        "bounds": [bound.describe() for bound in bounds],
    }
    return Certifier(name, ", then ".join(b.summary for b in bounds), partial(certify, bounds), settings)


CERTIFIERS = {name: _certifier([bound]) for name, bound in BOUNDS.items()}
"""Every bound by itself, as it speaks of real arithmetic; for listings."""


def find_certifier(name: str, guarantee: str | None = None, deploy: str = "float32") -> Certifier:
    """The certifier of one bound, or of a cascade written ``cheap>expensive``.

    In ``ibp>crown@radius`` the bound ``crown`` decides at the recipe's radius only, and radii beyond it are ``ibp``'s.

    Args:
        guarantee: ``real_arith``, or ``float_sound``: every floating-point evaluation at ``deploy`` is covered.

    Raises:
        UsageError: unknown name, which gets the nearest known one; a name twice in a cascade; a first bound that leaves
            the radii to others.
    """
    parts = cascade_parts(name)
    names = [part for part, _ in parts]
    for part in names:
        if part not in BOUNDS:
            raise UsageError(f"unknown certifier {part!r}{_of(name, names)}; {nearest(part, BOUNDS)}")
    if len(set(names)) < len(names):
        raise UsageError(f"certifier {name!r} names a bound twice; the second would find nothing new")
    if not parts[0][1]:
        raise UsageError(
            f"certifier {name!r}: its first bound must search radii; write {VERDICT_ONLY} after later ones"
        )
    bounds = [replace(BOUNDS[part], searches=searches) for part, searches in parts]
    return _certifier([_sound(bound, deploy) for bound in bounds] if guarantee == "float_sound" else bounds)


def _sound(bound: Bound, deploy: str) -> Bound:
    precision = find_precision(deploy)

    def margins(graph: Graph, images: Tensor, eps: Tensor, labels: Tensor) -> Tensor:
        found = bound.margins(graph, images, eps, labels, precision)
        return torch.where(found.isnan(), -torch.inf, found)  # a number may overflow: nothing is proved

    settings = {**bound.settings, "deploy": deploy, "kernels": SWITCHES}
    return replace(bound, margins=margins, settings=settings, guarantee="float_sound", deploy=deploy)


def _of(name: str, names: list[str]) -> str:
    return f" in {name!r}" if len(names) > 1 else ""
