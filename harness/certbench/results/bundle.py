"""Runs packed into one Parquet file for somebody else, and unpacked again as input that nobody vouches for.

A bundle is a table of whole result files: what table each belongs to, how many rows it has, its SHA-256 and its bytes,
after a first line with the manifest. It holds no paths: files are named anew from the rows inside, once these have kept
every rule. Nothing in it is executed, and what it may unfold to is bounded before it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from certbench.errors import DataError, UsageError
from certbench.recipe import PROTOCOLS
from certbench.results.checks import CrossCheck, check_store
from certbench.results.files import decode, encode, write_atomically
from certbench.results.provenance import versions
from certbench.results.rules import problems_of
from certbench.results.schema import TABLES, TableSpec
from certbench.results.store import ResultStore

FORMAT = 1
MANIFEST = "manifest"
PACKED = ("runs", "certificates", "audits", "timings")
"""The tables that travel; who submitted a run is said by whoever imports it."""
MAX_BUNDLE_BYTES = 2**30
MAX_FILES = 100_000
MAX_ROWS = 2_000_000
MAX_UNPACKED_BYTES = 2**30
"""Of one file."""
MAX_TEXT = 300
MAX_RECIPE = 65_536
MAX_SUBMITTER = 100

BUNDLE = TableSpec(
    name="bundle",
    schema=pa.schema(
        [
            pa.field("table", pa.string(), nullable=False),
            pa.field("rows", pa.int64(), nullable=False),
            pa.field("digest", pa.string(), nullable=False),
            pa.field("content", pa.large_binary(), nullable=False),
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
        UsageError: no such run, a run that somebody else submitted, or a name that cannot be shown.
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
    table = pa.table(
        {
            "table": [name for name, _, _ in lines],
            "rows": [rows for _, rows, _ in lines],
            "digest": [hashlib.sha256(content).hexdigest() for _, _, content in lines],
            "content": pa.array([content for _, _, content in lines], pa.large_binary()),
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
    """A bundle is not taken; ``reasons`` are all that were found."""

    def __init__(self, where: str, reasons: Sequence[str]) -> None:
        super().__init__(
            f"{where} is refused, for {len(reasons)} reason{'s' if len(reasons) > 1 else ''}: {reasons[0]}"
        )
        self.reasons = tuple(reasons)


def unpack(path: Path, into: Path) -> Unpacked:
    """Check a bundle from elsewhere and lay its rows out as a store in the empty folder ``into``.

    Raises:
        Refused: with every reason that was found.
        UsageError: there is no such file.
    """
    packed, files = _open(path)
    store = ResultStore(into)
    reasons = []
    for table, content in files:
        problems = list(_take(store, table, content))
        reasons += [
            f"{table} file {hashlib.sha256(content).hexdigest()[:16]}: {problem}" for problem in problems
        ]
    if not reasons:
        reasons = [_without(into, line) for line in check_store(store, identities=True)]
        found = sorted(row["run_id"] for row in store.read("runs").to_pylist())
        if found != sorted(packed.runs):
            reasons.append("its manifest names other runs than it holds")
    if reasons:
        raise Refused(path.name, reasons)
    return Unpacked(packed, store)


def _open(path: Path) -> tuple[Packed, list[tuple[str, bytes]]]:
    """The manifest and the files of a bundle, each with the digest the bundle gives it."""
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_BUNDLE_BYTES else b""
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    if not content:
        why = "is empty" if size == 0 else f"is larger than {MAX_BUNDLE_BYTES >> 20} MiB"
        raise Refused(path.name, [why])
    try:
        _bounded(content, BUNDLE)
        table = decode(content, BUNDLE, path.name)
    except DataError as error:
        raise Refused(path.name, [str(error)]) from None
    lines = table.to_pylist()
    wrong = [line["table"] for line in lines if hashlib.sha256(line["content"]).hexdigest() != line["digest"]]
    reasons = [f"a {name[:40]!r} file has another digest than the bundle says" for name in wrong]
    manifest = _manifest(lines)
    reasons += manifest if isinstance(manifest, list) else []
    unknown = {line["table"] for line in lines[1:]} - set(PACKED)
    reasons += [f"holds a table {name[:40]!r}, which no bundle has" for name in sorted(unknown)]
    if reasons or isinstance(manifest, list):
        raise Refused(path.name, reasons)
    # Runs first: a store takes certificates only of runs it knows.
    ordered = sorted(lines[1:], key=lambda line: PACKED.index(line["table"]))
    return _packed(manifest, content), [(line["table"], line["content"]) for line in ordered]


def _manifest(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | list[str]:
    """The manifest, or what is wrong with it."""
    if not lines or lines[0]["table"] != MANIFEST:
        return ["has no manifest"]
    try:
        manifest = json.loads(lines[0]["content"])
    except (ValueError, RecursionError):
        return ["its manifest is not JSON"]
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return [f"its format is not {FORMAT}, the one this certbench reads"]
    kinds = {"submitter": str, "certbench_version": str, "runs": list, "files": int}
    if any(not isinstance(manifest.get(name), kind) for name, kind in kinds.items()):
        return ["its manifest lacks " + ", ".join(kinds)]
    problem = _submitter_problem(manifest["submitter"])
    found = [problem] if problem else []
    if manifest["files"] != len(lines) - 1:
        found.append(f"its manifest names {manifest['files']} files, but it holds {len(lines) - 1}")
    return found or manifest


def _submitter_problem(name: str) -> str | None:
    if not name.strip() or len(name) > MAX_SUBMITTER or not name.isprintable():
        return f"a submitter's name has 1 to {MAX_SUBMITTER} printable characters"
    return None


def _take(store: ResultStore, table: str, content: bytes) -> Iterator[str]:
    """Lay one file out under the name that its rows give it, or say what is wrong with it."""
    spec = TABLES[table]
    try:
        _bounded(content, spec)
        rows = decode(content, spec, "it")
    except DataError as error:
        yield str(error)
        return
    problems = list(problems_of(rows, table)) if rows.num_rows else ["holds no row"]
    yield from problems
    if not problems:
        try:
            store.place(table, rows, content)
        except DataError as error:
            yield str(error)


def _bounded(content: bytes, spec: TableSpec) -> None:
    """Refuse a file that would unfold to more than its table can need, before its columns are read.

    Text is read with every distinct value once, since a few bytes can ask for a long text a million times.

    Raises:
        DataError: not readable, or beyond a bound.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        rows, groups = file.metadata.num_rows, file.metadata.num_row_groups
        unpacked = sum(file.metadata.row_group(group).total_byte_size for group in range(min(groups, 1000)))
        if (
            groups > 1000
            or rows > (MAX_FILES if spec is BUNDLE else MAX_ROWS)
            or unpacked > MAX_UNPACKED_BYTES
        ):
            raise DataError(f"unfolds to {rows} rows and {unpacked} bytes, more than a {spec.name} file may")
        texts = [field.name for field in file.schema_arrow if pa.types.is_string(field.type)]
        encoded = pq.ParquetFile(pa.BufferReader(content), read_dictionary=texts)
        for name in texts:
            for chunk in encoded.read(columns=[name], use_threads=False).column(0).chunks:
                longest = pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0
                if longest > (MAX_RECIPE if name == "recipe" else MAX_TEXT):
                    raise DataError(f"has a text of {longest} bytes in {name[:40]!r}")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"is not readable Parquet: {str(error).splitlines()[0]}") from None


def _without(folder: Path, line: str) -> str:
    """A problem without the folder that a bundle was laid out in, which is gone when anybody reads it."""
    return line.replace(f"{folder}/", "")


# Joining a store -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """What an import brought: runs that are new, and runs that were there already with equal rows."""

    new: tuple[str, ...]
    known: tuple[str, ...]
    submitter: str


def join(unpacked: Unpacked, store: ResultStore, rechecked: Mapping[str, int] | None = None) -> Imported:
    """Add the runs of a checked bundle to a store, each labelled with its submitter before its certificates come.

    Raises:
        Refused: a run is there already with other rows, or boards could not be built of both together.
    """
    source = unpacked.store
    runs = [row["run_id"] for row in source.read("runs").to_pylist()]
    known = [run_id for run_id in runs if store.has_run(run_id)]
    reasons = [reason for run_id in known for reason in _differences(source, store, run_id)]
    reasons += _strangers(source, store)
    if reasons:
        raise Refused("the bundle", reasons)
    new = [run_id for run_id in runs if run_id not in known]
    for table in ("runs", "submissions", "certificates", "audits", "timings"):
        if table == "submissions":
            for run_id in new:
                store.write_submission(
                    {
                        "run_id": run_id,
                        "submitter": unpacked.packed.submitter,
                        "bundle_digest": unpacked.packed.digest,
                        "rechecked": (rechecked or {}).get(run_id, 0),
                    }
                )
            continue
        for path in source.paths(table):
            if path.name[:16] in new:
                store.place(table, source.load(table, path), path.read_bytes())
    return Imported(tuple(new), tuple(known), unpacked.packed.submitter)


def _differences(source: ResultStore, store: ResultStore, run_id: str) -> Iterator[str]:
    for name in ("runs", "certificates", "audits"):
        for path in source.paths(name):
            if path.name[:16] != run_id:
                continue
            here = store.folder / name / path.name
            if not here.is_file() or not store.load(name, here).equals(source.load(name, path)):
                yield f"run {run_id} is recorded here already, and its {name} differ ({path.name})"


def _strangers(source: ResultStore, store: ResultStore) -> Iterator[str]:
    """Runs on other images, or under another protocol, than those here: these would spoil the boards of all."""
    ours = {row["run_id"]: row for row in store.read("runs").to_pylist()}
    theirs = {row["run_id"]: row for row in source.read("runs").to_pylist()}
    digests = {row["dataset"]: row["dataset_digest"] for row in ours.values()}
    for row in theirs.values():
        if digests.get(row["dataset"], row["dataset_digest"]) != row["dataset_digest"]:
            yield f"run {row['run_id']} was made on another version of {row['dataset']} than the runs here"
        if row["norm"] == "linf" and row["protocol"] != PROTOCOLS["linf"]:
            yield f"run {row['run_id']} is of protocol {row['protocol']!r}, not of {PROTOCOLS['linf']}"
    check = CrossCheck({**ours, **theirs})
    for path in store.paths("certificates"):
        if ours.get(path.name[:16], {}).get("dataset") in {row["dataset"] for row in theirs.values()}:
            check.problems(store.load("certificates", path))
    for path in source.paths("certificates"):
        yield from check.problems(source.load("certificates", path))
