"""Runs packed into one Parquet file for somebody else, and unpacked again as input that nobody vouches for.

A bundle is a table of whole result files: what table each belongs to, how many rows it has, its SHA-256 and its bytes,
after a first line with the manifest. It holds no paths: files are named anew from the rows inside, once these have kept
every rule. Nothing in it is executed, and what it may unfold to is bounded before it is read
(:mod:`certbench.results.unfolding`). What is unpacked joins a store by :mod:`certbench.results.joining`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from certbench.errors import DataError, UsageError
from certbench.recipe import parse_recipe
from certbench.results.checks import check_store, identity_problem
from certbench.results.files import decode, encode, opened, write_atomically
from certbench.results.provenance import versions
from certbench.results.rules import RUN_ID, problems_of
from certbench.results.schema import TABLES, TableSpec
from certbench.results.store import ResultStore
from certbench.results.unfolding import Bounds, measure

FORMAT = 1
MANIFEST = "manifest"
PACKED = ("runs", "certificates", "audits", "timings")
"""The tables that travel; who submitted a run is said by whoever imports it."""
MAX_BUNDLE_BYTES = 2**30
"""As it comes, and again as it unfolds."""
MAX_RATIO = 100
"""By how many times a bundle may unfold, besides its first MiB: the files inside are compressed already."""
MAX_FILES = 100_000
MAX_RUNS = 1_000
"""Every row of a board is compared with every other, and their recipes lie in memory together."""
MAX_ROWS = {"runs": 1, "certificates": 2_000_000, "audits": 2_000_000, "timings": 10_000}
"""Of one file of a table."""
MAX_FILE_BYTES = 2**29
"""What one file inside may unfold to."""
MAX_ALL_BYTES = 2**34
"""What all files inside may unfold to, one after the other."""
MAX_MANIFEST = 2**22
MAX_SUBMITTER = 100
MAX_REASON = 500

BUNDLE = TableSpec(
    name="bundle",
    schema=pa.schema(
        [
            pa.field("table", pa.string(), nullable=False),
            pa.field("rows", pa.int64(), nullable=False),
            pa.field("digest", pa.string(), nullable=False),
            pa.field("content", pa.binary(), nullable=False),
        ]
    ),
    key=("digest",),
    shard=(),
)


@dataclass(frozen=True)
class Packed:
    """What a bundle says of itself: who made it, with what, how many runs and files, and its own digest."""

    submitter: str
    certbench_version: str
    runs: tuple[str, ...]
    files: int
    digest: str


def export_runs(store: ResultStore, run_ids: Sequence[str], path: Path, submitter: str) -> Packed:
    """Pack runs with their certificates, audits and timings.

    Raises:
        UsageError: no such run, a run that somebody else submitted, more than a bundle may hold, or a name that cannot be
            shown.
        DataError: a file of theirs is damaged.
        RunError: the bundle cannot be written.
    """
    problem = _submitter_problem(submitter)
    if problem:
        raise UsageError(f"--submitter: {problem}")
    foreign = {row["run_id"]: row["submitter"] for row in store.read("submissions").to_pylist()}
    for run_id in run_ids:
        if not store.has_run(run_id):
            raise UsageError(f"no run {run_id!r} in {store.folder}; `certbench results list` shows them")
        if run_id in foreign:
            raise UsageError(f"run {run_id} was submitted by {foreign[run_id]!r}; it is theirs to hand on")
    wanted = set(run_ids)
    files = [
        (name, store.load(name, path).num_rows, path.read_bytes())
        for name in PACKED
        for path in store.paths(name)
        if path.name[:16] in wanted
    ]
    manifest = {
        "format": FORMAT,
        "submitter": submitter,
        "certbench_version": versions()["certbench_version"],
        "runs": sorted(wanted),
        "files": len(files),
    }
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode()
    lines = [(MANIFEST, 1, text), *files]
    size = sum(len(content) for _, _, content in lines)
    if len(lines) > MAX_FILES or len(wanted) > MAX_RUNS or size > MAX_BUNDLE_BYTES:
        raise UsageError(
            f"these are more than the {MAX_RUNS} runs or {MAX_BUNDLE_BYTES >> 20} MiB of a bundle; export fewer runs"
        )
    table = pa.table(
        {
            "table": [name for name, _, _ in lines],
            "rows": [rows for _, rows, _ in lines],
            "digest": [hashlib.sha256(content).hexdigest() for _, _, content in lines],
            "content": [content for _, _, content in lines],
        },
        schema=BUNDLE.schema,
    )
    content = encode(table, BUNDLE)
    write_atomically(path, content)
    return _packed(manifest, content)


def _packed(manifest: Mapping[str, Any], content: bytes) -> Packed:
    return Packed(
        manifest["submitter"],
        manifest["certbench_version"],
        tuple(manifest["runs"]),
        manifest["files"],
        hashlib.sha256(content).hexdigest(),
    )


# Reading what nobody vouches for ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unpacked:
    """A bundle whose rows kept every rule, as a store of its own in a folder that goes with the context."""

    packed: Packed
    store: ResultStore


class Refused(DataError):
    """A bundle is not taken; ``reasons`` are all that were found, each one line of bounded length."""

    def __init__(self, where: str, reasons: Iterable[str]) -> None:
        self.reasons = tuple(_line(reason) for reason in dict.fromkeys(reasons))
        count = f"{len(self.reasons)} reason{'s' if len(self.reasons) > 1 else ''}"
        super().__init__(f"{where} is refused, for {count}: {self.reasons[0]}")


def _line(reason: str) -> str:
    """A reason may quote what a stranger wrote."""
    text = "".join(c if c.isprintable() else " " for c in reason)
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."


def unpack(path: Path, into: Path) -> Unpacked:
    """Check a bundle from elsewhere and lay its rows out as a store in the empty folder ``into``.

    Raises:
        Refused: with every reason that was found.
        UsageError: there is no such file.
    """
    content, store = _content(path), ResultStore(into)
    manifest: dict[str, Any] = {}
    reasons: list[str] = []
    try:
        manifest = _read(content, store, reasons)
        if not reasons:
            reasons += _together(store, manifest["runs"])
    except DataError as error:
        reasons.append(str(error))
    if reasons:
        raise Refused(path.name, reasons)
    return Unpacked(_packed(manifest, content), store)


def _read(content: bytes, store: ResultStore, reasons: list[str]) -> dict[str, Any]:
    """The manifest, once every file of a bundle was laid out; whatever is wrong joins ``reasons``.

    Raises:
        DataError: the bundle cannot be read on.
    """
    most = min(MAX_BUNDLE_BYTES, 2**20 + MAX_RATIO * len(content))
    measure(content, BUNDLE, Bounds(MAX_FILES, most, dictionaries=False))
    lines = _lines(opened(content, BUNDLE, "it")[0])
    manifest = _manifest(next(lines, None), reasons)
    files = _lay_out(store, lines, reasons)
    if manifest and manifest["files"] != files:
        reasons.append(f"its manifest names {manifest['files']} files, but it holds {files}")
    return manifest


def _content(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_BUNDLE_BYTES else b""
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    if not content:
        why = "is empty" if size == 0 else f"is larger than {MAX_BUNDLE_BYTES >> 20} MiB"
        raise Refused(path.name, [why])
    return content


def _lines(file: pq.ParquetFile) -> Iterator[dict[str, Any]]:
    """The bundle's lines, a few at a time.

    Raises:
        DataError: a page is not what its header says.
    """
    try:
        for batch in file.iter_batches(batch_size=64, use_threads=False):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"is not readable Parquet: {str(error).splitlines()[0]}") from None


def _manifest(line: Mapping[str, Any] | None, reasons: list[str]) -> dict[str, Any]:
    """The manifest; empty where it is none, and whatever is wrong with it joins ``reasons``."""
    if line is None or line["table"] != MANIFEST:
        reasons.append("has no manifest")
        return {}
    if len(line["content"]) > MAX_MANIFEST:
        reasons.append(f"its manifest has more than {MAX_MANIFEST} bytes")
        return {}
    try:
        manifest = json.loads(line["content"])
    except (ValueError, RecursionError):
        reasons.append("its manifest is not JSON")
        return {}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        reasons.append(f"its format is not {FORMAT}, the one this certbench reads")
        return {}
    kinds = {"submitter": str, "certbench_version": str, "runs": list, "files": int}
    if any(not isinstance(manifest.get(name), kind) for name, kind in kinds.items()):
        reasons.append("its manifest lacks " + ", ".join(kinds))
        return {}
    if problem := _submitter_problem(manifest["submitter"]):
        reasons.append(problem)
    if not all(isinstance(run_id, str) and RUN_ID.fullmatch(run_id) for run_id in manifest["runs"]):
        reasons.append("its manifest names a run by no run id")
    return manifest


def _submitter_problem(name: str) -> str | None:
    if not name.strip() or len(name) > MAX_SUBMITTER or not name.isprintable():
        return f"a submitter's name has 1 to {MAX_SUBMITTER} printable characters"
    return None


def _lay_out(store: ResultStore, lines: Iterable[Mapping[str, Any]], reasons: list[str]) -> int:
    """Place the bundle's files one after the other, and count them; whatever is wrong with one joins ``reasons``."""
    names: set[str] = set()
    number = unfolded = runs = 0
    for number, line in enumerate(lines, 1):
        runs += line["table"] == "runs"
        if runs > MAX_RUNS:
            reasons.append(f"holds more than {MAX_RUNS} runs")
            return number
        if line["table"] not in PACKED:
            reasons.append(f"holds a table {line['table'][:40]!r}, which no bundle has")
            continue
        try:
            bounds = Bounds(MAX_ROWS[line["table"]], min(MAX_FILE_BYTES, MAX_ALL_BYTES - unfolded))
            unfolded += measure(line["content"], TABLES[line["table"]], bounds)
            problems = _take(store, line, names)
        except DataError as error:
            problems = [str(error)]
        reasons += [without(store, f"{line['table']} file {number}: {problem}") for problem in problems]
    return number


def _take(store: ResultStore, line: Mapping[str, Any], names: set[str]) -> list[str]:
    """Lay one file out under the name that its rows give it, or say all that is wrong with it.

    Raises:
        DataError: not a file of its table, or a second one of its name.
    """
    table, content = line["table"], line["content"]
    rows = decode(content, TABLES[table], "it")
    problems = list(problems_of(rows, table)) if rows.num_rows else ["holds no row"]
    if table == "runs" and not problems:
        problems = [problem for row in rows.to_pylist() for problem in _recipe_problems(row)]
    if hashlib.sha256(content).hexdigest() != line["digest"]:
        problems.append("has another digest than the bundle says")
    keys = rows.select([name for name in TABLES[table].key if name in rows.column_names])
    if not keys.equals(keys.sort_by([(name, "ascending") for name in keys.column_names])):
        problems.append("has its rows in another order than certbench writes them")
    if rows.num_rows != line["rows"]:
        problems.append(f"has {rows.num_rows} rows where the bundle says {line['rows']}")
    if problems:
        return problems
    path = store.place(table, rows, content)
    name = f"{table}/{path.name}".casefold()
    if name in names:  # of other bytes in other letters, which some file systems take for the same
        return [f"is the second file named {path.name}"]
    names.add(name)
    return []


def _together(store: ResultStore, runs: Sequence[str]) -> Iterator[str]:
    """What is wrong with the files of a bundle beside each other."""
    for line in check_store(store):
        yield without(store, line)
    if sorted(path.stem for path in store.paths("runs")) != sorted(runs):
        yield "its manifest names other runs than it holds"
    if not store.paths("certificates"):
        yield "holds no certificates"


def _recipe_problems(run: Mapping[str, Any]) -> Iterator[str]:
    """Whether the recorded text is a recipe, whole and as certbench writes it, and protocol and id of the row are its own."""
    if problem := identity_problem(run):
        yield problem
    where = f"run {run['run_id']}: its recipe"
    try:
        recipe = parse_recipe(json.loads(run["recipe"]), run["recipe_name"], where=where)
        text = recipe.canonical_json()
    except UsageError as error:
        yield str(error)
        return
    if text != run["recipe"]:
        yield f"{where} is not the whole recipe {run['recipe_name']!r} as certbench writes it"
    if recipe.protocol != run["protocol"]:
        yield f"run {run['run_id']} is of protocol {run['protocol']!r}, and its recipe of {recipe.protocol!r}"


def without(store: ResultStore, line: str) -> str:
    """A problem without the folder that a bundle was laid out in, which is gone when anybody reads it."""
    return line.replace(f"{store.folder}{os.sep}", "")
