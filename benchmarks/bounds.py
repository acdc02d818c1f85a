"""What bounds cost: training steps, verdicts, radii, linear bounds under a memory cap, and float soundness.

    python benchmarks/bounds.py [PART...] [--device cuda] [--rounds N] [--batch N] [--images N] [--no-compiler]

Parts, all by default, each a few minutes on two cores:

* ``step-small``, ``step-cnn7``: one IBP training step (clean pass, bounds, margins, robust loss, gradients) of the small
  MNIST network and of CNN-7 on CIFAR-10 shapes: by the engine, by the engine under ``torch.compile``, and by a plain
  interval pass of three convolutions per layer. Variants take turns in one process; figures are medians. Peak memory is
  that of a process of its own that does two steps.
* ``verdicts``, ``radii``: ``--images`` MNIST-like images (10,000) by interval bounds in float64, both guarantees.
* ``crown-memory``: CROWN on CNN-7 and CIFAR-10 shapes under the memory cap, with the peak of a few chunks.
* ``sound``: what float soundness costs, in time and in certified images, for intervals and linear bounds.

The last figures are kept in ``bounds.md``.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable

import certified_images
import torch
import training_steps
from certified_images import Settings

PARTS: dict[str, Callable[[Settings], list[str]]] = {
    "step-small": lambda s: training_steps.table("mnist", "cnn-small", s.batch or 256, 0.1, 2 * s.rounds, s),
    "step-cnn7": lambda s: training_steps.table(
        "cifar10", "cnn7", s.batch or (128 if s.on_gpu else 16), 8 / 255, s.rounds, s
    ),
    "verdicts": certified_images.verdicts,
    "radii": certified_images.radii,
    "crown-memory": certified_images.crown_memory,
    "sound": certified_images.soundness,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of the interleaved variants")
    parser.add_argument("--batch", type=int, help="images per training step, in place of each network's own")
    parser.add_argument("--images", type=int, default=10_000, help="images of verdicts and radii")
    parser.add_argument("--no-compiler", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    with_compiler = not arguments.no_compiler and shutil.which("g++") is not None
    settings = Settings(
        torch.device(arguments.device), arguments.rounds, arguments.batch, arguments.images, with_compiler
    )
    place = torch.cuda.get_device_name() if settings.on_gpu else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {place}\n", flush=True)
    for part in arguments.parts or PARTS:
        print("\n".join([*PARTS[part](settings), ""]), flush=True)


if __name__ == "__main__":
    main()
