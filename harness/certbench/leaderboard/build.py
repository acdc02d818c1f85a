"""Derived files: built from the rows in ``<folder>/results``, written beside them, and compared with them.

What is built is a function of the rows and of ``methods.json`` beside the boards, to which the cards and published
figures of installed methods are copied (:mod:`certbench.leaderboard.published`); and of the versions of the packages
that draw the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from certbench.errors import RunError, UsageError
from certbench.leaderboard import page as page_room
from certbench.leaderboard import records, sentences, tables
from certbench.leaderboard.board import Board, boards
from certbench.leaderboard.comparison import reproduction
from certbench.leaderboard.published import NOTES, Notes, read_notes, refreshed
from certbench.leaderboard.tradeoff import tradeoffs
from certbench.plugins import installed
from certbench.results.files import write_atomically
from certbench.results.store import ResultStore

PAGE = "index.html"
_MARKERS = {
    ".md": (f"{tables.MARKER}\n",),
    ".tex": (f"{tables.LATEX_MARKER}\n",),
    ".csv": records.CSV_MARKERS,
    ".json": ('{\n "derived": "certbench: ',),
    ".html": (page_room.MARKER,),
}
"""How derived files begin, by their suffix; no other file is ever replaced or removed."""
_RESERVED = ("index", "reproduction", "tradeoff")


@dataclass(frozen=True)
class Built:
    """The boards, the text of every derived file by its name, and why the page is not among them, if it is not."""

    boards: list[Board]
    files: dict[str, str]
    without_page: str | None = None


def read_boards(folder: Path, notes: Notes | None = None) -> list[Board]:
    """The boards of a folder that holds ``results/``.

    Raises:
        UsageError: no such folder, or no certificates in it.
        DataError: the rows are damaged or contradict each other.
    """
    if not (folder / "results").is_dir():
        raise UsageError(
            f"{folder} holds no folder results/; name one that does, such as the --out of `certbench run`"
        )
    return boards(ResultStore(folder / "results"), notes if notes is not None else read_notes(folder))


def build(folder: Path, page: bool = True) -> Built:
    """Every derived file of a folder; with ``page`` the page too, where what draws it is installed.

    Raises as :func:`read_boards`.
    """
    notes = refreshed(read_notes(folder), installed())
    found = read_boards(folder, notes)
    files: dict[str, str] = {}
    for board in found:
        if board.name in _RESERVED:
            raise UsageError(f"a board cannot be called {board.name!r}, the name of another page")
        files[f"{board.name}.md"] = tables.markdown(board)
        files[f"{board.name}.csv"] = records.comma_separated(board)
        files[f"{board.name}.tex"] = tables.latex(board)
    cells = reproduction([(board.radius, row) for board in found for row in board.standing_rows], notes)
    if cells:
        files["reproduction.md"] = tables.reproduction(cells)
        files["reproduction.csv"] = records.reproduction(cells)
    fronts = tradeoffs(found, ResultStore(folder / "results"))
    if fronts:
        files["tradeoff.md"] = sentences.page(fronts)
        files["tradeoff.csv"] = records.tradeoffs(fronts)
    others = [name for name in ("tradeoff", "reproduction") if f"{name}.md" in files]
    files["index.md"] = tables.index(found, others)
    if notes.methods:
        files[NOTES] = notes.text()
    lacking = page_room.missing() if page else "it was not asked for"
    if lacking is None:
        files[PAGE] = page_room.render(found, fronts, cells, notes)
    return Built(found, files, lacking)


def write(folder: Path, page: bool = True) -> Built:
    """Write the derived files, remove those of boards that are gone, and return what was built.

    A page that cannot be drawn here is removed: it would show other rows than the tables.

    Raises:
        RunError: a file cannot be written, or a file of that name was written by somebody else.
        UsageError, DataError: as :func:`read_boards`; nothing is written then.
    """
    built = build(folder, page)
    files = built.files
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
    return built


@dataclass(frozen=True)
class Checked:
    """Derived files that are not what the rows say, as ``name: missing``, ``differs`` or ``no board``; and what could
    not be compared, with the reason."""

    found: list[str]
    unchecked: str | None = None


def check(folder: Path, page: bool = True) -> Checked:
    """Compare the derived files of a folder with what its rows say. Raises as :func:`read_boards`."""
    built = build(folder, page)
    found = []
    for name, text in built.files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name}: missing")
        elif path.read_bytes() != text.encode():
            found.append(f"{name}: differs")
    unchecked = None
    stale = _stale(folder, built.files)
    if built.without_page and folder / PAGE in stale:
        stale.remove(folder / PAGE)
        unchecked = f"{PAGE} was not compared: {built.without_page}"
    found += [f"{path.name}: no board" for path in stale]
    return Checked(sorted(found), unchecked)


def _stale(folder: Path, files: dict[str, str]) -> list[Path]:
    paths = [path for suffix in _MARKERS for path in folder.glob(f"*{suffix}")]
    return sorted(path for path in paths if path.name not in files and _is_derived(path))


def _is_derived(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(200)
    except OSError:
        return False
    return start.startswith(tuple(marker.encode() for marker in _MARKERS[path.suffix]))
