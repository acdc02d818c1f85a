"""Time and memory of building every board from 10 million certificate rows: ``python benchmarks/leaderboard.py``.

``--runs 100,300,1000`` builds stores of that many runs of 10,000 images each and prints seconds, peak memory and rows
per second for each, so that one sees whether the cost grows linearly. The rows are drawn from a population in which an
image's difficulty and a run's quality add up, as they do on real boards: 25 data sets, radii and sigmas, a quarter of
them smoothed, methods with one to three seeds. Last figures: see ``leaderboard.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import special

from certbench.results.files import encode
from certbench.results.schema import AUDITS, CERTIFICATES, RUNS, TIMINGS, TableSpec
from certbench.seeding import noise_key

SETTINGS = "feedc0de" * 2
ALPHA, N = 0.001, 100_000
PLACES = [
    *((d, "linf", r, None) for d in ("mnist", "cifar10") for r in ("1/10", "1/5", "2/255", "8/255", "3/10")),
    *((d, "linf", "1/255", None) for d in ("tinyimagenet", "svhn", "digits")),
    *((d, "l2", None, s) for d in ("mnist", "cifar10") for s in (0.25, 0.5, 1.0)),
]
"""(data set, norm, radius, sigma) of every board."""


def put(folder: Path, spec: TableSpec, name: str, columns: dict[str, Any]) -> None:
    rows = max(len(v) for v in columns.values() if isinstance(v, np.ndarray | pa.Array | list))
    arrays = []
    for field in spec.schema:
        value = columns.get(field.name)
        if not isinstance(value, np.ndarray | pa.Array | list):
            value = pa.repeat(pa.scalar(value, field.type), rows)
        elif not isinstance(value, pa.Array):
            value = pa.array(value, field.type, from_pandas=True)
        arrays.append(value.cast(field.type))
    path = folder / spec.name / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(pa.Table.from_arrays(arrays, schema=spec.schema), spec))


def make_store(folder: Path, runs: int, images: int = 10_000, audited: bool = False) -> None:
    """A store of that many runs; quick to write, every row keeping every rule."""
    generator = np.random.default_rng(20210312)
    difficulty = generator.normal(size=images)
    labels = generator.integers(0, 10, images).astype(np.int32)
    digests = {
        d: [hashlib.sha256(f"{d}{i}".encode()).hexdigest()[:16] for i in range(images)] for d, *_ in PLACES
    }
    for number in range(runs):
        place = PLACES[number % len(PLACES)]
        method, seed = divmod(number // len(PLACES), 3)
        write_run(folder, number, place, f"method-{method:02}", seed, images, audited)
        quality = 1.5 + 0.05 * method + 0.02 * generator.normal()
        strength = quality - difficulty + 0.3 * generator.normal(size=images)
        make = smoothed if place[1] == "l2" else bounded
        columns = make(strength, labels, place)
        if place[1] == "l2":
            columns["generator_key"] = noise_key(f"{number:016x}", "cpu")
        put(
            folder,
            CERTIFICATES,
            f"{number:016x}-{columns['certifier']}-{SETTINGS[:8]}",
            {
                "run_id": f"{number:016x}",
                "settings_digest": SETTINGS,
                "index": np.arange(images, dtype=np.int32),
                "image_digest": digests[place[0]],
                "label": labels,
                "deploy": "float32",
                **columns,
            },
        )
        if audited and place[1] == "linf":
            write_audits(folder, number, columns, labels, place)


def bounded(strength: np.ndarray, labels: np.ndarray, place: tuple[Any, ...]) -> dict[str, Any]:
    from certbench.results.rules import parse_fraction
    from certbench.threat import round_down

    radius = parse_fraction(place[2])
    right = strength > -1.0
    certified = strength > 0.6
    found = np.clip(strength + 1, 0, 3) / 3 * float(radius) * 2
    found = np.where(
        certified, np.maximum(found, round_down(radius)), np.minimum(found, 0.99 * float(radius))
    )
    return {
        "certifier": "ibp",
        "prediction": np.where(right, labels, (labels + 1) % 10),
        "verdict": np.where(certified, "certified", np.where(right, "unknown", "misclassified")),
        "radius": np.where(right, np.minimum(found, float(2 * radius)), 0.0),
        "margin": np.where(certified, np.abs(strength) + 1e-6, -np.abs(strength)),
        "guarantee": "float_sound",
        "proved_by": np.where(certified, "ibp", ""),
        "passes": np.full(len(labels), 7, dtype=np.int32),
    }


def smoothed(strength: np.ndarray, labels: np.ndarray, place: tuple[Any, ...]) -> dict[str, Any]:
    from certbench.stats.binomial import lower_bound

    k = np.round(N * special.ndtr(strength)).astype(np.int64)
    low = lower_bound(k, N, ALPHA)
    right = low > 0.5
    return {
        "certifier": "smoothing",
        "prediction": np.where(right, labels, np.nan),
        "verdict": np.where(right, "certified", "abstain"),
        "radius": np.where(right, place[3] * special.ndtri(np.maximum(low, 0.5)) * (1 - 1e-9), 0.0),
        "guarantee": "statistical",
        "proved_by": np.where(right, "clopper-pearson", ""),
        "passes": np.full(len(labels), N + 100, dtype=np.int32),
        "sigma": place[3],
        "alpha": ALPHA,
        "n0": 100,
        "n": N,
        "k": k,
        "draws": np.full(len(labels), N + 100),
        "stop_reason": "budget",
        "exact_noise": False,
    }


def write_run(
    folder: Path, number: int, place: tuple[Any, ...], method: str, seed: int, images: int, audited: bool
) -> None:
    dataset, norm, radius, sigma = place
    threat = {"norm": norm, "radius": radius} if radius else {"norm": norm, "sigma": sigma}
    train = {"epochs": 10 + int(method[-2:])}
    name = f"{method}/{dataset}-{norm}-{(radius or str(sigma)).replace('/', '-')}"
    recipe = {
        "name": name,
        "dataset": dataset,
        "model": "cnn7",
        "seed": seed,
        "threat": threat,
        "train": train,
    }
    recipe["method"] = {"name": method}
    cap = None
    if radius:
        from certbench.results.rules import parse_fraction

        cap = str(2 * parse_fraction(radius))
    run_id = f"{number:016x}"
    columns = {
        "run_id": [run_id],
        "protocol": "linf-1" if norm == "linf" else "l2-fixed-1",
        "method": method,
        "plugin": "certbench-benchmark",
        "plugin_version": "0.1.0",
        "numerics": 1,
        "dataset": dataset,
        "dataset_digest": hashlib.sha256(dataset.encode()).hexdigest(),
        "model": "cnn7",
        "parameters": 10_000_000,
        "norm": norm,
        "radius": radius,
        "sigma": sigma,
        "cap": cap,
        "seed": seed,
        "recipe_name": name,
        "recipe": json.dumps(recipe, sort_keys=True, separators=(",", ":")),
        "checkpoint_digest": "c" * 64,
        "epochs": train["epochs"],
        "torch_version": "2.11.0",
        "python_version": "3.11.9",
        "certbench_version": "0.1.0",
    }
    put(folder, RUNS, run_id, columns)
    certifier = "ibp" if norm == "linf" else "smoothing"
    for stage, seconds in (("train", 900.0 + number), (f"certify-{certifier}-{SETTINGS[:8]}", 20.0)):
        timing = {
            "run_id": [run_id],
            "stage": stage,
            "shard": 0,
            "seconds": seconds,
            "device": "cpu, 2 threads",
        }
        put(folder, TIMINGS, f"{run_id}-{stage}", timing | {"started_at": "2026-01-01T00:00:00+00:00"})


def write_audits(
    folder: Path, number: int, columns: dict[str, Any], labels: np.ndarray, place: tuple[Any, ...]
) -> None:
    from certbench.results.rules import parse_fraction
    from certbench.threat import round_down

    right = np.flatnonzero(columns["prediction"] == labels).astype(np.int32)
    own = np.flatnonzero(columns["radius"] > 0).astype(np.int32)
    asked = round_down(parse_fraction(place[2]))
    index = np.concatenate([right, own])
    kind = np.array(["recipe_radius"] * len(right) + ["certified_radius"] * len(own))
    order = np.lexsort((kind, index))
    run_id = f"{number:016x}"
    table = {
        "run_id": run_id,
        "certifier": "ibp",
        "settings_digest": SETTINGS,
        "index": index[order],
        "attack": "standard",
        "attack_settings_digest": "b809aa75b809aa75",
        "ball_radius": np.concatenate([np.full(len(right), asked), columns["radius"][own]])[order],
        "kind": kind[order],
        "found": False,
        "outcome": "held",
    }
    put(folder, AUDITS, f"{run_id}-ibp-{SETTINGS[:8]}-standard-b809aa75", table)


def build(folder: Path, page: bool) -> None:
    """Build in this process and print what it took; run in a process of its own, so that the peak is the build's."""
    from certbench.leaderboard.build import write

    began = time.perf_counter()
    files = write(folder, page).files
    seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "MB": used.ru_maxrss / 1024}
    print(json.dumps(figures | {"files": len(files)}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default="100,300,1000")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--audited", action="store_true", help="two audit rows for every certificate as well")
    parser.add_argument("--page", action="store_true", help="the page with its charts as well")
    parser.add_argument("--folder", type=Path, help="keep the stores here")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        build(options.build, options.page)
        return
    root = options.folder or Path(tempfile.mkdtemp())
    print(
        "| runs | certificate rows | seconds | CPU seconds | rows per second | peak MB |\n|---|---|---|---|---|---|"
    )
    for runs in map(int, options.runs.split(",")):
        folder = root / str(runs)
        if not folder.exists():
            make_store(folder / "results", runs, options.images, options.audited)
        command = [sys.executable, __file__, "--build", str(folder), *(["--page"] if options.page else [])]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows = runs * options.images
        per_second = rows / found["seconds"]
        print(
            f"| {runs:,} | {rows:,} | {found['seconds']:.1f} | {found['cpu']:.1f} | {per_second:,.0f} | {found['MB']:.0f} |"
        )


if __name__ == "__main__":
    main()
