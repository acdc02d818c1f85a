"""ImageNet's files: its official archives unpacked, its folders checked and listed, its images scaled down once.

``fetch`` turns ``ILSVRC2012_img_train.tar``, ``ILSVRC2012_img_val.tar`` and ``ILSVRC2012_devkit_t12.tar.gz`` into
``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG``, unless these folders are there already, and lists what is in them.
A folder gets its name when it is complete, and its list after that. Imports no torch.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from certbench.contract import Reporter
from certbench.data.info import DatasetInfo, FileInfo
from certbench.data.manifest import Line, write_manifest
from certbench.data.places import Damaged, check_md5, require_space
from certbench.errors import DataError

TRAIN, VAL = "train.manifest", "val.manifest"
RESIZED = "resized-256"
SIDE = 256
"""Of the shorter side of the scaled images."""
QUALITY = 95
"""Of the scaled JPEG files, with full colour resolution."""
PER_SHARD = 16_384

TRAIN_ARCHIVE = ("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e")
VAL_ARCHIVE = ("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622")
DEVKIT = ("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf")
"""Name and MD5 sum, as torchvision lists them."""

_CLASS_ARCHIVE = re.compile(r"(n\d{8})\.tar")
_TRAIN_IMAGE = re.compile(r"(n\d{8})_\d+\.JPEG")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_WNID = re.compile(r"n\d{8}")
_CHUNK = 1 << 20


def place(info: DatasetInfo, root: Path) -> Path:
    """The first folder of the catalogue that holds anything of ImageNet; the first one where none does."""
    found = (root / folder for folder in info.folders if has_any(root / folder))
    return next(found, root / info.folders[0])


def has_any(folder: Path) -> bool:
    """Whether a folder holds an archive or a part of ImageNet."""
    signs = (TRAIN, VAL, "train", "val", TRAIN_ARCHIVE[0], VAL_ARCHIVE[0])
    return any((folder / sign).exists() for sign in signs)


def is_ready(info: DatasetInfo, folder: Path) -> bool:
    """Whether the lists are there, which are written last."""
    return all((folder / name).is_file() for name in lists(info))


def lists(info: DatasetInfo) -> tuple[str, str]:
    """The lists of training and test images, relative to the folder of ImageNet."""
    return (f"{RESIZED}/{TRAIN}" if info.name.endswith("-256") else TRAIN), VAL


def prepare(info: DatasetInfo, folder: Path, _wanted: list[FileInfo], reporter: Reporter) -> None:
    """Unpack what is not unpacked, and list what is not listed; also scale down where ``info`` is of scaled images.

    Raises:
        DataError: archives or folders are missing, damaged or not ImageNet's; or there is no space.
    """
    _unpack(info, folder, reporter)
    for part, name in (("train", TRAIN), ("val", VAL)):
        if not (folder / name).is_file():
            write_manifest(folder / name, _listed(info, folder, part, reporter))
    if lists(info)[0] != TRAIN and not is_ready(info, folder):
        from certbench.data.resized import write_shards

        write_shards(folder, reporter)


# Unpacking -----------------------------------------------------------------------------------------------------------


def _unpack(info: DatasetInfo, folder: Path, reporter: Reporter) -> None:
    if not (folder / "train").is_dir():
        archive = _verified(info, folder, TRAIN_ARCHIVE, reporter)
        _fill(folder, "train", archive, lambda tar: _train_members(tar, archive), reporter)
    if not (folder / "val").is_dir():
        archive = _verified(info, folder, VAL_ARCHIVE, reporter)
        classes = validation_classes(_verified(info, folder, DEVKIT, reporter))
        _fill(folder, "val", archive, lambda tar: _val_members(tar, archive, classes), reporter)


def _verified(info: DatasetInfo, folder: Path, archive: tuple[str, str], reporter: Reporter) -> Path:
    name, md5 = archive
    path = folder / name
    if not path.is_file():
        raise DataError(
            f"{info.name} has neither {path} nor its unpacked folder; its publisher gives it to registered users: put "
            f"{info.by_hand} into {folder} and run this again"
        )
    try:
        check_md5(path, md5, reporter)
    except Damaged as damage:
        raise DataError(f"{path} is damaged: {damage}; get it again") from None
    return path


Members = Iterator[tuple[str, tarfile.TarFile, tarfile.TarInfo]]
"""(class, open archive, member of it that is an image of this class)."""


def _fill(
    folder: Path, part: str, archive: Path, members: Callable[[tarfile.TarFile], Members], reporter: Reporter
) -> None:
    """Unpack into a folder with another name, which is renamed when everything is there."""
    size = archive.stat().st_size
    require_space(folder, size)
    scratch = folder / f"{part}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    reporter.stage(f"unpacking {archive.name}", size, "byte")
    try:
        with tarfile.open(archive, "r:") as tar:
            done = 0
            for wnid, source, member in members(tar):
                target = scratch / wnid / Path(member.name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                stream = source.extractfile(member)
                assert stream is not None  # members are regular files
                with stream, target.open("xb") as image:
                    shutil.copyfileobj(stream, image)
                done += member.size
                reporter.advance(done)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{archive} is damaged: {error}; get it again") from None
    except FileExistsError as error:
        raise DataError(f"{archive} holds {error.filename} twice; get it again") from None
    scratch.rename(folder / part)


def _train_members(tar: tarfile.TarFile, archive: Path) -> Members:
    """The training archive holds one archive per class."""
    for member in tar:
        wnid = _named(_CLASS_ARCHIVE, member, archive)
        inner = tar.extractfile(member)
        assert inner is not None  # a regular file
        with tarfile.open(fileobj=inner, mode="r:") as images:
            for image in images:
                if _named(_TRAIN_IMAGE, image, archive) != wnid:
                    raise DataError(
                        f"{archive}: {image.name} lies in the archive of class {wnid}; get it again"
                    )
                yield wnid, images, image


def _val_members(tar: tarfile.TarFile, archive: Path, classes: list[str]) -> Members:
    for member in tar:
        number = int(_named(_VAL_IMAGE, member, archive))
        if not 1 <= number <= len(classes):
            raise DataError(
                f"{archive}: {member.name} has no label among the {len(classes):,} of the development kit"
            )
        yield classes[number - 1], tar, member


def _named(pattern: re.Pattern[str], member: tarfile.TarInfo, archive: Path) -> str:
    """What the pattern finds in the whole name of a member that is a regular file, so that it can lead nowhere else."""
    match = pattern.fullmatch(member.name)
    if match is None or not member.isreg():
        raise DataError(f"refused {archive}: it holds {member.name!r}, which does not belong there")
    return match[1]


def validation_classes(devkit: Path) -> list[str]:
    """The WordNet id of each validation image, in the order of their numbers.

    The development kit counts the classes in an order of its own, which its table of synsets explains.

    Raises:
        DataError: it is not the development kit.
    """
    from scipy.io import loadmat

    folder = "ILSVRC2012_devkit_t12/data"
    try:
        with tarfile.open(devkit, "r:gz") as tar:
            table, truth = (
                _content(tar, f"{folder}/{name}")
                for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            )
        content = loadmat(io.BytesIO(table), squeeze_me=True)  # type: ignore[arg-type]  # an open file does as well
        synsets = content["synsets"]
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        classes = [wnids[int(number)] for number in truth.split()]
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{devkit} is not the development kit of ILSVRC 2012: {error!r}; get it again"
        ) from None
    return classes


def _content(tar: tarfile.TarFile, name: str) -> bytes:
    stream = tar.extractfile(name)
    if stream is None:
        raise KeyError(name)
    with stream:
        return stream.read()


# Listing -------------------------------------------------------------------------------------------------------------


def _listed(info: DatasetInfo, folder: Path, part: str, reporter: Reporter) -> Iterable[Line]:
    paths = list(_images(info, folder / part))
    reporter.stage(f"hashing {part}", len(paths), "image")

    def line(path: Path) -> Line:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return Line(sha256, path.stat().st_size, path.relative_to(folder).as_posix())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, found in enumerate(pool.map(line, paths), 1):
            yield found
            reporter.advance(done)


def _images(info: DatasetInfo, folder: Path) -> Iterator[Path]:
    """
    Raises:
        DataError: the folders are not one per class of ImageNet, or an image lies in the wrong one.
    """
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    strange = [entry for entry in classes if not _WNID.fullmatch(entry.name)]
    if strange:
        wnid = _WNID.match(strange[0].name.lower())
        twice = f" (a second folder of class {wnid[0]}?)" if wnid else ""
        raise DataError(f"{strange[0]} is not named as a class of ImageNet{twice}; move it out of {folder}")
    if len(classes) != info.classes:
        raise DataError(
            f"{folder} has {len(classes):,} class folders where {info.classes:,} were expected; is it another data set, "
            "or not completely unpacked?"
        )
    for entry in classes:
        for path in sorted(path for path in entry.iterdir() if path.suffix.lower() in {".jpeg", ".jpg"}):
            named = _WNID.match(path.name)
            if named and named[0] != entry.name:
                raise DataError(
                    f"{path} is named after another class than its folder; unpack the archive again"
                )
            yield path
