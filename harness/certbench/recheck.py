"""Certificates of somebody else, a random sample of them made again from the checkpoint they are said to belong to.

Draws of one run are the same wherever they are made on one kind of device, so that statistical certificates are compared
count by count there; on another the noise is other noise, and the two counts are put to a test.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from certbench.contract import SilentReporter
from certbench.data.dataset import image_digests
from certbench.errors import CertbenchError, RunError
from certbench.plugins import Plugins, installed
from certbench.recipe import PROTOCOLS, validate
from certbench.results.checks import CrossCheck
from certbench.results.rules import FAILURES
from certbench.results.store import ResultStore, certify_stage
from certbench.run import Run, choose_device
from certbench.seeding import noise_device
from certbench.stages.certify import CertificateSet, digest_settings
from certbench.stats.agreement import contradict
from certbench.training.checkpoint import network_digest

BLOCK = 250
"""Images that are certified together, as in the protocol, so that the last bits come out alike."""
TOLERANCE = 1e-4
"""By how much, as a share, a claimed radius may exceed ours: kernels of other machines differ in their last bits."""
LEVEL = 0.001
"""Honest counts of another device are called contradictory with this probability at most, over all images together."""
FIXED = tuple(name for name, rules in PROTOCOLS.items() if rules.startswith("l2-fixed-"))
"""Certifiers whose number of draws is known beforehand."""
SETTINGS = ("sigma", "alpha", "n0", "exact_noise")
"""What does not depend on the draws."""


@dataclass(frozen=True)
class Rechecked:
    """How many certificates of a run were made again, what differed, and how each set was compared, one line each."""

    run_id: str
    made: int
    differences: tuple[str, ...]
    comparisons: tuple[str, ...] = ()


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
    where the prediction is the same, what was certified is certified here, and the radius is not larger than ours; a
    statistical one where settings and counts are equal, if both were made on one kind of device, and otherwise where the
    counts do not contradict each other (:func:`certbench.stats.agreement.contradict`).

    Raises:
        RunError: the checkpoint is no network of a run in ``store``, its method cannot be run here, or certificates are
            not about its run: other images than its recipe asks for, or other noise than its own.
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
    made, differences, comparisons = 0, [], []
    for each in sets:
        table = store.certificates(*each)
        for problem in CrossCheck({run.id: row}).problems(table):
            raise RunError(problem)
        rows = table.to_pandas().set_index("index")
        _check_places(run, rows)
        rows = rows[~rows["verdict"].isin(FAILURES)]  # what failed claims nothing
        if rows.empty:
            continue
        chosen = sorted(random.SystemRandom().sample(list(rows.index), min(sample, len(rows))))
        _check_images(run, rows, chosen)
        compare, words = _comparison(store, run, each, rows, LEVEL / (len(sets) * len(chosen)))
        ours = pd.concat(_certified(run, network, chosen)).set_index("index").loc[chosen]
        made += len(chosen)
        differences += list(compare(rows.loc[chosen], ours))
        comparisons.append(f"{each[1]}: {words}")
    return Rechecked(run.id, made, tuple(differences), tuple(comparisons))


def _tensors(checkpoint: Path) -> dict[str, Any]:
    try:
        if checkpoint.exists() and not checkpoint.is_file():  # opening a pipe may never end
            raise RunError(f"{checkpoint} is not a regular file")
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


def _check_places(run: Run, rows: pd.DataFrame) -> None:
    """Refuse certificates of images that the recipe does not ask for."""
    split, stride = run.certified_split, run.recipe.smoothing.stride
    strangers = rows.index[(rows.index % stride != 0) | (rows.index // stride >= len(split))]
    if len(strangers):
        raise RunError(
            f"run {run.id}: image {strangers[0]} is not among those its recipe has certified: {len(split)} images of "
            f"{run.recipe.dataset}{f', every {stride}th' if stride > 1 else ''}"
        )


def _check_images(run: Run, rows: pd.DataFrame, chosen: Sequence[int]) -> None:
    """Refuse certificates of images that are others in the data set, or have another label there."""
    here = run.certified_split.take(np.array(chosen) // run.recipe.smoothing.stride)
    for index, label, digest in zip(chosen, here.labels.tolist(), image_digests(here), strict=True):
        if (rows.at[index, "label"], rows.at[index, "image_digest"]) != (label, digest):
            raise RunError(
                f"run {run.id}: image {index} or its label is another in {run.recipe.dataset} here"
            )


def _certified(run: Run, network: nn.Module, chosen: Sequence[int]) -> Iterator[pd.DataFrame]:
    stride = run.recipe.smoothing.stride
    together = 1 if run.certifier.name in PROTOCOLS else BLOCK  # draws of an image depend on no other
    for block in sorted({index // stride // together for index in chosen}):
        task = run.certify_task(network, block * together, (block + 1) * together)
        try:
            parts = list(run.certifier.certify(task))
        except CertbenchError:
            raise
        except Exception as error:  # a plugin's own certifier may raise anything
            raise RunError(
                f"{run.recipe.name}: its certifier failed: {type(error).__name__}: {error}"
            ) from error
        for part in parts:
            names = ("index", "prediction", "verdict", "radius")
            if part.guarantee == "statistical" and not {"k", "n"} <= set(part.columns):
                raise RunError(
                    f"{run.recipe.name}: its certifier counts no draws, so nothing can be compared"
                )
            yield pd.DataFrame({**part.columns, **{name: getattr(part, name) for name in names}})


# Comparing -----------------------------------------------------------------------------------------------------------

Compare = Callable[[pd.DataFrame, pd.DataFrame], Iterator[str]]


def _comparison(
    store: ResultStore, run: Run, of: CertificateSet, rows: pd.DataFrame, level: float
) -> tuple[Compare, str]:
    """How certificates of one set are compared, ``level`` for each image, and that in words.

    Raises:
        RunError: they were made on another device, and nothing can be said of them here.
    """
    if rows["guarantee"].iloc[0] != "statistical":
        return _differences, f"predictions, verdicts, and radii up to a share of {TOLERANCE:g}"
    there, here = _devices_there(store, run, of, rows), _device_here(run)
    if there == {here}:
        return _differing_counts, f"every count, exactly (made on {here}, as here)"
    others = ", ".join(sorted(there)) or "an unknown device"
    if of[1] == "smoothing-two-sided":
        raise RunError(
            f"run {run.id}: made on {others}, and here is {here}; counts of rivals can only be compared on equal devices"
        )
    fixed = of[1] in FIXED
    kind = "Clopper-Pearson" if fixed else "anytime-valid"
    return (
        partial(_contradictions, level=level, fixed=fixed, most=run.recipe.smoothing.n),
        f"counts by a test (made on {others}, here is {here}): {kind} intervals of both counts must meet, level "
        f"{LEVEL:g} over all images together",
    )


def _device_here(run: Run) -> str:
    return torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type


def _devices_there(store: ResultStore, run: Run, of: CertificateSet, rows: pd.DataFrame) -> set[str]:
    """The kind of device whose noise the draws name; GPUs by their names, since kernels of others may flip a draw."""
    kinds = {noise_device(key, run.id) for key in rows["generator_key"].dropna().unique()}
    if kinds != {"cuda"} or run.device.type != "cuda":
        return {kind or "an unknown device" for kind in kinds}
    stage = certify_stage(*of[1:])
    timings = store.read("timings").to_pylist()
    return {row["device"] for row in timings if (row["run_id"], row["stage"]) == (run.id, stage)}


def _settings_differ(claimed: pd.DataFrame, ours: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    differs = np.zeros(len(claimed), dtype=bool)
    for name in names:
        if name in ours:
            differs |= claimed[name].to_numpy() != ours[name].to_numpy()
    return differs


def _differing_counts(claimed: pd.DataFrame, ours: pd.DataFrame) -> Iterator[str]:
    """Two runs on one kind of device are equal in every count."""
    differs = _settings_differ(claimed, ours, (*SETTINGS, "n", "k", "draws", "verdict"))
    differs |= _classes(claimed) != _classes(ours)
    differs |= claimed["radius"].to_numpy() > ours["radius"].to_numpy() * (1 + TOLERANCE)
    return _lines(claimed, ours, differs)


def _contradictions(
    claimed: pd.DataFrame, ours: pd.DataFrame, level: float, fixed: bool, most: int
) -> Iterator[str]:
    """Other noise gives other counts, but of one probability; radii follow from the counts, which was checked before."""
    differs = _settings_differ(claimed, ours, (*SETTINGS, "n") if fixed else SETTINGS)
    differs |= claimed["n"].to_numpy() > most
    differs |= claimed["k"].isna().to_numpy() | ours["k"].isna().to_numpy()
    comparable = ~differs
    theirs, here = (
        (table["k"].to_numpy()[comparable], table["n"].to_numpy()[comparable]) for table in (claimed, ours)
    )
    same = (_classes(claimed) == _classes(ours))[comparable]
    differs[comparable] = contradict(theirs, here, same, level, anytime=not fixed)
    return _lines(claimed, ours, differs)


def _classes(rows: pd.DataFrame) -> np.ndarray:
    return rows["prediction"].fillna(-1).to_numpy(dtype=np.int64)


def _lines(claimed: pd.DataFrame, ours: pd.DataFrame, differs: np.ndarray) -> Iterator[str]:
    for index in claimed.index[differs]:
        there, here = (_in_words(table.loc[index]) for table in (claimed, ours))
        yield f"image {index} is {there} there, and {here} here"


def _in_words(row: pd.Series) -> str:
    return (
        f"{row['verdict']} with {row['k']} of {row['n']} draws for class {row['prediction']:.0f} "
        f"and radius {row['radius']:.6g}"
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
