"""TinyImageNet's readers, on archives made here; the real subset where CERTBENCH_DATA names a folder that holds it."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from certbench.data.catalog import DATASETS
from certbench.data.fetch import status, verify
from certbench.data.files import load_dataset
from certbench.data.info import DatasetInfo, FileInfo
from certbench.data.names import TINYIMAGENET_NAMES
from certbench.errors import DataError

FIRST, SECOND, OTHER = list(TINYIMAGENET_NAMES)[:3]
TRAIN, VAL = 4, 2


def jpeg(seed: int, mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def members() -> dict[str, bytes]:
    """Two classes of the set and one image of a third, in an order that is not the published one."""
    found = {f"train/{OTHER}/images/{OTHER}_0.JPEG": jpeg(99)}
    for number, wnid in enumerate((SECOND, FIRST)):
        for n in (10, 2, 0, 1):
            mode = "L" if n == 2 else "RGB"
            found[f"train/{wnid}/images/{wnid}_{n}.JPEG"] = jpeg(100 * number + n, mode)
        found[f"train/{wnid}/{wnid}_boxes.txt"] = b"boxes"
    lines = []
    for n, wnid in ((10, FIRST), (9, SECOND), (3, FIRST), (1, SECOND), (2, OTHER)):
        found[f"val/images/val_{n}.JPEG"] = jpeg(1000 + n)
        lines.append(f"val_{n}.JPEG\t{wnid}\t0\t0\t9\t9\n")
    found["val/val_annotations.txt"] = "".join(lines).encode()
    found["test/images/test_0.JPEG"] = jpeg(5)
    return found


def zipped(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny-imagenet-200/", "")
        for name, content in members.items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
    return buffer.getvalue()


def tarred(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(f"tiny-imagenet-200/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def describe(contents: Mapping[str, bytes], name: str = "tinyimagenet") -> DatasetInfo:
    files = tuple(FileInfo(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in contents.items())
    names = tuple(TINYIMAGENET_NAMES[wnid] for wnid in sorted((FIRST, SECOND)))
    return replace(
        DATASETS[name],
        classes=2,
        train_size=2 * TRAIN,
        test_size=2 * VAL,
        class_names=names,
        files=files,
        digest="",
        validation_per_class=1,
    )


def lay_out(root: Path, members: Mapping[str, bytes], layout: str) -> DatasetInfo:
    """The members in one of the forms that are read, and the entry that describes it."""
    if layout == "folder":
        for name, content in members.items():
            path = root / "tiny-imagenet-200" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return describe({"tiny-imagenet-200.zip": b"not there"})
    if layout == "zip":
        contents = {"tiny-imagenet-200.zip": zipped(members)}
    else:
        halves = [{n: c for n, c in members.items() if (FIRST in n) == half} for half in (True, False)]
        annotations = halves[1].pop("val/val_annotations.txt", b"")
        contents = {"a.tar.gz": tarred(halves[0]), "b.tar.gz": tarred(halves[1])}
        contents["val_annotations.txt"] = annotations
    for name, content in contents.items():
        (root / name).write_bytes(content)
    return describe(contents)


@pytest.mark.parametrize("layout", ["zip", "tar", "folder"])
def test_images_come_in_published_order_from_every_layout(
    members: dict[str, bytes], tmp_path: Path, layout: str
) -> None:
    info = lay_out(tmp_path, members, layout)
    dataset = load_dataset(info, tmp_path)
    wnids = sorted((FIRST, SECOND))
    names = [f"train/{w}/images/{w}_{n}.JPEG" for w in wnids for n in (0, 1, 2, 10)]
    for position, name in enumerate(names):
        expected = np.asarray(Image.open(io.BytesIO(members[name])).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(dataset.train.images[position].numpy(), expected), name
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4
    assert dataset.test.labels.tolist() == [wnids.index(w) for w in (SECOND, FIRST, SECOND, FIRST)]
    first = np.asarray(Image.open(io.BytesIO(members["val/images/val_1.JPEG"]))).transpose(2, 0, 1)
    assert np.array_equal(dataset.test.images[0].numpy(), first)
    assert verify(info, tmp_path) == []
    assert load_dataset(info, tmp_path).digest == dataset.digest
    assert {row.state for row in status(tmp_path, {"tinyimagenet": info})} == {"complete"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop(f"train/{FIRST}/images/{FIRST}_1.JPEG"), "has 3 training images where 4"),
        (
            lambda m: m.update({f"train/{FIRST}/images/{FIRST}_7.JPEG": jpeg(1)}),
            "has 5 training images where 4",
        ),
        (lambda m: m.pop("val/images/val_3.JPEG"), "has 1 validation images where 2"),
        (
            lambda m: m.pop("val/val_annotations.txt"),
            "has 0 validation images where 2|cannot read .*val_annotations",
        ),
        (
            lambda m: m.update({f"train/{FIRST}/images/{SECOND}_7.JPEG": jpeg(1)}),
            "lies in the folder of another class",
        ),
        (
            lambda m: m.update({f"train/{FIRST}/images/{FIRST}_1.JPEG": jpeg(1)[:300]}),
            rf"image train/{FIRST}/images/{FIRST}_1\.JPEG is broken",
        ),
        (lambda m: m.update({"val/images/val_3.JPEG": b"no image"}), r"image val_3\.JPEG is broken"),
        (lambda m: m.update({"val/images/val_3.JPEG": jpeg(1, size=(32, 64))}), "is 32 x 64, not 64 x 64"),
    ],
)
@pytest.mark.parametrize("layout", ["zip", "folder"])
def test_what_is_wrong_is_named(
    members: dict[str, bytes], tmp_path: Path, layout: str, change: object, words: str
) -> None:
    assert callable(change)
    change(members)
    info = lay_out(tmp_path, members, layout)
    with pytest.raises(DataError, match=words) as error:
        load_dataset(info, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("layout", ["zip", "tar"])
def test_a_truncated_archive_is_named(members: dict[str, bytes], tmp_path: Path, layout: str) -> None:
    info = lay_out(tmp_path, members, layout)
    name = info.files[0].name
    content = (tmp_path / name).read_bytes()[:-100]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is damaged: [\d,]+ bytes where"):
        load_dataset(info, tmp_path)
    published = replace(
        info, files=(FileInfo(name, len(content), hashlib.sha256(content).hexdigest()), *info.files[1:])
    )
    with pytest.raises(DataError, match=f"{name} is not the published archive"):
        load_dataset(published, tmp_path)


def test_members_with_other_names_are_never_read(members: dict[str, bytes], tmp_path: Path) -> None:
    """Nothing is written, so a hostile name leads nowhere; it is passed over."""
    evil = {f"../../train/{FIRST}/images/{FIRST}_3.JPEG": jpeg(3), "train/../../x": b"x"}
    info = lay_out(tmp_path, members | evil, "zip")
    assert len(load_dataset(info, tmp_path).train) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "tiny-imagenet-200.zip"]


def test_the_first_fifty_classes_are_as_published() -> None:
    info = DATASETS["tinyimagenet-50"]
    assert info.class_names[sorted(list(TINYIMAGENET_NAMES)[:50]).index("n02124075")] == "Egyptian cat"
    assert "subset" in info.title


def test_the_real_subset_loads_as_pinned() -> None:
    if not os.environ.get("CERTBENCH_DATA"):
        pytest.skip("CERTBENCH_DATA names no data folder")
    if {row.name: row.state for row in status()}["tinyimagenet-50"] != "complete":
        pytest.skip("no tinyimagenet-50 in the folder that CERTBENCH_DATA names")
    dataset = load_dataset("tinyimagenet-50")
    assert dataset.digest == dataset.info.digest
    assert torch.bincount(dataset.train.labels).tolist() == [500] * 50
    assert torch.bincount(dataset.test.labels).tolist() == [50] * 50
    assert len(dataset.validation) == 2500
