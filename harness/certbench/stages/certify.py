"""What a run does to certify: the certifier its recipe asks for, what names its rows, and the rows themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from certbench.bounds.certifiers import find_certifier
from certbench.contract import Certificates, Certifier, CertifyTask
from certbench.data.dataset import Split, image_digests
from certbench.errors import RunError
from certbench.plugins import Owned, Plugins
from certbench.recipe import Recipe
from certbench.results.files import write_atomically
from certbench.smoothing import find_smoother

CertificateSet = tuple[str, str, str]
"""(run id, certifier, settings digest): what names certificates in the store."""


def choose_certifier(recipe: Recipe, owned: Owned, plugins: Plugins) -> Certifier:
    """The plugin's own certifier, under the method's name, unless the recipe names another than the card does.

    Raises:
        UsageError: no certifier of that name.
    """
    asked, method = recipe.certify, recipe.method.name
    name = asked.certifier or owned.card.certifier
    if name != owned.card.certifier or not plugins.has_certifier(method):
        if recipe.threat.norm == "l2":
            return find_smoother(name, recipe)
        return find_certifier(name, asked.guarantee, asked.deploy)
    settings = {
        "certifier": method,
        "numerics": owned.card.numerics,
        "guarantee": asked.guarantee,
        "deploy": asked.deploy,
        "method": plugins.settings(recipe).model_dump(mode="json"),
    }
    return Certifier(method, owned.card.summary, plugins.certify, settings)


def digest_settings(certifier: Certifier, recipe: Recipe) -> str:
    """Names what a certifier's rows depend on besides the network; see :func:`certify_settings`."""
    content = certify_settings(certifier, recipe)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def certify_settings(certifier: Certifier, recipe: Recipe) -> dict[str, Any]:
    """The certifier's settings, its guarantee included, the radius and the cap."""
    if recipe.threat.norm == "l2":
        return {**certifier.settings, "sigma": recipe.sigma}
    return {**certifier.settings, "radius": str(recipe.radius), "cap": str(recipe.cap)}


def certificate_columns(split: Split, parts: list[Certificates]) -> dict[str, Any]:
    """The columns of the certificates table for the images of ``split``."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    return {
        **{
            name: joined(name)
            for name in ("index", "prediction", "verdict", "radius", "margin", "proved_by", "passes")
        },
        **{name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
        "image_digest": image_digests(split),
        "label": split.labels.numpy(),
        "guarantee": [part.guarantee for part in parts for _ in part.index],
        "deploy": [part.deploy for part in parts for _ in part.index],
    }


def complete(parts: list[Certificates], task: CertifyTask) -> list[Certificates]:
    """
    Raises:
        RunError: the certifier did not give exactly one certificate per image, in order.
    """
    index = np.concatenate([part.index for part in parts]) if parts else np.array([])
    wanted = task.start + task.stride * np.arange(len(task.split))
    if not np.array_equal(index, wanted):
        raise RunError(
            f"{task.recipe.name}: certify gave {len(index)} certificates for images {wanted[0]} to {wanted[-1]}; "
            f"it must give one for each{f' {task.stride}th' if task.stride > 1 else ''}, in order"
        )
    return parts


def certified_share(parts: list[Certificates]) -> float:
    return float(np.concatenate([part.verdict == "certified" for part in parts]).mean())


@dataclass(frozen=True)
class ScratchFile:
    """Half-done work in a file of the run's folder; see :class:`certbench.contract.Scratch`."""

    path: Path
    saved: Callable[[], None] | None = None
    """Called whenever something was saved."""

    def load(self) -> bytes | None:
        return self.path.read_bytes() if self.path.is_file() else None

    def save(self, content: bytes) -> None:
        write_atomically(self.path, content)
        if self.saved is not None:
            self.saved()
