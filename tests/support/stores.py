"""Small stores of rows for tests of boards, pages and bundles."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

from certbench.data.catalog import DATASETS
from certbench.recipe import CORE_NUMERICS, identify, parse_recipe
from certbench.results.store import ResultStore
from certbench.seeding import noise_key
from certbench.stats.binomial import lower_bound
from certbench.threat import round_down

SETTINGS = "feedc0de" * 8
REFERENCE = {
    "source": "arXiv 2103.17268, Table 1",
    "clean_error": 51.72,
    "certified_error": 65.58,
    "certified_error_spread": 0.4,
}
LABELS = [0, 1, 2, 3, 4, 5, 6, 7]
C, U, M, T = "certified", "unknown", "misclassified", "timeout"


def add(
    folder: Path,
    run: str,
    verdicts: list[str],
    *,
    seed: int = 0,
    certifier: str = "ibp",
    radius: str = "1/10",
    cap: str | None = None,
    reference: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    proofs: list[str] | None = None,
    **changes: Any,
) -> None:
    """One run whose images get these verdicts: certified at the radius by ``ibp`` or else, unknown at half of it."""
    store = ResultStore(folder / "results")
    dataset, model, method = (
        changes.get("dataset", "mnist"),
        changes.get("model", "cnn7"),
        changes.get("method", "fast-ibp"),
    )
    recipe = {
        "seed": seed,
        "dataset": dataset,
        "model": model,
        "method": {"name": method},
        "threat": {"norm": "linf", "radius": radius},
        "train": train or {"epochs": 70},
        "reference": reference,
    }
    exact = Fraction(radius)
    row = {
        "run_id": run * 16,
        "protocol": "linf-1",
        "method": method,
        "plugin": "certbench-fast-ibp",
        "plugin_version": "0.1.0",
        "numerics": 1,
        "dataset": dataset,
        "dataset_digest": f"digest of {dataset}",
        "model": model,
        "parameters": 10,
        "norm": "linf",
        "radius": radius,
        "cap": cap or radius,
        "seed": seed,
        "recipe_name": f"{method}/{dataset}",
        "recipe": json.dumps(recipe, sort_keys=True, separators=(",", ":")),
        "checkpoint_digest": "c" * 64,
        "epochs": recipe["train"]["epochs"],
        "torch_version": "2.11.0",
        "python_version": "3.11.9",
        "certbench_version": "0.1.0",
    }
    store.write_run(row | changes)
    radii = {C: round_down(exact), U: float(exact / 2), M: 0.0, T: math.nan}
    count = len(verdicts)
    store.write_certificates(
        run * 16,
        certifier,
        SETTINGS,
        {
            "index": list(range(count)),
            "image_digest": [f"{dataset}{i}" for i in range(count)],
            "label": LABELS[:count],
            "prediction": [{M: 9, T: -1}.get(v, label) for v, label in zip(verdicts, LABELS, strict=False)],
            "verdict": verdicts,
            "radius": [radii[v] for v in verdicts],
            "margin": [1.0 if v == C else -1.0 for v in verdicts],
            "guarantee": "real_arith",
            "deploy": "float32",
            "proved_by": proofs or ["ibp" if v == C else "" for v in verdicts],
            "passes": 2,
        },
    )


def time(folder: Path, run: str, stage: str, seconds: float, second: int = 0, device: str = "cpu") -> None:
    row = {
        "run_id": run * 16,
        "stage": stage,
        "seconds": seconds,
        "device": device,
        "started_at": f"2026-01-01T00:00:{second:02}+00:00",
    }
    ResultStore(folder / "results").write_timing(row)


def identified(folder: Path, **changes: Any) -> str:
    """A run like those of :func:`add`, or with ``hits`` of :func:`smoothed`, with a whole recipe, on the known version
    of its data and under the id that is really its own; returns the id.

    ``certify`` is the recipe's table of that name; ``index`` gives the images other indices.
    """
    dataset = changes.get("dataset", "cifar10" if "hits" in changes else "mnist")
    if dataset in DATASETS:
        changes.setdefault("dataset_digest", DATASETS[dataset].digest)
    certify, index, asked = changes.pop("certify", {}), changes.pop("index", None), set(changes)
    scratch = folder / "scratch"
    if "hits" in changes:
        smoothed(scratch, "a", changes.pop("hits"), **changes)
    else:
        add(scratch, "a", changes.pop("verdicts", [C, C, U, M]), **changes)
    source = ResultStore(scratch / "results")
    row = source.run("a" * 16)
    said = {"dataset": row["dataset"], "model": row["model"], "train": {"epochs": row["epochs"]}}
    content = said | json.loads(row["recipe"]) | {"certify": certify}
    row["recipe"] = parse_recipe(content, row["recipe_name"]).canonical_json()
    numerics = CORE_NUMERICS, row["numerics"]
    identity = identify(json.loads(row["recipe"]), row["dataset_digest"], numerics, row["protocol"])
    store = ResultStore(folder / "results")
    store.write_run(row | {"run_id": identity})
    for run_id, certifier, settings in source.certificate_sets("a" * 16):
        table = source.certificates(run_id, certifier, settings)
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        columns["index"] = index or columns["index"]
        if "hits" in asked:
            columns["generator_key"] = noise_key(identity, "cpu")
        store.write_certificates(identity, certifier, settings, columns | {"run_id": identity})
    for path in scratch.rglob("*.parquet"):
        path.unlink()
    return identity


def smoothed(
    folder: Path, run: str, hits: list[int], *, n: int = 1000, sigma: float = 0.5, **changes: Any
) -> None:
    """One smoothed run: image i is hit in ``hits[i]`` of n draws, and certified where that proves a radius."""
    from scipy import special

    method = changes.get("method", "smoothing")
    seed = changes.get("seed", 0)
    store = ResultStore(folder / "results")
    recipe = {"seed": seed, "threat": {"norm": "l2", "sigma": sigma}, "method": {"name": method}}
    row = {
        "run_id": run * 16,
        "protocol": "l2-fixed-1",
        "method": method,
        "plugin": "certbench-smoothing",
        "plugin_version": "0.1.0",
        "numerics": 1,
        "dataset": "cifar10",
        "dataset_digest": "digest of cifar10",
        "model": "resnet110",
        "parameters": 10,
        "norm": "l2",
        "sigma": sigma,
        "seed": seed,
        "recipe_name": f"{method}/cifar10-l2-{sigma}",
        "recipe": json.dumps(recipe, sort_keys=True, separators=(",", ":")),
        "checkpoint_digest": hashlib.sha256(run.encode()).hexdigest(),
        "epochs": 1,
        "torch_version": "2.11.0",
        "python_version": "3.11.9",
        "certbench_version": "0.1.0",
    }
    stride = changes.pop("stride", 1)
    store.write_run(row | changes)
    low = lower_bound(hits, [n] * len(hits), 0.001)
    radius = [float(sigma * special.ndtri(p)) * (1 - 1e-9) if p > 0.5 else 0.0 for p in low]
    store.write_certificates(
        run * 16,
        "smoothing",
        SETTINGS,
        {
            "index": [stride * i for i in range(len(hits))],
            "image_digest": [f"cifar10-{stride * i}" for i in range(len(hits))],
            "label": [1] * len(hits),
            "prediction": [1 if r > 0 else -1 for r in radius],
            "verdict": ["certified" if r > 0 else "abstain" for r in radius],
            "radius": radius,
            "margin": [math.nan] * len(hits),
            "guarantee": "statistical",
            "deploy": "float32",
            "proved_by": ["clopper-pearson" if r > 0 else "" for r in radius],
            "passes": 1,
            "sigma": sigma,
            "alpha": 0.001,
            "n0": 100,
            "n": n,
            "k": hits,
            "draws": [n + 100] * len(hits),
            "stop_reason": "fixed",
            "generator_key": noise_key(run * 16, "cpu"),
            "exact_noise": False,
        },
    )


def refute(
    folder: Path, run: str, images: list[int], certifier: str = "ibp", attack: str = "standard"
) -> None:
    """Attack every certificate of a run at its own radius; those of some images are refuted."""
    store = ResultStore(folder / "results")
    table = store.certificates(run * 16, certifier, SETTINGS)
    own = [row for row in table.to_pylist() if (row["radius"] or 0) > 0]
    store.write_audits(
        run * 16,
        certifier,
        SETTINGS,
        attack,
        "b809aa7507b33669",
        {
            "index": [row["index"] for row in own],
            "ball_radius": [row["radius"] for row in own],
            "kind": "certified_radius",
            "found": [row["index"] in images for row in own],
            "distance": [row["radius"] if row["index"] in images else math.nan for row in own],
            "outcome": ["refuted" if row["index"] in images else "held" for row in own],
            "attack_summary": "APGD-CE 20 steps; APGD-DLR 20 steps",
        },
    )
