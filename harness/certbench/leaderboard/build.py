"""Derived files: built from the rows in ``<folder>/results``, written beside them, and compared with them."""

from __future__ import annotations

from pathlib import Path

from certbench.errors import RunError, UsageError
from certbench.leaderboard import tradeoff
from certbench.leaderboard.board import Board, boards
from certbench.leaderboard.tables import CSV_MARKER, MARKER, comma_separated, index, markdown
from certbench.results.files import write_atomically
from certbench.results.store import ResultStore


def read_boards(folder: Path) -> list[Board]:
    """The boards of a folder that holds ``results/``.

    Raises:
        UsageError: no such folder, or no certificates in it.
        DataError: the rows are damaged or contradict each other.
    """
    if not (folder / "results").is_dir():
        raise UsageError(
            f"{folder} holds no folder results/; name one that does, such as the --out of `certbench run`"
        )
    return boards(ResultStore(folder / "results"))


def build(folder: Path) -> dict[str, str]:
    """The text of every derived file by its name; a function of the rows alone. Raises as :func:`read_boards`."""
    found = read_boards(folder)
    files = {"index.md": index(found)}
    for board in found:
        if board.name in {"index", "tradeoff"}:
            raise UsageError(f"a board cannot be called {board.name!r}, the name of another page")
        files[f"{board.name}.md"] = markdown(board)
        files[f"{board.name}.csv"] = comma_separated(board)
    fronts = tradeoff.page(found, ResultStore(folder / "results"))
    if fronts is not None:
        files["tradeoff.md"] = fronts
    return files


def write(folder: Path) -> list[str]:
    """Write the derived files, remove those of boards that are gone, and return the names of the files that stand.

    Only files that carry the marker of derived files are ever replaced or removed.

    Raises:
        RunError: a file cannot be written, or a file of that name was written by somebody else.
        UsageError, DataError: as :func:`read_boards`; nothing is written then.
    """
    files = build(folder)
    for name in files:
        if (folder / name).exists() and not _is_derived(folder / name):
            raise RunError(
                f"{folder / name} was not written by `certbench leaderboard build`; move it out of the way"
            )
    for name, text in files.items():
        content = text.encode()
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            write_atomically(folder / name, content)
    for path in _stale(folder, files):
        path.unlink(missing_ok=True)
    return sorted(files)


def check(folder: Path) -> list[str]:
    """Derived files that are not what the rows say, as ``name: missing``, ``differs`` or ``no board``; empty if none.

    Raises as :func:`read_boards`.
    """
    files = build(folder)
    found = []
    for name, text in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name}: missing")
        elif path.read_bytes() != text.encode():
            found.append(f"{name}: differs")
    found += [f"{path.name}: no board" for path in _stale(folder, files)]
    return sorted(found)


def _stale(folder: Path, files: dict[str, str]) -> list[Path]:
    paths = [*folder.glob("*.md"), *folder.glob("*.csv")]
    return sorted(path for path in paths if path.name not in files and _is_derived(path))


def _is_derived(path: Path) -> bool:
    marker = (CSV_MARKER if path.suffix == ".csv" else f"{MARKER}\n").encode()
    try:
        with path.open("rb") as file:
            return file.read(len(marker)) == marker
    except OSError:
        return False
