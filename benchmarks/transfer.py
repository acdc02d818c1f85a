"""What CRT saves: the cost of its student against training the same network with SmoothMix, SmoothAdv or MACER.

``python benchmarks/transfer.py --student resnet110 --teacher resnet20 --device cuda``; on two cores for instance
``--dataset mnist --student lenet --teacher lenet --images 2048``.

Every method trains the same network from the same weights on the same images through ``certbench.training.fit``, one
epoch of ``--images`` each, in turn, for ``--rounds`` rounds after one that is not counted; medians are taken. Images are
random: no method's cost depends on them. Every pass holds ``--rows`` noisy images, whatever the number of noises. The
teacher's training with SmoothMix is measured too and stands apart. autograd's anomaly detection is off.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from certbench.contract import SilentReporter, TrainTask
from certbench.data.catalog import DATASETS, DatasetInfo
from certbench.data.dataset import Dataset, Split
from certbench.models import build_network
from certbench.plugins import installed
from certbench.recipe import parse_recipe
from certbench.training.teacher import ready

METHODS: dict[str, dict[str, object]] = {
    "gaussian": {},
    "crt": {"teacher": "measured here"},
    "smoothmix": {"noises": 2, "attack_iterations": 4, "attack_step": 1.0, "mix_weight": 5.0},
    "smoothadv": {"noises": 4, "attack_iterations": 10},
    "macer": {"noises": 16},
}
EPOCHS = {"gaussian": 150, "crt": 200, "smoothmix": 150, "smoothadv": 150, "macer": 150}
"""Released for CRT and SmoothMix on CIFAR-10; the others are given SmoothMix's."""
DEAR = ("smoothmix", "smoothadv", "macer")
STUDENTS = (1, 3, 10)


class Stopwatch(SilentReporter):
    """Keeps the seconds of the last epoch."""

    seconds = 0.0

    def epoch_done(self, epoch: int, epochs: int, seconds: float, figures: Mapping[str, float]) -> None:
        self.seconds = seconds


def random_data(info: DatasetInfo, count: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, info.levels + 1, (count, *info.shape), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(0, info.classes, (count,), generator=generator))
    return Dataset(info, split, split.slice(0, 1), "random")


def epoch_seconds(
    method: str, model: str, teacher: str, data: Dataset, rows: int, device: torch.device
) -> float:
    """Seconds of one epoch of a method on a fresh network."""
    plugins, info = installed(), data.info
    batch = (
        rows // 16 if method == "macer" else rows
    )  # its noises share a pass; the others' take turns, or are one
    recipe = parse_recipe(
        {
            "dataset": info.name,
            "model": model,
            "threat": {"norm": "l2", "sigma": 0.5},
            "method": {"name": method, **METHODS[method]},
            "train": {"epochs": 1, "batch_size": batch, "optimizer": "sgd", "learning_rate": 1e-3},
        },
        method,
    )
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        task = TrainTask(
            recipe=recipe,
            settings=plugins.settings(recipe),
            dataset=data,
            device=device,
            folder=Path(folder),
            build_network=lambda: build_network(model, info, 0).to(device),
            reporter=watch,
            teacher=ready(teacher, build_network(teacher, info, 1), device) if method == "crt" else None,
        )
        plugins.train(task)
    return watch.seconds


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds per epoch of the full training set, by method; ``teacher`` is SmoothMix on the small network."""
    data, device = random_data(DATASETS[args.dataset], args.images), torch.device(args.device)
    runs = {name: (name, args.student) for name in METHODS} | {"teacher": ("smoothmix", args.teacher)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, (method, model) in runs.items():
            found = epoch_seconds(method, model, args.teacher, data, args.rows, device)
            if number:
                seconds[name].append(found)
    scale = data.info.train_size / args.images
    return {name: scale * statistics.median(values) for name, values in seconds.items()}


def report(epoch: dict[str, float]) -> None:
    total = {name: EPOCHS[name] * epoch[name] for name in METHODS}
    teacher = EPOCHS["smoothmix"] * epoch["teacher"]
    print(
        "\n| method | s an epoch | of Gaussian | epochs | hours | hours of CRT's student |\n|---|---|---|---|---|---|"
    )
    for name in METHODS:
        print(
            f"| {name} | {epoch[name]:.1f} | {epoch[name] / epoch['gaussian']:.2f} | {EPOCHS[name]} "
            f"| {total[name] / 3600:.2f} | {total[name] / total['crt']:.2f} x |"
        )
    print(f"\nThe teacher, once: {epoch['teacher']:.1f} s an epoch, {teacher / 3600:.2f} hours.\n")
    print("How many times cheaper CRT is:\n")
    print(f"| | {' | '.join(DEAR)} | mean |\n|{'---|' * (len(DEAR) + 2)}")
    per_epoch = [epoch[name] / epoch["crt"] for name in DEAR]
    lines = {
        "an epoch": per_epoch,
        "a whole training, teacher apart": [total[n] / total["crt"] for n in DEAR],
    }
    for students in STUDENTS:
        cost = total["crt"] + teacher / students
        lines[f"with its share of a teacher of {students}"] = [total[name] / cost for name in DEAR]
    for title, ratios in lines.items():
        shown = " | ".join(f"{ratio:.2f}" for ratio in [*ratios, statistics.mean(ratios)])
        print(f"| {title} | {shown} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="cifar10", choices=sorted(DATASETS))
    parser.add_argument("--student", default="resnet110")
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--images", type=int, default=10_240)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    assert not torch.is_anomaly_enabled()
    where = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    )
    print(f"{args.student} on {args.dataset}, teacher {args.teacher}, {args.images} images a round, {where}")
    report(measure(args))


main()
