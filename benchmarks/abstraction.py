"""What certifying a quantised classifier costs: interval bounds over cells, enumeration, linear bounds.

    python benchmarks/abstraction.py [--quick]

DM-Small on MNIST shapes with n = 9 and first weights, images made up: mostly black, a hundred grey pixels each, as digits
have. Interval bounds of 10,000 images at 0.1 should take under 20 s on two cores. The last figures are kept in
``abstraction.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from certbench.bounds import PRECISIONS
from certbench.data.catalog import DATASETS
from certbench_abstraction.bounds import CellBounds
from certbench_abstraction.cells import Cells, reachable
from certbench_abstraction.complete import enumerate_cells
from certbench_abstraction.network import build_classifier

CHUNK, EPS, GREY = 250, 0.1, 100


def images(count: int) -> Tensor:
    pixels = torch.zeros(count, 784)
    place = torch.rand(count, 784).argsort(1)[:, :GREY]
    pixels.scatter_(1, place, torch.randint(1, 255, (count, GREY)) / 255)
    return pixels.view(count, 1, 28, 28)


def timed(what: str, unit: str, count: int, work: Callable[[], object]) -> None:
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    print(f"{what}: {seconds:.1f} s for {count}, {count / seconds:.0f} {unit} per second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few images, to see that it runs")
    quick = parser.parse_args().quick
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    count, passes, few = (500, 2**12, 8) if quick else (10_000, 2**16, 100)
    network = build_classifier("dm-small", DATASETS["mnist"], 9, 0).eval()
    pixels = images(count)
    labels = torch.zeros(count, dtype=torch.int64)
    with torch.no_grad():
        network[1][-1].bias[0] += 100  # class 0 everywhere, so that every enumeration goes to its end

    with torch.no_grad(), ThreadPoolExecutor(cores) as workers:
        for name, precision in (("real_arith", None), ("float_sound", PRECISIONS["float32"])):
            bounds = CellBounds(network, (1, 28, 28), precision)
            work = partial(interval, bounds, pixels, labels)
            work(0)
            parts = range(0, count, CHUNK)
            timed(
                f"cell IBP, {name}, {cores} cores",
                "images",
                count,
                lambda w=work, p=parts: [*workers.map(w, p)],
            )
            cells = free(network[0].index(pixels[:1]), passes.bit_length() - 1)
            again = partial(enumerate_cells, bounds, cells, labels[:1])
            timed(f"enumeration, {name}, one core", "forward passes", int(cells.count), again)
        bounds = CellBounds(network, (1, 28, 28), None)
        cells = reachable(pixels[:few].double(), torch.full((few,), EPS, dtype=torch.float64), network[0])
        for kind in ("crown-ibp", "zonotope"):
            timed(f"{kind}, one core", "images", few, partial(bounds.linear, cells, labels[:few], kind))


def interval(bounds: CellBounds, pixels: Tensor, labels: Tensor, at: int) -> None:
    """Coupled interval bounds of one chunk."""
    part = pixels[at : at + CHUNK].double()
    cells = reachable(part, torch.full((len(part),), EPS, dtype=torch.float64), bounds.abstraction)
    with torch.no_grad():
        bounds.interval(cells, labels[at : at + CHUNK])


def free(k: Tensor, pixels: int) -> Cells:
    """Two cells each for the first pixels."""
    hi = k.clone()
    hi.view(-1)[:pixels] += 1
    return Cells(k, hi.clamp_max(8))


main()
