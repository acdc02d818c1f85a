"""Certificates of somebody else, a random sample of them made again from the checkpoint they are said to belong to."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from certbench.contract import SilentReporter
from certbench.errors import CertbenchError, RunError
from certbench.plugins import Plugins, installed
from certbench.recipe import validate
from certbench.results.store import ResultStore
from certbench.run import Run, choose_device
from certbench.stages.certify import CertificateSet, digest_settings
from certbench.training.checkpoint import network_digest

BLOCK = 250
"""Images that are certified together, as in the protocol, so that the last bits come out alike."""
TOLERANCE = 1e-4
"""By how much, as a share, a claimed radius may exceed ours: kernels of other machines differ in their last bits."""


@dataclass(frozen=True)
class Rechecked:
    """How many certificates of a run were made again, and what differed, one line each."""

    run_id: str
    made: int
    differences: tuple[str, ...]


def recheck(
    store: ResultStore,
    checkpoint: Path,
    sample: int,
    *,
    data: str | Path | None = None,
    device: str = "auto",
    out: Path,
    plugins: Plugins | None = None,
) -> Rechecked:
    """Make ``sample`` certificates of the run whose network the checkpoint holds again, and compare.

    The images are drawn by the system's own randomness, so that nobody can know them beforehand. A certificate agrees
    where the prediction is the same, what was certified is certified here, and the radius is not larger than ours.

    Raises:
        RunError: the checkpoint is no network of a run in ``store``, or its method cannot be run here.
    """
    tensors = _tensors(checkpoint)
    for row in store.read("runs").to_pylist():
        run = _prepare(row, store, out, data, device, plugins or installed())
        network = _network(run, tensors)
        if network is not None and network_digest(network) == row["checkpoint_digest"]:
            break
    else:
        raise RunError(f"{checkpoint} is the network of no run in the bundle")
    sets = [each for each in store.certificate_sets(run.id) if _can_be_made(run, each)]
    if not sets:
        raise RunError(f"run {run.id}: no set of its certificates was made with the settings of its recipe")
    made, differences = 0, []
    for each in sets:
        rows = store.certificates(*each).to_pandas().set_index("index")
        chosen = sorted(random.SystemRandom().sample(list(rows.index), min(sample, len(rows))))
        ours = pd.concat(_certified(run, network, chosen)).set_index("index").loc[chosen]
        made += len(chosen)
        differences += list(_differences(rows.loc[chosen], ours))
    return Rechecked(run.id, made, tuple(differences))


def _tensors(checkpoint: Path) -> dict[str, Any]:
    try:
        return load_file(checkpoint)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot read {checkpoint} as safetensors: {error}") from None


def _prepare(
    row: dict[str, Any], store: ResultStore, out: Path, data: str | Path | None, device: str, plugins: Plugins
) -> Run:
    recipe = plugins.resolve(validate(json.loads(row["recipe"]), f"run {row['run_id']}"))
    run = Run.prepare(
        recipe, out, data, choose_device(device), plugins, SilentReporter(), identity=row["run_id"]
    )
    if run.dataset.digest != row["dataset_digest"]:
        raise RunError(f"run {run.id} was made on another version of {recipe.dataset} than is found here")
    return run


def _network(run: Run, tensors: dict[str, Any]) -> nn.Module | None:
    """The run's network with these weights; None where they are those of another architecture."""
    network = run.build_network()
    try:
        network.load_state_dict(tensors)
    except RuntimeError:
        return None
    return network.eval()


def _can_be_made(run: Run, certificates: CertificateSet) -> bool:
    return certificates[1:] == (run.certifier.name, digest_settings(run.certifier, run.recipe))


def _certified(run: Run, network: nn.Module, chosen: Sequence[int]) -> Iterator[pd.DataFrame]:
    stride = run.recipe.smoothing.stride
    for block in sorted({index // stride // BLOCK for index in chosen}):
        task = run.certify_task(network, block * BLOCK, (block + 1) * BLOCK)
        try:
            parts = list(run.certifier.certify(task))
        except CertbenchError:
            raise
        except Exception as error:  # a plugin's own certifier may raise anything
            raise RunError(
                f"{run.recipe.name}: its certifier failed: {type(error).__name__}: {error}"
            ) from error
        for part in parts:
            yield pd.DataFrame(
                {name: getattr(part, name) for name in ("index", "prediction", "verdict", "radius")}
            )


def _differences(claimed: pd.DataFrame, ours: pd.DataFrame) -> Iterator[str]:
    predicted = claimed["prediction"].fillna(-1).to_numpy() != ours["prediction"].to_numpy()
    uncertified = (claimed["verdict"] == "certified").to_numpy() & (ours["verdict"] != "certified").to_numpy()
    radius = claimed["radius"].fillna(0.0).to_numpy()
    larger = radius > np.nan_to_num(ours["radius"].to_numpy()) * (1 + TOLERANCE)
    for index in claimed.index[predicted | uncertified | larger]:
        theirs, here = claimed.loc[index], ours.loc[index]
        yield (
            f"image {index} is {theirs['verdict']} with radius {theirs['radius']:.6g} there, "
            f"and {here['verdict']} with {here['radius']:.6g} here"
        )
