"""A finished run, found again by its id: its recipe, its data and its network, without training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from certbench.audit.registry import DEFAULT
from certbench.contract import Reporter, SilentReporter
from certbench.errors import RunError, UsageError, nearest
from certbench.plugins import Plugins, installed
from certbench.recipe import validate
from certbench.results.store import ResultStore
from certbench.run import Run, choose_device
from certbench.stages.audit import choose_attack, refutations
from certbench.stages.certify import choose_certifier, digest_settings
from certbench.stages.record import RunOutcome
from certbench.stages.train import NETWORK
from certbench.training.checkpoint import network_digest


@dataclass(frozen=True)
class Recorded:
    """A run as it was recorded. ``run`` holds the recipe that trained ``network``, under the recorded id."""

    run: Run
    network: nn.Module
    row: Mapping[str, Any]


def find_run(prefix: str, out: Path) -> dict[str, Any]:
    """The row in ``runs`` whose id begins with ``prefix``.

    Raises:
        UsageError: none does, or several do.
    """
    rows = {row["run_id"]: row for row in ResultStore(out / "results").read("runs").to_pylist()}
    found = [identity for identity in rows if prefix and identity.startswith(prefix)]
    if not found:
        raise UsageError(f"no run in {out} has an id that begins with {prefix!r}; {nearest(prefix, rows)}")
    if len(found) > 1:
        raise UsageError(f"{len(found)} runs in {out} begin with {prefix!r}: {', '.join(found)}")
    row: dict[str, Any] = rows[found[0]]
    return row


def load_run(
    prefix: str,
    out: str | Path = "certbench-out",
    data: str | Path | None = None,
    device: str = "auto",
    plugins: Plugins | None = None,
    reporter: Reporter | None = None,
) -> Recorded:
    """The finished run of ``out`` whose id begins with ``prefix``, its network loaded and compared with the record.

    Raises:
        UsageError: no such run, or several.
        RunError: its checkpoint is gone, unfinished, damaged, or not the network that was recorded.
    """
    out, plugins = Path(out), plugins or installed()
    row = find_run(prefix, out)
    identity = row["run_id"]
    recipe = plugins.resolve(validate(json.loads(row["recipe"]), f"run {identity}"))
    run = Run.prepare(
        recipe, out, data, choose_device(device), plugins, reporter or SilentReporter(), identity=identity
    )
    run.refuse_submitted()
    if run.dataset.digest != row["dataset_digest"]:
        raise RunError(f"run {identity} was made on another version of {recipe.dataset}")
    if not (run.folder / NETWORK).is_file():
        raise RunError(f"run {identity} left no network in {run.folder}; run its recipe again")
    run.check_network()
    network = run.trained(only_load=True)
    if network_digest(network) != row["checkpoint_digest"]:
        raise RunError(
            f"the checkpoint in {run.folder} is not the network that run {identity} was recorded with"
        )
    return Recorded(run, network, row)


def audit_again(
    prefix: str,
    attack: str = DEFAULT,
    *,
    out: str | Path = "certbench-out",
    data: str | Path | None = None,
    device: str = "auto",
    plugins: Plugins | None = None,
    reporter: Reporter | None = None,
) -> RunOutcome:
    """Attack every set of certificates of a finished run, whichever certifier and guarantee it has.

    Rows join the store, and a refuted proof of any set counts in the outcome.

    Raises:
        CertbenchError: anything that went wrong, in one line.
    """
    recorded = load_run(prefix, out, data, device, plugins, reporter)
    run = recorded.run
    chosen = choose_attack(attack, run.recipe)
    sets = run.store.certificate_sets(run.id)
    if not sets:
        raise RunError(
            f"run {run.id} has no certificates in {run.store.folder}; `certbench certify` makes them"
        )
    for certificates in sets:
        if run.is_audited(chosen, certificates):
            run.reporter.say(f"{run.recipe.name}: {certificates[1]} is already audited with {chosen.name}")
        else:
            run.audit(recorded.network, chosen, certificates)
    found = [refutations(run.store, of) for of in sets]
    return replace(
        run.outcome(),
        refuted=sum(refuted or 0 for refuted, _ in found),
        void=any(void for _, void in found),
    )


def certify_again(
    prefix: str,
    changes: Mapping[str, str],
    radius: str | None = None,
    *,
    attack: str | None = DEFAULT,
    out: str | Path = "certbench-out",
    data: str | Path | None = None,
    device: str = "auto",
    plugins: Plugins | None = None,
    reporter: Reporter | None = None,
) -> RunOutcome:
    """Certify a finished run with ``changes`` of its ``[certify]`` table and audit the result; rows join the store.

    Rows are about the recipe's radius. Where another ``radius`` is asked for, nothing is recorded, and the outcome
    holds the figures at that radius.

    Raises:
        CertbenchError: anything that went wrong, in one line.
    """
    recorded = load_run(prefix, out, data, device, plugins, reporter)
    run = recorded.run
    content = run.recipe.canonical()
    content["certify"] |= changes
    if radius is not None:
        content["threat"]["radius"] = radius
        content["certify"]["cap"] = None
    if "certifier" in changes and "guarantee" not in changes:
        content["certify"]["guarantee"] = None  # what the other certifier can
    recipe = run.plugins.resolve(validate(content, run.recipe.name))
    run = replace(run, recipe=recipe, certifier=choose_certifier(recipe, run.owned, run.plugins))
    if radius is None:
        if not run.store.has_certificates(run.id, run.certifier.name, digest_settings(run.certifier, recipe)):
            run.record(run.certify(recorded.network))
        chosen = choose_attack(attack, recipe) if attack else None
        if chosen is not None and not run.is_audited(chosen):
            run.audit(recorded.network, chosen)
        return run.outcome()
    parts = run.certificates(recorded.network)
    prediction = np.concatenate([part.prediction for part in parts])
    verdict = np.concatenate([part.verdict for part in parts])
    return RunOutcome(
        run.id,
        recipe,
        run.folder,
        run.store.folder,
        clean_accuracy=float((prediction == run.dataset.test.labels.numpy()).mean()),
        certified_accuracy=float((verdict == "certified").mean()),
    )
