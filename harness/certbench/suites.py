"""Suites: names for sets of recipes, told by the data set that a recipe's name begins with."""

from __future__ import annotations

from collections.abc import Iterable

SUITES: dict[str, str | None] = {
    "quick": "digits",
    "mnist": "mnist",
    "cifar10": "cifar10",
    "tinyimagenet": "tinyimagenet",
    "imagenet": "imagenet",
    "standard": None,
}
"""Suite -> data set; ``standard`` holds every recipe."""


def recipes_of(suite: str, recipes: Iterable[str]) -> list[str]:
    """The recipes of a suite among full names such as ``fast-ibp/mnist-linf-0.4``, sorted."""
    dataset = SUITES[suite]
    return sorted(
        name for name in recipes if dataset is None or name.partition("/")[2].startswith(f"{dataset}-")
    )
