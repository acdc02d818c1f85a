"""Cost of smoothed certificates: draws until decided, throughput, memory.

``python benchmarks/smoothing.py population`` simulates draws on a stated population of class probabilities;
``mnist --out DIR --run ID --data DIR`` takes them on the network of a finished run; ``throughput`` races the packed
sampler against a plain loop over images, both interleaved in one process; ``memory`` shows the peak for growing n.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from certbench.contract import CertifyTask
from certbench.data.catalog import DATASETS
from certbench.data.dataset import Split
from certbench.models import build_network
from certbench.recipe import Recipe, Smoothing, parse_recipe
from certbench.smoothing import Purpose, Work, find_smoother, sampler_of
from certbench.smoothing.stopping import OPEN, Sequential, Standing
from certbench.stats.smoothing import fixed_radius

SIGMA, ALPHA, FIXED = 0.5, 0.001, 100_000
MOST = 130_000
"""Draws that the sequential certifier may take: a bound that may be looked at often needs a few more where it is close."""
RADII = ("0.25", "0.5", "1", "1.5")
MIXTURE = ((0.87, 0.35, 0.25), (0.13, 270.0, 0.12))
"""(weight, a, b) of Beta distributions of the label's probability. Fitted to the certified accuracies published for
SmoothMix's CIFAR-10 network at sigma 0.5: 64.4 57.2 49.5 42.3 35.0 28.9 23.0 16.8 % at radii 0 to 1.75."""
IMAGES = 10_000
ROUNDS = 7


def population(rng: np.random.Generator) -> np.ndarray:
    """IMAGES probabilities of the class under test."""
    parts = rng.choice(len(MIXTURE), IMAGES, p=[weight for weight, _, _ in MIXTURE])
    a, b = np.array([[a, b] for _, a, b in MIXTURE])[parts].T
    return rng.beta(a, b)


def decide(p: np.ndarray, radius: str, rng: np.random.Generator) -> Standing:
    """Every image's own stream, until the sequential certifier stops it."""
    settings = Smoothing(n=MOST, radii=(radius,), failure_probability=ALPHA)
    rule, standing = Sequential(settings, SIGMA), Standing.new(len(p), 2, 1)
    standing.candidate[:] = 0
    rows = np.arange(len(p))
    while len(rows):
        n = standing.n[rows]
        steps = rule.next_look(n) - n
        hits = rng.binomial(steps, p[rows])
        standing.counts[rows] += np.stack([hits, steps - hits, 0 * hits], 1)
        rule.look(standing, rows)
        rows = rows[standing.reason[rows] == OPEN]
    return standing


def show_population() -> None:
    rng = np.random.default_rng(0)
    p = population(rng)
    fixed = fixed_radius(rng.binomial(FIXED, p), FIXED, ALPHA, SIGMA)
    n0 = Smoothing().n0
    print(f"{IMAGES} images, sigma {SIGMA}, alpha {ALPHA}, at most {MOST} draws after {n0} that select\n")
    print("| radius | mean draws | fewer | certified % | fixed % | lost pp | undecided % |")
    print("|---|---|---|---|---|---|---|")
    for radius in RADII:
        standing = decide(p, radius, rng)
        draws = standing.n.mean() + n0
        certified, of_fixed = 100 * (standing.reached == 0).mean(), 100 * (fixed >= float(radius)).mean()
        undecided = 100 * ((standing.reached < 0) & (standing.refuted > 0)).mean()
        print(
            f"| {radius} | {draws:,.0f} | {FIXED / draws:.0f}x | {certified:.2f} | {of_fixed:.2f} "
            f"| {of_fixed - certified:.2f} | {undecided:.2f} |"
        )


def show_mnist(out: Path, run: str, data: str | None) -> None:
    """One certification for each radius of every 20th image; what is undecided is all that a fixed number could add."""
    from certbench.recorded import load_run

    recorded = load_run(run, out, data)
    content = recorded.run.recipe.canonical()
    split = recorded.run.dataset.test.every(20)
    print(f"{recorded.run.recipe.name}, {len(split)} images, {torch.get_num_threads()} threads\n")
    print("| radius | mean draws | fewer | certified % | undecided % | seconds | draws/s |")
    print("|---|---|---|---|---|---|---|")
    for radius in RADII:
        content["certify"]["smoothing"] |= {"radii": [radius], "n": MOST}
        recipe = Recipe.model_validate(content)
        task = replace(task_of(recipe, recorded.network, split), stride=20)
        began = time.perf_counter()
        (found,) = find_smoother("smoothing-sequential", recipe).certify(task)
        seconds = time.perf_counter() - began
        draws, reason = found.columns["draws"], found.columns["stop_reason"]
        certified = found.radius >= float(radius)
        undecided = (reason == "budget") & ~certified
        print(
            f"| {radius} | {draws.mean():,.0f} | {FIXED / draws.mean():.0f}x | {100 * certified.mean():.2f} "
            f"| {100 * undecided.mean():.2f} | {seconds:.0f} | {draws.sum() / seconds:,.0f} |"
        )


def task_of(recipe: Recipe, network: torch.nn.Module, split: Split) -> CertifyTask:
    return CertifyTask(
        recipe=recipe,
        settings=None,
        network=network,
        split=split,
        levels=255,
        start=0,
        radius=0,
        cap=0,
        device=torch.device("cpu"),
        run_id="benchmark",
    )


def lenet_task(images: int, n: int) -> CertifyTask:
    table = {
        "dataset": "mnist",
        "model": "lenet",
        "threat": {"norm": "l2", "sigma": SIGMA},
        "method": {"name": "none"},
        "train": {"epochs": 1},
        "certify": {"certifier": "smoothing", "smoothing": {"n": n}},
    }
    pixels = torch.randint(0, 256, (images, 1, 28, 28), dtype=torch.uint8)
    split = Split(pixels, torch.zeros(images, dtype=torch.int64))
    return task_of(
        parse_recipe(table, "benchmark"), build_network("lenet", DATASETS["mnist"], 0).eval(), split
    )


def plain_counts(network: torch.nn.Module, image: torch.Tensor, n: int, batch: int) -> np.ndarray:
    """One image at a time, counted on the host, as the published certifier does it."""
    counts = np.zeros(10, dtype=int)
    with torch.no_grad():
        while n > 0:
            size = min(batch, n)
            n -= size
            copies = image.repeat((size, 1, 1, 1))
            classes = network(copies + torch.randn_like(copies) * SIGMA).argmax(1)
            for label in classes.cpu().numpy():
                counts[label] += 1
    return counts


def show_throughput() -> None:
    images, n, batch = 20, 1_000, 1_000
    task = lenet_task(images, n)
    pixels = task.split.images.float() / 255
    work = [Work(i, Purpose.ESTIMATION, 0, n) for i in range(images)]
    rates: dict[str, list[float]] = {"plain loop": [], "packed": []}
    with sampler_of(task).running() as sampler:
        threads = torch.get_num_threads()
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for i in range(images):
                plain_counts(task.network, pixels[i], n, batch)
            middle = time.perf_counter()
            sampler.counts(work)
            rates["plain loop"].append(images * n / (middle - began))
            rates["packed"].append(images * n / (time.perf_counter() - middle))
    print(f"LeNet, {images} MNIST-sized images of {n} draws, {threads} threads, medians of {ROUNDS} rounds\n")
    print("| | draws/s | ratio |\n|---|---|---|")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"| {name} | {rate:,.0f} | {rate / medians['plain loop']:.2f} |")


def show_memory() -> None:
    print("| n | peak resident MB |\n|---|---|")
    for n in (1_000, 10_000, 100_000):
        done = subprocess.run(
            [sys.executable, __file__, "memory-of", str(n)], capture_output=True, text=True, check=True
        )
        print(f"| {n:,} | {done.stdout.strip()} |")


def memory_of(n: int) -> None:
    task = lenet_task(4, n)
    list(find_smoother("smoothing", task.recipe).certify(task))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("population", "throughput", "memory"):
        parts.add_parser(name)
    parts.add_parser("memory-of").add_argument("n", type=int)
    mnist = parts.add_parser("mnist")
    mnist.add_argument("--out", type=Path, required=True)
    mnist.add_argument("--run", required=True)
    mnist.add_argument("--data", default=None)
    asked = parser.parse_args()
    if asked.part == "population":
        show_population()
    elif asked.part == "throughput":
        show_throughput()
    elif asked.part == "memory":
        show_memory()
    elif asked.part == "memory-of":
        memory_of(asked.n)
    else:
        show_mnist(asked.out, asked.run, asked.data)


main()
