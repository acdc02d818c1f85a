"""What loading and augmentation cost: caches, batches beside torchvision's, photographs decoded per core.

``python benchmarks/data.py --data DIR [--imagenet FOLDER]``. DIR holds MNIST and CIFAR-10; FOLDER holds JPEG files of
ImageNet's size, in any subfolders. Loading is timed from the cache, which a first load writes. Batches of both libraries
are interleaved in one process and medians are taken; torchvision decodes nothing either, its images are in memory. With
a GPU, the speed at which it trains ResNet-50 says how many cores must decode for it.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from certbench.data.batches import Batches
from certbench.data.catalog import DATASETS
from certbench.data.dataset import Dataset
from certbench.data.files import load_dataset
from certbench.data.images import decode_image
from certbench.data.resized import QUALITY, SIDE
from certbench.data.stream import random_crop
from certbench.models import build_network
from certbench.recipe import Augmentation

BATCH, WORKERS, ROUNDS = 128, 2, 3
LIMITS = {"mnist": 2.0, "cifar10": 6.0}
SMOOTHMIX = Augmentation(flip=True, crop_padding=4, crop_fill=0.0)
ABSTRACTION = Augmentation(
    flip=True,
    crop_padding=4,
    crop_fill=0.5,
    erase=0.5,
    erase_area=(0.04, 0.2),
    erase_aspect=(0.5, 2.0),
    erase_fill=0.5,
)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def drain(batches: Iterator[object]) -> int:
    return sum(1 for _ in batches)


def rate(batches: Iterator[object]) -> float:
    """Batches a second."""
    began = time.perf_counter()
    return drain(batches) / (time.perf_counter() - began)


# Loading -------------------------------------------------------------------------------------------------------------


def from_cache(name: str, root: Path) -> float:
    """Seconds to map the cache, check its digest and go through one epoch of augmented batches."""
    load_dataset(name, root)

    def work() -> None:
        dataset = load_dataset(name, root)
        drain(Batches(dataset.train, dataset.info, BATCH, 0, True, "cpu").epoch(0))

    return statistics.median(seconds(work) for _ in range(ROUNDS))


# Batches beside torchvision's ----------------------------------------------------------------------------------------


class InMemory(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """As torchvision's CIFAR10 does it: one image at a time through the transform."""

    def __init__(self, dataset: Dataset, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.labels = dataset.train.images, dataset.train.labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]


def theirs(dataset: Dataset, how: Augmentation) -> DataLoader[tuple[Tensor, Tensor]]:
    mode = {"padding_mode": "edge"} if how.crop_fill is None else {"fill": how.crop_fill}
    erase = v2.RandomErasing(how.erase, how.erase_area, how.erase_aspect, how.erase_fill)
    steps = [
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomHorizontalFlip(),
        *([erase] if how.erase else []),
        v2.RandomCrop(32, how.crop_padding, **mode),
    ]
    images = InMemory(dataset, v2.Compose(steps))
    return DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)


def beside_torchvision(root: Path) -> None:
    dataset = load_dataset("cifar10", root)
    kinds = {"Fast IBP": dataset.info.augmentation, "SmoothMix": SMOOTHMIX, "abstraction": ABSTRACTION}
    print(
        "\n| CIFAR-10, augmentation of | ours, batches/s | torchvision v2, 2 workers | ratio |\n|---|---|---|---|"
    )
    for name, how in kinds.items():
        ours, loader = Batches(dataset.train, dataset.info, BATCH, 0, how, "cpu"), theirs(dataset, how)
        drain(iter(loader))  # the workers start
        rounds = [(rate(ours.epoch(number)), rate(iter(loader))) for number in range(ROUNDS)]
        us, them = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(f"| {name} | {us:,.0f} | {them:,.0f} | {us / them:.1f} |")


# Photographs ---------------------------------------------------------------------------------------------------------


def photographs(folder: Path) -> None:
    contents = [path.read_bytes() for path in sorted(folder.rglob("*.JPEG"))]
    scaled = [smaller(content) for content in contents]
    torch.set_num_threads(1)
    how = DATASETS["imagenet"].augmentation
    print(
        f"\n{len(contents)} photographs, one core:\n\n| training images | decoded and cropped, images/s |\n|---|---|"
    )
    rates = {}
    for name, files in {"as published": contents, "scaled down once": scaled}.items():

        def work(files: list[bytes] = files) -> None:
            for content in files:
                random_crop(decode_image("photograph", content), 224, how)

        rates[name] = len(files) / statistics.median(seconds(work) for _ in range(ROUNDS))
        print(f"| {name} | {rates[name]:,.0f} |")
    if not torch.cuda.is_available():
        print("\nNo GPU: the speed of training was not measured.")
        return
    speed = training_speed()
    print(
        f"\n{torch.cuda.get_device_name()} trains ResNet-50 at {speed:,.0f} images/s (float32, batch {BATCH}):"
    )
    for name, rate in rates.items():
        print(f"- {name}: {speed / rate:.1f} cores feed it")


def smaller(content: bytes) -> bytes:
    image = decode_image("photograph", content)
    factor = min(1.0, SIDE / min(image.size))
    image = image.resize(
        (round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR
    )
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def training_speed() -> float:
    """Images a second of a clean training step, which is what feeding must keep up with."""
    network = build_network("resnet50", DATASETS["imagenet"], 0).cuda().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    images, labels = torch.rand(BATCH, 3, 224, 224).cuda(), torch.randint(0, 1000, (BATCH,)).cuda()

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        torch.cuda.synchronize()

    steps(5)
    return 20 * BATCH / seconds(lambda: steps(20))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--imagenet", type=Path)
    arguments = parser.parse_args()
    print(
        f"{torch.get_num_threads()} threads, batch {BATCH}\n\n| from the cache | seconds | limit |\n|---|---|---|"
    )
    for name, limit in LIMITS.items():
        print(f"| {name}: load, digest, one epoch | {from_cache(name, arguments.data):.2f} | {limit:g} |")
    beside_torchvision(arguments.data)
    if arguments.imagenet:
        photographs(arguments.imagenet)


if __name__ == "__main__":
    main()
