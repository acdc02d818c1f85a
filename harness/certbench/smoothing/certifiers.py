"""The core's smoothed certifiers by name."""

from __future__ import annotations

from functools import partial

from certbench.contract import Certifier
from certbench.errors import UsageError, nearest
from certbench.recipe import Recipe
from certbench.smoothing.decide import Smoother, certify
from certbench.smoothing.noise import BLOCK
from certbench.smoothing.sampler import DTYPES
from certbench.smoothing.stopping import GIVE_UP

NUMERICS = 1
"""Raised when a change of this room moves counts or radii; part of every settings digest."""

SMOOTHERS = {
    smoother.name: smoother
    for smoother in (
        Smoother("smoothing", "CERTIFY: a fixed number of draws, Clopper-Pearson bound"),
        Smoother("smoothing-two-sided", "the same, bounding the rivals as well", two_sided=True),
        Smoother("smoothing-label", "a fixed number of draws, the label under test", label=True),
        Smoother("smoothing-sequential", "draws until decided, anytime-valid bound", sequential=True),
        Smoother(
            "smoothing-sequential-label",
            "draws until decided, the label under test",
            sequential=True,
            label=True,
        ),
    )
}


def find_smoother(name: str, recipe: Recipe) -> Certifier:
    """The certifier of that name with the recipe's settings.

    Raises:
        UsageError: unknown name, or an arithmetic that smoothed networks are not run in.
    """
    if name not in SMOOTHERS:
        raise UsageError(f"unknown certifier {name!r} for norm l2; {nearest(name, SMOOTHERS)}")
    deploy = recipe.certify.deploy
    if deploy not in DTYPES:
        raise UsageError(f"certify.deploy = {deploy!r}: a smoothed network runs in {', '.join(DTYPES)}")
    smoother, smoothing = SMOOTHERS[name], recipe.smoothing
    unused = {"subset"}  # another subset is another protocol, and another part of the run id
    unused |= set() if smoother.sequential else {"goal", "radii", "tolerance"}
    unused |= {"n0"} if smoother.label else set()
    settings = {
        "certifier": name,
        "numerics": NUMERICS,
        "block": BLOCK,
        "give_up": GIVE_UP,
        "deploy": deploy,
        **smoothing.model_dump(mode="json", exclude=unused),
    }
    return Certifier(name, smoother.summary, partial(certify, smoother), settings)
