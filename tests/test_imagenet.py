"""ImageNet's layout made small: 1,000 classes in the official archives; unpacking, listing, streaming, scaling down."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from certbench.data import imagenet_files
from certbench.data.batches import training_batches
from certbench.data.catalog import DATASETS
from certbench.data.dataset import Dataset
from certbench.data.fetch import fetch, status, verify
from certbench.data.files import load_dataset
from certbench.data.info import DatasetInfo
from certbench.data.manifest import read_manifest
from certbench.data.stream import Stream, StreamedBatches, middle
from certbench.errors import DataError, UsageError
from certbench.recipe import Augmentation

WNIDS = [f"n{number:08}" for number in range(10_000, 13_000, 3)]
SIDE = 28
INFO = replace(
    DATASETS["imagenet"], shape=(3, SIDE, SIDE), train_size=1002, test_size=1001, validation_per_class=0
)
RESIZED = replace(INFO, name="imagenet-256", reader=DATASETS["imagenet-256"].reader)


def jpeg(mode: str = "RGB", size: tuple[int, int] = (20, 16), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def tarred(members: dict[str, bytes], packed: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if packed else "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


PLAIN, GREY, CMYK, LARGE = jpeg(), jpeg("L"), jpeg("CMYK"), jpeg(size=(400, 300))


def train_images() -> dict[str, dict[str, bytes]]:
    """One image per class; the first class also has a grey and a CMYK one, the second is large."""
    images = {wnid: {f"{wnid}_7.JPEG": PLAIN} for wnid in WNIDS}
    images[WNIDS[0]] |= {f"{WNIDS[0]}_10.JPEG": GREY, f"{WNIDS[0]}_9.JPEG": CMYK}
    images[WNIDS[1]] = {f"{WNIDS[1]}_7.JPEG": LARGE}
    return images


def devkit() -> bytes:
    """The classes in an order of their own, with inner nodes of the hierarchy behind them."""
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, wnid, "a class", 0) for number, wnid in enumerate(reversed(WNIDS), 1)]
    synsets = np.array([*rows, (1001, "n99999999", "a kind of classes", 5)], dtype=kind)
    table = io.BytesIO()
    savemat(table, {"synsets": synsets})
    truth = "".join(f"{number}\n" for number in [*range(1, 1001), 1])
    folder = "ILSVRC2012_devkit_t12/data"
    return tarred(
        {
            "ILSVRC2012_devkit_t12/readme.txt": b"hello",
            f"{folder}/meta.mat": table.getvalue(),
            f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        },
        packed=True,
    )


@pytest.fixture(scope="module")
def official() -> dict[str, bytes]:
    classes = {f"{wnid}.tar": tarred(images) for wnid, images in train_images().items()}
    val = {f"ILSVRC2012_val_{n:08}.JPEG": PLAIN for n in range(1, 1002)}
    return {
        "ILSVRC2012_img_train.tar": tarred(classes),
        "ILSVRC2012_img_val.tar": tarred(val),
        "ILSVRC2012_devkit_t12.tar.gz": devkit(),
    }


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, dict[str, bytes]], None]:
    """Puts archives into a folder and makes their MD5 sums the published ones."""

    def put(folder: Path, archives: dict[str, bytes]) -> None:
        folder.mkdir(parents=True)
        for name, content in archives.items():
            (folder / name).write_bytes(content)
        for constant in ("TRAIN_ARCHIVE", "VAL_ARCHIVE", "DEVKIT"):
            name = getattr(imagenet_files, constant)[0]
            md5 = hashlib.md5(archives.get(name, b""), usedforsecurity=False).hexdigest()
            monkeypatch.setattr(imagenet_files, constant, (name, md5))

    return put


@pytest.fixture(scope="module")
def prepared(official: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with everything fetched, scaled images included; not to be changed."""
    root = tmp_path_factory.mktemp("imagenet")
    folder = root / "imagenet"
    with pytest.MonkeyPatch.context() as patch:
        folder.mkdir()
        for constant in ("TRAIN_ARCHIVE", "VAL_ARCHIVE", "DEVKIT"):
            name = getattr(imagenet_files, constant)[0]
            (folder / name).write_bytes(official[name])
            patch.setattr(
                imagenet_files,
                constant,
                (name, hashlib.md5(official[name], usedforsecurity=False).hexdigest()),
            )
        fetch(RESIZED, root)
    return root


def test_archives_become_folders_in_the_order_of_image_folder(prepared: Path) -> None:
    dataset = load_dataset(INFO, prepared)
    folder = prepared / "imagenet"
    assert sorted(path.name for path in (folder / "train").iterdir()) == WNIDS
    assert isinstance(dataset.train, Stream)
    for part, manifest in (
        ("train", dataset.train.manifest),
        ("val", read_manifest(folder / "val.manifest")),
    ):
        theirs = ImageFolder(str(folder / part))
        assert [str(folder / name.decode()) for name in manifest.files] == [
            path for path, _ in theirs.samples
        ]
        assert manifest.labels.tolist() == theirs.targets
    assert dataset.train.labels[:4].tolist() == [0, 0, 0, 1]
    assert {row.state for row in status(prepared, {"imagenet": INFO, "imagenet-256": RESIZED})} == {
        "complete"
    }
    assert verify(INFO, prepared) == []
    assert verify(RESIZED, prepared) == []


def test_validation_images_get_the_classes_of_the_development_kit(prepared: Path) -> None:
    """Image 1 has class 1 of the kit, which is the last WordNet id here, and image 1000 the first."""
    val = prepared / "imagenet/val"
    assert (val / WNIDS[-1] / "ILSVRC2012_val_00000001.JPEG").is_file()
    assert (val / WNIDS[-1] / "ILSVRC2012_val_00001001.JPEG").is_file()
    assert (val / WNIDS[0] / "ILSVRC2012_val_00001000.JPEG").is_file()


def test_test_images_are_scaled_and_cut_as_torchvision_does(prepared: Path) -> None:
    dataset = load_dataset(INFO, prepared)
    assert dataset.test.images.shape == (1001, 3, SIDE, SIDE)
    transform = v2.Compose([v2.Resize(round(SIDE * 256 / 224)), v2.CenterCrop(SIDE), v2.PILToTensor()])
    for content in (PLAIN, GREY, CMYK, LARGE):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        assert torch.equal(middle(image, SIDE), transform(image))
    expected = transform(Image.open(io.BytesIO(PLAIN)))
    assert torch.equal(dataset.test.images[17], expected)
    again = load_dataset(INFO, prepared)
    assert torch.equal(again.test.images, dataset.test.images)
    assert (prepared / "cache/imagenet-test.safetensors").is_file()


def first_batches(dataset: Dataset, workers: int, seed: int = 3, count: int = 3) -> list[torch.Tensor]:
    assert isinstance(dataset.train, Stream)
    batches = StreamedBatches(dataset.train, dataset.info, 100, seed, True, "cpu", workers)
    assert len(batches) == 11
    found = []
    for pixels, labels in batches.epoch(2):
        found += [pixels, labels.float()]
        if len(found) == 2 * count:
            break
    return found


def test_batches_do_not_depend_on_the_number_of_workers(prepared: Path) -> None:
    dataset = load_dataset(INFO, prepared)
    state = torch.get_rng_state()
    alone = first_batches(dataset, 0)
    assert torch.equal(torch.get_rng_state(), state)
    helped = first_batches(dataset, 2)
    assert alone[0].shape == (100, 3, SIDE, SIDE)
    assert alone[0].dtype == torch.float32
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(alone[1], first_batches(dataset, 0, seed=4, count=1)[1])


def test_every_image_comes_once(prepared: Path) -> None:
    dataset = load_dataset(INFO, prepared)
    batches = training_batches(dataset, 128, 0, Augmentation(), "cpu")
    labels = torch.cat([labels for _, labels in batches.epoch(0)])
    assert torch.bincount(labels).tolist() == [3] + [1] * 999
    assert isinstance(dataset.train, Stream)
    with pytest.raises(UsageError, match="takes flip and resized_crop"):
        StreamedBatches(dataset.train, INFO, 8, 0, Augmentation(crop_padding=2), "cpu")


def test_scaled_shards_hold_the_same_images_smaller(prepared: Path) -> None:
    whole, scaled = load_dataset(INFO, prepared), load_dataset(RESIZED, prepared)
    assert isinstance(whole.train, Stream)
    assert isinstance(scaled.train, Stream)
    assert torch.equal(whole.train.labels, scaled.train.labels)
    assert whole.digest != scaled.digest
    assert scaled.train.image(3).size == (341, 256)
    assert scaled.train.image(0).size == whole.train.image(0).size == (20, 16)
    assert torch.equal(whole.test.images, scaled.test.images)
    with tarfile.open(prepared / "imagenet/resized-256/train-0000.tar") as tar:
        assert len(tar.getnames()) == 1002
    for pixels, _ in StreamedBatches(scaled.train, RESIZED, 400, 0, True, "cpu", 0).epoch(0):
        assert pixels.shape[1:] == (3, SIDE, SIDE)


def test_held_out_images_of_a_stream(prepared: Path) -> None:
    info = replace(INFO, validation_per_class=1).held_out()
    dataset = load_dataset(info, prepared)
    assert isinstance(dataset.train, Stream)
    assert (len(dataset.train), len(dataset.test)) == (2, 1000)
    assert dataset.test.labels.tolist() == list(range(1000))
    assert dataset.digest != load_dataset(INFO, prepared).digest


# What may be wrong


def copied(prepared: Path, tmp_path: Path) -> Path:
    """A folder of its own with the same files, of which some may be replaced."""
    for source in (prepared / "imagenet").rglob("*"):
        if source.is_file() and source.suffix in {".JPEG", ".manifest"} and "resized" not in str(source):
            target = tmp_path / source.relative_to(prepared)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, target)
    return tmp_path / "imagenet"


def replace_file(path: Path, content: bytes) -> None:
    path.unlink()  # it is a link
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "workers"), [("broken", 1), ("cut", 0), ("gone", 0)])
def test_a_broken_image_is_named_and_not_skipped(
    prepared: Path, tmp_path: Path, damage: str, workers: int
) -> None:
    folder = copied(prepared, tmp_path)
    path = folder / "train" / WNIDS[500] / f"{WNIDS[500]}_7.JPEG"
    broken = PLAIN[:300] + bytes(len(PLAIN) - 300) if damage == "broken" else PLAIN[:-50]
    replace_file(path, broken)
    if damage == "gone":
        path.unlink()
    words = {"broken": "is broken", "cut": "is cut off after", "gone": "cannot read image"}[damage]
    dataset = load_dataset(INFO, tmp_path)
    assert isinstance(dataset.train, Stream)
    with pytest.raises(DataError, match=f"{words}|{damage}") as error:
        for _ in StreamedBatches(dataset.train, INFO, 100, 0, True, "cpu", workers).epoch(0):
            pass
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert any(str(path) in line for line in verify(INFO, tmp_path))


def test_folders_that_are_not_imagenets_are_named(prepared: Path, tmp_path: Path) -> None:
    folder = copied(prepared, tmp_path)
    for name in ("train.manifest", "val.manifest"):
        (folder / name).unlink()
    assert {row.state for row in status(tmp_path, {"imagenet": INFO})} == {"incomplete"}
    with pytest.raises(
        DataError, match=r"imagenet is not ready .* no train\.manifest; .*certbench data fetch imagenet"
    ):
        load_dataset(INFO, tmp_path)

    def refused(words: str) -> None:
        with pytest.raises(DataError, match=words) as error:
            fetch(INFO, tmp_path)
        assert "\n" not in str(error.value)
        assert not (folder / "train.manifest").exists()

    twin = folder / "train" / f"{WNIDS[3]} (1)"
    twin.mkdir()
    refused(
        rf"{WNIDS[3]} \(1\) is not named as a class of ImageNet \(a second folder of class {WNIDS[3]}\?\)"
    )
    twin.rmdir()
    foreign = folder / "train" / "airplane"
    foreign.mkdir()
    refused("airplane is not named as a class")
    foreign.rename(folder / "train" / "n99999999")
    refused("has 1,001 class folders where 1,000 were expected")
    (folder / "train" / "n99999999").rmdir()
    stray = folder / "train" / WNIDS[5] / f"{WNIDS[6]}_8.JPEG"
    stray.write_bytes(PLAIN)
    refused("is named after another class than its folder")
    stray.unlink()
    fetch(INFO, tmp_path)
    assert len(load_dataset(INFO, tmp_path).train) == 1002


def test_another_number_of_images_is_refused(prepared: Path) -> None:
    with pytest.raises(DataError, match="1,002 training images of 1,000 classes where 1,003 of 1,000"):
        load_dataset(replace(INFO, train_size=1003), prepared)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0\t5\t../../etc/x", "is broken"),
        ("0\t5\t/etc/x", "is broken"),
        ("0\tmany\tx/y", "is broken"),
        ("0", "broken"),
    ],
)
def test_a_list_that_leads_elsewhere_is_refused(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "train.manifest").write_text(line)
    with pytest.raises(DataError, match=words):
        read_manifest(tmp_path / "train.manifest")


PublishFixture = Callable[[Path, dict[str, bytes]], None]


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ("../n00010000.tar", "does not belong there"),
        ("/n00010000.tar", "does not belong there"),
        ("n00010000.exe", "does not belong there"),
        ("n00010000.tar", "lies in the archive of class n00010000"),
    ],
)
def test_hostile_training_archives_leave_nothing(
    official: dict[str, bytes], publish: PublishFixture, tmp_path: Path, member: str, words: str
) -> None:
    evil = tarred({member: tarred({f"{WNIDS[1]}_1.JPEG": PLAIN})})
    publish(tmp_path / "imagenet", official | {"ILSVRC2012_img_train.tar": evil})
    with pytest.raises(DataError, match=words):
        fetch(INFO, tmp_path)
    assert not (tmp_path / "imagenet/train").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imagenet"]


def test_a_link_in_an_archive_is_refused(publish: PublishFixture, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo(f"{WNIDS[0]}.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    publish(tmp_path / "imagenet", {"ILSVRC2012_img_train.tar": buffer.getvalue()})
    with pytest.raises(DataError, match="does not belong there"):
        fetch(INFO, tmp_path)


def test_a_truncated_or_altered_archive_is_named(
    official: dict[str, bytes], publish: PublishFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "imagenet"
    publish(folder, official)
    path = folder / "ILSVRC2012_img_train.tar"
    path.write_bytes(official[path.name][:-20_000])
    with pytest.raises(DataError, match=r"img_train\.tar is damaged: MD5"):
        fetch(INFO, tmp_path)
    monkeypatch.setattr(imagenet_files, "check_md5", lambda *_: None)
    path.write_bytes(official[path.name][: len(official[path.name]) // 2 + 100])
    with pytest.raises(DataError, match=r"img_train\.tar is damaged"):
        fetch(INFO, tmp_path)
    assert not (folder / "train").exists()
    path.write_bytes(official[path.name])
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match="is not the development kit"):
        fetch(INFO, tmp_path)
    assert (folder / "train").is_dir()
    assert not (folder / "val").exists()


def test_missing_archives_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"put ILSVRC2012_img_train\.tar, .* into .*/imagenet and run this again"
    ):
        fetch(INFO, tmp_path)
    row = status(tmp_path, {"imagenet": INFO})[0]
    assert row.state == "missing"
    assert "certbench data fetch imagenet" in row.next_step


# The real sample


def test_the_real_sample_is_read(tmp_path: Path) -> None:
    """The reader, the transforms and the order of classes only: 167 photographs allow no accuracy."""
    sample = Path(os.environ.get("CERTBENCH_DATA", "nowhere")) / "imagenet_sample/imagenet_sample_167.tar"
    if not sample.is_file():
        pytest.skip("CERTBENCH_DATA names no folder with the sample of ImageNet")
    with tarfile.open(sample) as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet_sample").rename(tmp_path / "imagenet/train")
    (tmp_path / "imagenet/val").symlink_to(tmp_path / "imagenet/train")
    info: DatasetInfo = replace(DATASETS["imagenet"], classes=167, train_size=167, test_size=167)
    fetch(info, tmp_path)
    dataset = load_dataset(info, tmp_path)
    assert isinstance(dataset.train, Stream)
    assert dataset.test.images.shape == (167, 3, 224, 224)
    assert dataset.train.labels.tolist() == list(range(167))
    assert dataset.train.manifest.wnids[0] == "n01440764"
    pixels, labels = next(iter(StreamedBatches(dataset.train, info, 16, 0, True, "cpu", 0).epoch(0)))
    assert pixels.shape == (16, 3, 224, 224)
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert len(labels.unique()) == 16
