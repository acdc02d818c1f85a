"""Finding, verifying, reading and fetching data sets, on tiny ones made here; real ones where CERTBENCH_DATA is set."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.datasets
from click.testing import CliRunner

from certbench.cli import data as cli_data
from certbench.contract import SilentReporter
from certbench.data import fetch as fetching
from certbench.data import formats, places
from certbench.data.archives import extract
from certbench.data.catalog import DATASETS, DatasetInfo, FileInfo, dataset_info
from certbench.data.dataset import Split, dataset_digest, image_digests, to_pixels
from certbench.data.fetch import fetch, status, verify
from certbench.data.files import load_dataset
from certbench.data.formats import restricted_unpickle
from certbench.data.info import function
from certbench.data.splits import choose_per_class
from certbench.errors import DataError, FoundError, UsageError

# Tiny data sets under the real names


def idx(array: np.ndarray) -> bytes:
    dimensions = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + dimensions + array.astype(np.uint8).tobytes()


def batch_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    """A CIFAR batch with NumPy's old module name, as the published files have it."""
    content = {b"data": images.reshape(len(images), -1), b"labels": labels.tolist()}
    return pickle.dumps(content, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def describe(name: str, contents: dict[str, bytes], train: Split, test: Split) -> DatasetInfo:
    entries = tuple(
        FileInfo(file, len(content), hashlib.sha256(content).hexdigest())
        for file, content in contents.items()
    )
    channels, height, width = train.images.shape[1:]
    return replace(
        DATASETS[name],
        files=entries,
        digest=dataset_digest(name, train, test),
        shape=(channels, height, width),
        train_size=len(train),
        test_size=len(test),
    )


def random_split(count: int, shape: tuple[int, int, int], seed: int) -> Split:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, *shape), dtype=np.uint8)
    return Split(torch.from_numpy(images), torch.from_numpy(random.integers(0, 10, count)))


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """File contents of a tiny MNIST that the catalogue now describes."""
    train, test = random_split(30, (1, 4, 5), 0), random_split(11, (1, 4, 5), 1)
    contents = {
        "train-images-idx3-ubyte": idx(train.images[:, 0].numpy()),
        "train-labels-idx1-ubyte": idx(train.labels.numpy()),
        "t10k-images-idx3-ubyte": idx(test.images[:, 0].numpy()),
        "t10k-labels-idx1-ubyte": idx(test.labels.numpy()),
    }
    monkeypatch.setitem(DATASETS, "mnist", describe("mnist", contents, train, test))
    return contents


@pytest.fixture
def cifar10(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """File contents of a tiny CIFAR-10 that the catalogue now describes."""
    train, test = random_split(20, (3, 4, 4), 2), random_split(6, (3, 4, 4), 3)
    images, labels = train.images.numpy(), train.labels.numpy()
    contents = {
        f"data_batch_{i + 1}": batch_pickle(images[4 * i : 4 * i + 4], labels[4 * i : 4 * i + 4])
        for i in range(5)
    }
    contents["test_batch"] = batch_pickle(test.images.numpy(), test.labels.numpy())
    contents["batches.meta"] = b"names"
    monkeypatch.setitem(DATASETS, "cifar10", describe("cifar10", contents, train, test))
    return contents


def put(folder: Path, contents: dict[str, bytes], packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


# The catalogue


def test_listing_data_sets_imports_neither_torch_nor_sklearn() -> None:
    modules = "certbench.data.catalog, certbench.data.places, certbench.data.fetch, certbench.cli.data"
    code = (
        f"import sys, {modules}; print([m for m in ('torch', 'sklearn', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        dataset_info("cifar-10")


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_catalogue_entries_agree_with_themselves(name: str) -> None:
    info = DATASETS[name]
    assert info.name == name
    assert not info.class_names or len(info.class_names) == len(set(info.class_names)) == info.classes
    assert len(info.mean) == len(info.std) == info.shape[0]
    assert len(info.digest) in {0, 64}
    assert all(len(file.sha256 or 2 * file.md5) == 64 and file.size > 0 for file in info.files)
    assert bool(info.files or info.streamed) == bool(info.folders) == bool(info.by_hand)
    assert callable(function(info, "reader"))
    assert not info.fetcher or callable(function(info, "fetcher"))
    assert info.held_out().train_size + info.held_out().test_size == info.train_size


# Splits, pixels, digests


def test_split_refuses_what_it_does_not_hold() -> None:
    images, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    for wrong in (
        (images.float(), labels),
        (images[0], labels),
        (images, labels[:2]),
        (images, labels.int()),
    ):
        with pytest.raises(DataError):
            Split(*wrong)


def test_slice_shares_memory_and_is_cut_at_the_end() -> None:
    split = random_split(10, (1, 2, 2), 0)
    part = split.slice(8, 99)
    assert len(part) == 2
    assert part.images.data_ptr() == split.images[8:].data_ptr()
    assert torch.equal(part.labels, split.labels[8:])
    for start, stop in ((10, 12), (-1, 3), (4, 4), (5, 4)):
        with pytest.raises(IndexError):
            split.slice(start, stop)


def test_pixels_are_the_nearest_float32_and_stay_it_in_float64() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = np.arange(256, dtype=np.float64) / 255
    single = to_pixels(images, 255)
    double = to_pixels(images, 255, torch.float64)
    assert single.dtype == torch.float32
    assert single.flatten().numpy().tolist() == expected.astype(np.float32).tolist()
    assert torch.equal(double, single.double())
    assert (double.flatten().numpy() != expected).any()  # a division in float64 would be another image


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("levels", [16, 255])
def test_pixels_are_the_same_on_a_gpu(levels: int) -> None:
    images = torch.arange(levels + 1).to(torch.uint8).view(1, 1, 1, -1)
    assert torch.equal(to_pixels(images.cuda(), levels).cpu(), to_pixels(images, levels))


def test_pixels_are_not_divided_twice() -> None:
    with pytest.raises(DataError, match="uint8"):
        to_pixels(torch.zeros(1, 1, 2, 2), 255)


def test_dataset_digest_sees_every_part() -> None:
    train, test = random_split(4, (1, 2, 3), 0), random_split(3, (1, 2, 3), 1)
    relabelled = Split(test.images, (test.labels + 1) % 10)
    reshaped = Split(test.images.view(3, 1, 3, 2), test.labels)
    digests = [
        dataset_digest("mnist", train, test),
        dataset_digest("other", train, test),
        dataset_digest("mnist", test, train),
        dataset_digest("mnist", train, relabelled),
        dataset_digest("mnist", train, reshaped),
    ]
    assert len(set(digests)) == len(digests)
    assert digests[0] == dataset_digest("mnist", train, test)


def test_image_digests_are_those_of_the_bytes() -> None:
    split = random_split(3, (3, 2, 2), 0)
    expected = [hashlib.sha256(bytes(image.flatten().tolist())).hexdigest()[:16] for image in split.images]
    assert image_digests(split) == expected


# Digits


def test_digits_load_as_pinned_with_a_balanced_test_set() -> None:
    digits = load_dataset("digits")
    assert digits.digest == digits.info.digest
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert torch.bincount(digits.test.labels).tolist() == [36] * 10
    assert digits.train.images.max() == 16
    assert digits.train.images.shape[1:] == (1, 8, 8)
    assert not set(image_digests(digits.train)) & set(image_digests(digits.test))


def test_digits_test_set_is_the_documented_one() -> None:
    labels = np.arange(400) % 10
    chosen = choose_per_class(labels, 36).tolist()
    assert chosen == sorted(chosen)
    for label in range(10):
        order = sorted(range(label, 400, 10), key=lambda i: hashlib.sha256(str(i).encode()).hexdigest())
        assert {i for i in chosen if i % 10 == label} == set(order[:36])


def test_other_digits_than_the_pinned_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "digits", replace(DATASETS["digits"], digest="0" * 64))
    with pytest.raises(DataError, match="scikit-learn") as error:
        load_dataset("digits")
    assert "0" * 64 in one_line(error)
    assert verify("digits") == [str(error.value)]


# Finding and reading files


@pytest.mark.parametrize("folder", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_from_every_layout(
    mnist: dict[str, bytes], tmp_path: Path, folder: str, packed: bool
) -> None:
    put(tmp_path / folder, mnist, packed)
    dataset = load_dataset("mnist", tmp_path)
    train, test = random_split(30, (1, 4, 5), 0), random_split(11, (1, 4, 5), 1)
    assert torch.equal(dataset.train.images, train.images)
    assert torch.equal(dataset.train.labels, train.labels)
    assert torch.equal(dataset.test.images, test.images)
    assert torch.equal(dataset.test.labels, test.labels)


def test_a_complete_folder_wins_over_an_incomplete_one(mnist: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path / "mnist", dict(list(mnist.items())[:3]))
    put(tmp_path / "MNIST/raw", mnist, packed=True)
    assert len(load_dataset("mnist", tmp_path).train) == 30


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar10/cifar-10-batches-py"])
def test_cifar10_is_read_in_order(cifar10: dict[str, bytes], tmp_path: Path, folder: str) -> None:
    put(tmp_path / folder, cifar10)
    dataset = load_dataset("cifar10", tmp_path)
    train, test = random_split(20, (3, 4, 4), 2), random_split(6, (3, 4, 4), 3)
    assert torch.equal(dataset.train.images, train.images)
    assert torch.equal(dataset.train.labels, train.labels)
    assert torch.equal(dataset.test.images, test.images)
    assert torch.equal(dataset.test.labels, test.labels)


def test_the_data_folder_is_given_or_named_by_the_variable_or_the_default(
    mnist: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "data", mnist)
    monkeypatch.setenv("CERTBENCH_DATA", str(tmp_path / "data"))
    assert len(load_dataset("mnist").train) == 30
    assert places.data_root(tmp_path) == tmp_path
    monkeypatch.setenv("CERTBENCH_DATA", "")
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("mnist").train) == 30


def test_missing_data_says_where_it_was_sought_and_what_to_do(
    mnist: dict[str, bytes], tmp_path: Path
) -> None:
    root = tmp_path / "no such folder"
    with pytest.raises(DataError) as error:
        load_dataset("mnist", root)
    text = one_line(error)
    for part in (f"{root}/mnist", f"{root}/MNIST/raw", f"certbench data fetch mnist --data '{root}'"):
        assert part in text
    assert "CERTBENCH_DATA" in text


def test_one_missing_file_is_named(mnist: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path / "mnist", mnist)
    (tmp_path / "mnist/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte missing") as error:
        load_dataset("mnist", tmp_path)
    assert "train-images" not in one_line(error)


def flip_bit(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-1], "615 bytes where 616"),
        (lambda content: content + b"x", "more than 616"),
        (lambda content: flip_bit(content, 100), "SHA-256"),
        (lambda _: b"", "0 bytes where 616"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_content_is_named_with_both_values(
    mnist: dict[str, bytes], tmp_path: Path, damage: object, words: str, packed: bool
) -> None:
    name = "train-images-idx3-ubyte"
    assert callable(damage)
    put(tmp_path, mnist | {name: damage(mnist[name])}, packed)
    with pytest.raises(DataError, match=words) as error:
        load_dataset("mnist", tmp_path)
    assert f"{tmp_path}/{name}" in one_line(error)
    assert "certbench data fetch mnist" in one_line(error)
    assert verify("mnist", tmp_path) == [str(error.value)]


@pytest.mark.parametrize("content", ["truncated", "no gzip", "empty", "bad checksum"])
def test_a_broken_gz_is_named(mnist: dict[str, bytes], tmp_path: Path, content: str) -> None:
    put(tmp_path, mnist, packed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    broken = {
        "truncated": whole[:-20],
        "no gzip": b"<html>not found</html>",
        "empty": b"",
        "bad checksum": flip_bit(whole, len(whole) - 8),
    }
    path.write_bytes(broken[content])
    with pytest.raises(DataError, match="is damaged") as error:
        load_dataset("mnist", tmp_path)
    assert str(path) in one_line(error)


def test_a_gzip_bomb_is_not_unpacked(mnist: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path, mnist, packed=True)
    name = "t10k-labels-idx1-ubyte"
    with gzip.open(tmp_path / f"{name}.gz", "wb") as stream:
        for _ in range(64):
            stream.write(bytes(1 << 20))
    with gzip.open(tmp_path / f"{name}.gz") as stream:
        assert len(places._bounded(stream, len(mnist[name]))) == len(mnist[name]) + 1
    with pytest.raises(DataError, match="more than"):
        load_dataset("mnist", tmp_path)


def test_an_unreadable_file_is_named(
    mnist: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, mnist)

    def refuse(path: Path, unpacked: bool) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(places, "_open", refuse)  # file modes do not stop a superuser, who may run the tests
    with pytest.raises(DataError, match="cannot read .*train-images.*Permission denied"):
        load_dataset("mnist", tmp_path)


def test_an_unreadable_folder_is_named(
    mnist: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(DataError, match="Permission denied; make the folder readable"):
        load_dataset("mnist", tmp_path)


def test_labels_and_shapes_are_checked(
    mnist: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, mnist)
    info = DATASETS["mnist"]
    for wrong, words in (
        (replace(info, classes=3), "training labels reach"),
        (replace(info, test_size=12), "test images"),
        (replace(info, shape=(1, 5, 4)), "training images"),
        (replace(info, levels=16), "above 16"),
    ):
        monkeypatch.setitem(DATASETS, "mnist", wrong)
        with pytest.raises(DataError, match=words):
            load_dataset("mnist", tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\x00\x08", b"\x00\x00\x0d\x01\x00\x00\x00\x01x", b"\x00\x00\x08\x01\x00\x00\x00\x02x"],
)
def test_what_is_not_idx_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="not an IDX file"):
        formats.parse_idx("labels", bytearray(content))


@pytest.mark.parametrize("packed", ["right", "bomb", "broken"])
def test_fashion_mnist_is_known_by_its_packed_files(
    mnist: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: str
) -> None:
    contents = {f"{name}.gz": gzip.compress(content) for name, content in mnist.items()}
    if packed != "right":
        wrong = gzip.compress(bytes(1 << 20)) if packed == "bomb" else b"no gzip at all"
        contents["t10k-labels-idx1-ubyte.gz"] = wrong
    entries = tuple(
        FileInfo(name, len(content), md5=hashlib.md5(content, usedforsecurity=False).hexdigest())
        for name, content in contents.items()
    )
    info = replace(DATASETS["mnist"], name="fashion-mnist", digest="", files=entries)
    put(tmp_path / "mnist", contents)
    if packed != "right":
        with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz (is damaged|unpacks to more)"):
            load_dataset(info, tmp_path)
        return
    assert torch.equal(load_dataset(info, tmp_path).train.images, random_split(30, (1, 4, 5), 0).images)
    (tmp_path / "mnist/t10k-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(mnist["t10k-labels-idx1-ubyte"], 1)
    )
    assert "MD5" in verify(info, tmp_path)[0]


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    train, test = random_split(20, (3, 4, 4), 2), random_split(6, (3, 4, 4), 3)
    contents = {}
    for name, split in (("train", train), ("test", test)):
        batch = {b"data": split.images.flatten(1).numpy(), b"fine_labels": split.labels.tolist()}
        batch[b"coarse_labels"] = [0] * len(split)
        contents[name] = pickle.dumps(batch, protocol=3)
    contents["meta"] = b"names"
    info = replace(describe("cifar100", contents, train, test), folders=("",))
    put(tmp_path, contents)
    dataset = load_dataset(info, tmp_path)
    assert torch.equal(dataset.train.labels, train.labels)
    assert torch.equal(dataset.test.images, test.images)


def test_files_of_another_data_set_are_refused(
    mnist: dict[str, bytes], cifar10: dict[str, bytes], tmp_path: Path
) -> None:
    """Mixed up: CIFAR-10's test batch lies where another batch belongs, MNIST's test images where training images do."""
    put(tmp_path / "cifar-10-batches-py", cifar10 | {"data_batch_3": cifar10["test_batch"]})
    with pytest.raises(DataError, match="data_batch_3 is damaged"):
        load_dataset("cifar10", tmp_path)
    put(tmp_path / "mnist", mnist | {"train-labels-idx1-ubyte": mnist["t10k-labels-idx1-ubyte"]})
    with pytest.raises(DataError, match="train-labels-idx1-ubyte is damaged"):
        load_dataset("mnist", tmp_path)


CIFAR_FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]


@pytest.mark.parametrize("name", CIFAR_FILES)
def test_a_flipped_byte_in_any_file_of_cifar10_is_named(
    cifar10: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    content = cifar10[name]
    put(tmp_path / "cifar-10-batches-py", cifar10 | {name: flip_bit(content, len(content) // 2)})
    (problem,) = verify("cifar10", tmp_path)
    assert f"cifar-10-batches-py/{name} is damaged: SHA-256" in problem


# Caches


def cache_of(root: Path) -> Path:
    return root / "cache/mnist.safetensors"


def test_the_second_load_maps_the_cache_and_gives_the_same(mnist: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path, mnist)
    first = load_dataset("mnist", tmp_path)
    assert left_over(tmp_path / "cache") == ["mnist.safetensors"]
    for name in mnist:
        (tmp_path / name).unlink()
    second = load_dataset("mnist", tmp_path)  # the pinned digest is enough
    assert second.digest == first.digest
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_cache_is_made_anew(mnist: dict[str, bytes], tmp_path: Path, damage: str) -> None:
    put(tmp_path, mnist)
    digest = load_dataset("mnist", tmp_path).digest
    path = cache_of(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "flip": flip_bit(whole, len(whole) - 30),
            "cut": whole[:-7],
            "empty": b"",
            "other": whole.replace(b"train.images", b"traim.images"),
        }[damage]
    )
    assert load_dataset("mnist", tmp_path).digest == digest
    assert path.read_bytes() == whole


def test_the_cache_of_a_set_that_is_not_pinned_follows_its_files(
    mnist: dict[str, bytes], tmp_path: Path
) -> None:
    put(tmp_path, mnist)
    info = replace(DATASETS["mnist"], digest="")
    digest = load_dataset(info, tmp_path).digest
    other = flip_bit(mnist["train-images-idx3-ubyte"], 40)
    put(tmp_path, {"train-images-idx3-ubyte": other})
    changed = tuple(
        replace(file, sha256=hashlib.sha256(other).hexdigest()) if "train-images" in file.name else file
        for file in info.files
    )
    assert load_dataset(replace(info, files=changed), tmp_path).digest != digest


def test_a_folder_that_cannot_be_written_has_no_cache(
    mnist: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, mnist)
    (tmp_path / "cache").write_text("in the way")
    load_dataset("mnist", tmp_path)
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "elsewhere"))
    load_dataset("mnist", tmp_path)
    assert left_over(tmp_path / "elsewhere") == ["mnist.safetensors"]


# Held-out images


def test_held_out_images_are_taken_from_training_for_good() -> None:
    whole, chosen = load_dataset("digits"), load_dataset("digits-validation")
    positions = whole.validation
    assert positions[:5].tolist() == sorted(positions.tolist())[:5]
    assert hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest()[:16] == HELD_OUT_OF_DIGITS
    assert (len(chosen.train), len(chosen.test)) == (1437 - 140, 140)
    assert torch.bincount(chosen.test.labels).tolist() == [14] * 10
    assert torch.equal(chosen.test.images, whole.train.images[torch.from_numpy(positions)])
    assert not set(image_digests(chosen.test)) & set(image_digests(whole.test))
    assert chosen.digest != whole.digest
    assert chosen.info.name == "digits-validation"
    with pytest.raises(UsageError, match="holds no validation images"):
        chosen.info.held_out()


HELD_OUT_OF_DIGITS = "d266bb0dfda6ccf8"


# Pickles


class Opens:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps(Opens()), r"refused to load (posix|nt)\.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", r"builtins\.eval"),
        (b"cnumpy\nload\n(S'x'\ntR.", r"numpy\.load"),
        (pickle.dumps({b"data": np.zeros(3)}, protocol=3), "refused NumPy type"),
        (pickle.dumps(np.array([Opens()], dtype=object), protocol=3), "refused"),
        (b"Pid\n.", "persistent"),
        (b"\x80\x02}q\x01(U", "not a readable pickle"),
        (b"", "not a readable pickle"),
    ],
)
def test_hostile_or_broken_pickles_are_refused(content: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        restricted_unpickle("data_batch_1", content)
    assert one_line(error).startswith("data_batch_1")


def test_a_pickle_is_not_opened_before_its_digest_is_verified(
    cifar10: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "cifar-10-batches-py", cifar10 | {"batches.meta": b"name5"})
    monkeypatch.setattr(formats, "restricted_unpickle", lambda *_: pytest.fail("opened"))
    with pytest.raises(DataError, match=r"batches\.meta is damaged: SHA-256"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("content", [{b"data": b"x", b"labels": [1]}, {b"labels": [1]}, [1, 2]])
def test_a_pickle_of_something_else_is_refused(content: object) -> None:
    with pytest.raises(DataError, match="does not hold the images"):
        formats.parse_batch(
            DATASETS["cifar10"], "test_batch", bytearray(pickle.dumps(content, protocol=3)), b"labels"
        )


# Status and verify


def state_of(name: str, root: Path) -> str:
    return {row.name: row.state for row in status(root)}[name]


def test_status_tells_the_states_apart(mnist: dict[str, bytes], tmp_path: Path) -> None:
    assert state_of("digits", tmp_path) == "complete"
    assert state_of("mnist", tmp_path) == "missing"
    put(tmp_path / "mnist", dict(list(mnist.items())[:2]), packed=True)
    assert state_of("mnist", tmp_path) == "incomplete"
    put(tmp_path / "mnist", mnist, packed=True)
    assert state_of("mnist", tmp_path) == "complete"
    path = tmp_path / "mnist/t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-30])
    assert state_of("mnist", tmp_path) == "damaged"


def test_status_names_place_and_next_step(mnist: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path / "MNIST/raw", mnist)
    rows = {row.name: row for row in status(tmp_path)}
    assert rows["mnist"].where == str(tmp_path / "MNIST/raw")
    assert rows["mnist"].next_step == ""
    assert rows["cifar10"].next_step == f"certbench data fetch cifar10 --data {tmp_path}"


def test_verify_finds_nothing_wrong_and_every_wrong_thing(mnist: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path, mnist)
    assert verify("mnist", tmp_path) == []
    assert verify("digits", tmp_path) == []
    (tmp_path / "train-images-idx3-ubyte").unlink()
    for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(flip_bit(mnist[name], 9))
    problems = verify("mnist", tmp_path)
    assert len(problems) == 3
    assert all("\n" not in problem for problem in problems)


# Fetching


class Server:
    """Serves ``content`` on the loopback device, from the byte asked for; ``cut`` names paths that break off half-way."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.unannounced: set[str] = set()
        self.requests: list[str] = []
        self.starts: list[int] = []
        self.resumes = True
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.requests.append(self.path)
                body = owner.content.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
                start = int(asked) if owner.resumes else 0
                if start >= len(body):
                    self.send_error(416)
                    return
                owner.starts.append(start)
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                body = body[start:]
                if self.path not in owner.unannounced:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if self.path in owner.cut else body)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{server.url}/a/", f"{server.url}/b/"])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{server.url}/cifar.tar.gz")
    yield server
    server.close()


def serve_mnist(server: Server, contents: dict[str, bytes], mirror: str = "a") -> None:
    for name, content in contents.items():
        server.content[f"/{mirror}/{name}.gz"] = gzip.compress(content)


def left_over(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_fetched_mnist_loads(mnist: dict[str, bytes], server: Server, tmp_path: Path) -> None:
    serve_mnist(server, mnist)
    fetch("mnist", tmp_path)
    assert left_over(tmp_path) == sorted(f"mnist/{name}.gz" for name in mnist)
    assert len(load_dataset("mnist", tmp_path).train) == 30
    fetch("mnist", tmp_path)
    assert len(server.requests) == 4  # nothing was fetched twice


@pytest.mark.parametrize("trouble", ["absent", "cut", "wrong", "too long", "portal"])
def test_the_second_mirror_is_tried(
    mnist: dict[str, bytes], server: Server, tmp_path: Path, trouble: str
) -> None:
    serve_mnist(server, mnist, "b")
    spoil(server, mnist, trouble)
    fetch("mnist", tmp_path)
    assert verify("mnist", tmp_path) == []


def spoil(server: Server, mnist: dict[str, bytes], trouble: str) -> None:
    """Serve the first mirror's files in one of the ways in which downloads go wrong."""
    for name, content in mnist.items():
        path = f"/a/{name}.gz"
        if trouble == "cut":
            server.content[path] = gzip.compress(content)
            server.cut.add(path)
        elif trouble == "wrong":
            server.content[path] = gzip.compress(flip_bit(content, 12))
        elif trouble == "too long":
            server.content[path] = bytes(2 << 20)
            server.unannounced.add(path)
        elif trouble == "portal":
            server.content[path] = b"<html>please log in</html>"


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("absent", "HTTP status 404"),
        ("cut", "broke off"),
        ("wrong", "SHA-256"),
        ("too long", "sends more than"),
        ("portal", "something else"),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_what_to_do(
    mnist: dict[str, bytes], server: Server, tmp_path: Path, trouble: str, words: str
) -> None:
    spoil(server, mnist, trouble)
    with pytest.raises(DataError, match=words) as error:
        fetch("mnist", tmp_path)
    kept = left_over(tmp_path)  # the beginning of what broke off, so that the next call goes on from there
    assert kept == (["mnist/partial.train-images-idx3-ubyte.gz"] if trouble == "cut" else [])
    assert f"put the four IDX files (unpacked or .gz) into {tmp_path}/mnist" in one_line(error)


def test_an_announced_size_above_the_limit_is_not_downloaded(
    mnist: dict[str, bytes], server: Server, tmp_path: Path
) -> None:
    server.content["/a/train-images-idx3-ubyte.gz"] = bytes(2 << 20)
    with pytest.raises(DataError, match="2,097,152 bytes offered"):
        fetch("mnist", tmp_path)


def test_no_network_is_one_line(mnist: dict[str, bytes], server: Server, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(DataError, match="Connection refused") as error:
        fetch("mnist", tmp_path)
    assert "check the network" in one_line(error)


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupted_download_goes_on_where_it_broke_off(
    mnist: dict[str, bytes], server: Server, tmp_path: Path, resumes: bool
) -> None:
    serve_mnist(server, mnist)
    first = "/a/train-images-idx3-ubyte.gz"
    server.cut.add(first)
    with pytest.raises(DataError, match="run this again to go on from there"):
        fetch("mnist", tmp_path)
    server.cut.clear()
    server.resumes = resumes
    fetch("mnist", tmp_path)
    assert server.starts[1] == (len(server.content[first]) // 2 if resumes else 0)
    assert verify("mnist", tmp_path) == []
    assert left_over(tmp_path) == sorted(f"mnist/{name}.gz" for name in mnist)


@pytest.mark.parametrize("beginning", [b"something else", bytes(4096)])
def test_a_wrong_beginning_is_fetched_anew(
    mnist: dict[str, bytes], server: Server, tmp_path: Path, beginning: bytes
) -> None:
    serve_mnist(server, mnist)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist/partial.train-images-idx3-ubyte.gz").write_bytes(beginning)
    fetch("mnist", tmp_path)
    assert verify("mnist", tmp_path) == []


def test_no_space_is_told_before_anything_is_downloaded(
    mnist: dict[str, bytes], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_mnist(server, mnist)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match=r"no space in .*mnist: 0\.0 GB are needed .* --data DIR") as error:
        fetch("mnist", tmp_path)
    assert server.requests == []
    one_line(error)


def test_a_data_set_that_nobody_hands_out_says_what_to_do(tmp_path: Path) -> None:
    for name in ("tinyimagenet-50", "imagenet"):
        with pytest.raises(DataError, match=f"put .* into {tmp_path}/") as error:
            fetch(name, tmp_path)
        one_line(error)


def test_a_damaged_file_is_replaced_and_set_aside(
    mnist: dict[str, bytes], server: Server, tmp_path: Path
) -> None:
    put(tmp_path / "MNIST/raw", mnist)
    name = "t10k-labels-idx1-ubyte"
    (tmp_path / "MNIST/raw" / name).write_bytes(b"damaged")
    serve_mnist(server, mnist)
    fetch("mnist", tmp_path)
    assert server.requests == [f"/a/{name}.gz"]
    assert (tmp_path / f"MNIST/raw/{name}.replaced").read_bytes() == b"damaged"
    assert verify("mnist", tmp_path) == []
    assert len(load_dataset("mnist", tmp_path).test) == 11


def test_a_folder_that_cannot_be_written_is_named(
    mnist: dict[str, bytes], server: Server, tmp_path: Path
) -> None:
    serve_mnist(server, mnist)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write mnist to .*file/mnist.*--data DIR"):
        fetch("mnist", tmp_path / "file")


def test_digits_need_no_fetching(tmp_path: Path) -> None:
    lines: list[str] = []

    class Lines(SilentReporter):
        def say(self, line: str) -> None:
            lines.append(line)

    fetch("digits", tmp_path, Lines())
    assert lines == ["digits comes with its package: nothing to fetch"]
    assert left_over(tmp_path) == []


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def cifar_members(contents: dict[str, bytes]) -> list[tuple[tarfile.TarInfo, bytes]]:
    folder = (member("cifar-10-batches-py", tarfile.DIRTYPE), b"")
    inside = [(member(f"cifar-10-batches-py/{name}"), content) for name, content in contents.items()]
    return [folder, (member("cifar-10-batches-py/readme.html"), b"hello"), *inside]


def serve_cifar(server: Server, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    server.content["/cifar.tar.gz"] = archive
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(archive).hexdigest())


def test_fetched_cifar10_loads(
    cifar10: dict[str, bytes], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_cifar(server, tar_of(cifar_members(cifar10)), monkeypatch)
    fetch("cifar10", tmp_path)
    assert left_over(tmp_path) == sorted(f"cifar-10-batches-py/{name}" for name in cifar10)
    assert len(load_dataset("cifar10", tmp_path).train) == 20


def test_an_altered_archive_is_not_unpacked(
    cifar10: dict[str, bytes], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_cifar(server, tar_of(cifar_members(cifar10)), monkeypatch)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", "0" * 32)
    monkeypatch.setattr(fetching, "extract", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(DataError, match="MD5 .* where 0000"):
        fetch("cifar10", tmp_path)
    assert left_over(tmp_path) == []


def test_an_archive_with_other_content_is_refused(
    cifar10: dict[str, bytes], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = cifar10 | {"test_batch": flip_bit(cifar10["test_batch"], 40)}
    serve_cifar(server, tar_of(cifar_members(changed)), monkeypatch)
    with pytest.raises(DataError, match="test_batch is damaged: SHA-256"):
        fetch("cifar10", tmp_path)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("evil", "words"),
    [
        (member("../outside"), "points outside"),
        (member("/absolute"), "points outside"),
        (member("cifar-10-batches-py/../../outside"), "points outside"),
        (member("cifar-10-batches-py/link", tarfile.SYMTYPE, "/"), "neither a file nor a folder"),
        (member("cifar-10-batches-py/link", tarfile.LNKTYPE, "/etc/hostname"), "neither a file nor a folder"),
        (member("cifar-10-batches-py/pipe", tarfile.FIFOTYPE), "neither a file nor a folder"),
        (member("cifar-10-batches-py/test_batch", tarfile.DIRTYPE), "is not a file of"),
    ],
)
def test_hostile_archives_are_refused(
    cifar10: dict[str, bytes],
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    evil: tarfile.TarInfo,
    words: str,
) -> None:
    serve_cifar(server, tar_of([(evil, b""), *cifar_members(cifar10)]), monkeypatch)
    with pytest.raises(DataError, match=words) as error:
        fetch("cifar10", tmp_path / "root")
    assert evil.name in one_line(error)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda archive: archive[: len(archive) // 2], "damaged"),
        (lambda _: b"no archive", "damaged"),
        (lambda _: tar_of([]), "lacks"),
        (lambda _: tar_of([(member("big"), bytes(4096))]), "more than 1,000 bytes"),
        (lambda _: tar_of([(member("folder/file"), b"other size")]), "not a file of 5 bytes"),
    ],
)
def test_broken_archives_are_refused(tmp_path: Path, change: object, words: str) -> None:
    archive = tmp_path / "a.tar.gz"
    assert callable(change)
    noise = np.random.default_rng(0).bytes(900)
    archive.write_bytes(change(tar_of([(member("noise"), noise), (member("folder/file"), b"right")])))
    wanted = [FileInfo("file", 5, "")]
    with pytest.raises(DataError, match=words) as error:
        extract(archive, tmp_path, PurePosixPath("folder"), wanted, 1000)
    one_line(error)


# Commands


def run_cli(*arguments: str) -> tuple[int, str, BaseException | None]:
    result = CliRunner().invoke(cli_data.command, list(arguments))
    return result.exit_code, result.output, result.exception


@pytest.mark.parametrize("arguments", [(), ("status",), ("fetch",), ("verify",)])
def test_help_shows_an_example(arguments: tuple[str, ...]) -> None:
    code, output, _ = run_cli(*arguments, "--help")
    assert code == 0
    assert "Example:\n  " in output
    assert " ".join(["certbench data", *arguments]) in output


def test_status_command_prints_a_table_and_json(mnist: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path / "mnist", mnist)
    _, table, _ = run_cli("status", "--data", str(tmp_path))
    states = dict(line.split()[:2] for line in table.splitlines()[1:])
    assert states == dict.fromkeys(DATASETS, "missing") | {"digits": "complete", "mnist": "complete"}
    _, text, _ = run_cli("status", "--data", str(tmp_path), "--json")
    rows = {row["name"]: row for row in json.loads(text)}
    assert rows["mnist"] == {
        "name": "mnist",
        "state": "complete",
        "where": str(tmp_path / "mnist"),
        "next_step": "",
    }


def test_fetch_command_then_verify_command(mnist: dict[str, bytes], server: Server, tmp_path: Path) -> None:
    serve_mnist(server, mnist)
    code, output, _ = run_cli("fetch", "mnist", "digits", "--data", str(tmp_path))
    assert code == 0
    assert f"mnist is complete in {tmp_path}/mnist" in output
    assert "digits comes with its package" in output
    code, output, _ = run_cli("verify", "--data", str(tmp_path))
    assert code == 0
    assert "mnist: every byte as published" in output
    assert "cifar10: not there, not checked" in output


def test_verify_command_finds_damage_and_named_missing_data(mnist: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path, mnist | {"t10k-labels-idx1-ubyte": b"damaged"})
    _, output, error = run_cli("verify", "--data", str(tmp_path))
    assert isinstance(error, FoundError)
    assert "1 of 2 data sets" in str(error)
    assert "t10k-labels-idx1-ubyte is damaged" in output
    _, _, error = run_cli("verify", "cifar10", "--data", str(tmp_path))
    assert isinstance(error, FoundError)


def test_fetch_command_refuses_unknown_names_before_any_download(server: Server, tmp_path: Path) -> None:
    _, _, error = run_cli("fetch", "mnist", "mnits", "--data", str(tmp_path))
    assert isinstance(error, UsageError)
    assert server.requests == []


def test_progress_is_shown_only_when_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(cli_data, "time", SimpleNamespace(monotonic=lambda: now))
    with cli_data.DownloadProgress() as progress:
        progress.stage("fetching x", 100_000_000, "byte")
        progress.advance(30_000_000)
        assert capsys.readouterr().err == ""
        now = 2.5
        for done in range(50_000_000, 60_000_000, 1_000_000):
            progress.advance(done)
    assert capsys.readouterr().err == "fetching x: 50.0 MB (50%)\n"


# Committed rows


def test_the_pinned_data_sets_are_those_of_the_committed_rows() -> None:
    folder = Path(__file__).parent.parent / "leaderboards/results/runs"
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert rows
    for row in rows:
        if not row["dataset"].endswith("-validation"):
            assert row["dataset_digest"] == DATASETS[row["dataset"]].digest, row["run_id"]


# The real files


@pytest.mark.parametrize(("name", "seconds"), [("mnist", 2.0), ("cifar10", 6.0)])
def test_real_data_loads_as_pinned(name: str, seconds: float) -> None:
    if not os.environ.get("CERTBENCH_DATA"):
        pytest.skip("CERTBENCH_DATA names no data folder")
    if {row.name: row.state for row in status()}[name] != "complete":
        pytest.skip(f"no {name} in the folder that CERTBENCH_DATA names")
    started = time.process_time()
    dataset = load_dataset(name)
    assert time.process_time() - started < 3 * seconds  # processor time, and room for a busy or slow machine
    assert dataset.digest == dataset.info.digest
    assert len(dataset.train) == dataset.info.train_size
    assert torch.bincount(dataset.test.labels).min() > 0
    pixels = to_pixels(dataset.train.images[:10_000], dataset.info.levels, torch.float64)
    assert 0 <= pixels.min() < pixels.max() <= 1
