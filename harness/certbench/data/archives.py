"""Taking single files out of archives that nobody vouches for."""

from __future__ import annotations

import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from certbench.data.info import FileInfo
from certbench.errors import DataError


def extract(archive: Path, target: Path, folder: PurePosixPath, files: list[FileInfo], limit: int) -> None:
    """Copy the named files out of ``folder`` in a ``.tar.gz`` archive into ``target``.

    Names come from the catalogue, never from the archive; other files in it are passed over.

    Raises:
        DataError: a member that is a link or a device, or has an absolute name or ``..`` in it; members of more than
            ``limit`` bytes together; a file that is missing or has another size; or no readable archive.
    """
    wanted = {str(folder / file.name): file for file in files}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            unpacked = 0
            for member in tar:
                _refuse_unsafe(member)
                unpacked += member.size
                if unpacked > limit:
                    raise DataError(f"refused the archive: it unpacks to more than {limit:,} bytes")
                file = wanted.pop(member.name, None)
                if file is not None:
                    _extract_one(tar, member, target / file.name, file)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"the downloaded archive is damaged: {error}; try again later") from None
    if wanted:
        raise DataError(f"the downloaded archive lacks {', '.join(sorted(wanted))}; try again later")


def _refuse_unsafe(member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"refused the archive: member {member.name!r} points outside it")
    if not (member.isreg() or member.isdir()):
        raise DataError(f"refused the archive: member {member.name!r} is neither a file nor a folder")


def _extract_one(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, file: FileInfo) -> None:
    source = tar.extractfile(member) if member.isreg() else None
    if source is None or member.size != file.size:
        raise DataError(f"refused the archive: {member.name!r} is not a file of {file.size:,} bytes")
    with source, target.open("xb") as stream:
        shutil.copyfileobj(source, stream)
