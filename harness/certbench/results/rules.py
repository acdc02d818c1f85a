"""The rules that rows of one table keep, checked whenever rows are written and whenever they are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from certbench.contract import Deployment, Guarantee, Outcome, Verdict
from certbench.errors import DataError
from certbench.recipe import is_too_deep
from certbench.results.schema import table_spec

VERDICTS: tuple[str, ...] = get_args(Verdict)
GUARANTEES: tuple[str, ...] = get_args(Guarantee)
DEPLOYMENTS: tuple[str, ...] = get_args(Deployment)
OUTCOMES: tuple[str, ...] = get_args(Outcome)
WITNESSED = ("falsified", "falsified_in_float", "refuted", "refuted_in_float")
"""Outcomes of balls in which an attack found a flip."""
UNDECIDED = ("error", "not_attacked")
"""Outcomes of balls that another try may decide."""
KINDS = ("recipe_radius", "certified_radius", "recount")
FAILURES = ("error", "timeout", "not_run")
"""Verdicts of images that were not decided: no radius, and no prediction, need be known."""

LARGEST = 1e9
"""No noise, and no distance between images, is larger in units of the pixel range; sums of such numbers stay numbers."""
LONGEST = 1e12
"""Seconds that no stage takes."""
MOST = 2**53
"""Draws that no certificate takes; float64 holds every count up to it."""

RUN_ID = re.compile(r"[0-9a-f]{16}")
DIGEST = re.compile(r"[0-9a-f]{8,64}")
FRACTION = re.compile(r"[0-9]{1,18}(/[0-9]{1,18})?")
STAGE = re.compile(r"train|certify-.+-[0-9a-f]{8}|audit-.+-[0-9a-f]{8}")

_AGREE = {  # a column, and where the recipe says the same
    "seed": ("seed",),
    "dataset": ("dataset",),
    "model": ("model",),
    "norm": ("threat", "norm"),
    "radius": ("threat", "radius"),
    "sigma": ("threat", "sigma"),
    "cap": ("certify", "cap"),
    "epochs": ("train", "epochs"),
    "method": ("method", "name"),
}


def check_table(table: pa.Table, name: str, where: str) -> None:
    """Refuse a table that breaks a rule; ``where`` names its file in the message.

    Raises:
        DataError: wrong columns, a null where there must be a value, duplicate rows, or a row that cannot be true.
    """
    problem = next(problems_of(table, name), None)
    if problem is not None:
        raise DataError(f"{where}: {problem}")


def problems_of(table: pa.Table, name: str) -> Iterator[str]:
    """Every rule that a table of that name breaks, one line each; lazily, the first is the cheapest to find."""
    spec = table_spec(name)
    if not table.schema.equals(spec.schema):
        yield schema_difference(table.schema, spec.schema)
        return
    for field in spec.schema:
        if not field.nullable and table.column(field.name).null_count:
            yield f"column {field.name!r} holds a null"
            return
    if _has_duplicates(table, spec.key):
        yield f"holds two rows of one {' / '.join(spec.key)}"
    yield from _RULES[name](table)


def _has_duplicates(table: pa.Table, key: Sequence[str]) -> bool:
    """Whether two rows share a key. Rows sorted by a number that never repeats, as files hold them, cost next to nothing;
    of others every column of the key is counted off and the counts combined into one number per row."""
    if table.num_rows < 2:
        return False
    if "index" in key and bool(np.all(np.diff(table.column("index").to_numpy()) > 0)):
        return False
    code = np.zeros(table.num_rows, dtype=np.int64)
    for name in key:
        values = pc.dictionary_encode(table.column(name)).combine_chunks()
        code = code * len(values.dictionary) + values.indices.to_numpy()
    return bool(np.any(np.diff(np.sort(code)) == 0))


def schema_difference(found: pa.Schema, wanted: pa.Schema) -> str:
    """What makes the columns of a file others than those wanted, in words."""
    if len(set(found.names)) != len(found.names):
        return "has two columns of one name"
    missing = [name for name in wanted.names if name not in found.names]
    unknown = [name for name in found.names if name not in wanted.names]
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has the unknown {_strangers(unknown)}"] if unknown else []
        return f"has wrong columns: {' and '.join(parts)}"
    wrong = next((field for field in wanted if not found.field(field.name).equals(field)), None)
    return f"has column {wrong.name!r} of a wrong type" if wrong else "has its columns in a wrong order"


def _strangers(unknown: Sequence[str]) -> str:
    """Anybody may have chosen these names, and how many there are."""
    shown = ", ".join(repr(name[:40]) for name in unknown[:3])
    return f"{shown} and {len(unknown) - 3} more" if len(unknown) > 3 else shown


# Runs --------------------------------------------------------------------------------------------------------------


def parse_fraction(text: str) -> Fraction:
    """An exact positive radius as rows write it.

    Raises:
        ValueError: not a reduced positive fraction such as ``8/255``.
    """
    if not FRACTION.fullmatch(text) or int(text.partition("/")[2] or 1) == 0 or str(Fraction(text)) != text:
        raise ValueError(f'{text[:50]!r} is not a reduced fraction such as "8/255"')
    value = Fraction(text)
    if value <= 0:
        raise ValueError("a radius lies above 0")
    return value


def _run_rules(table: pa.Table) -> Iterator[str]:
    for row in table.to_pylist():
        for problem in _run_problems(row):
            yield f"run {row['run_id'][:40]!r}: {problem}"


def _run_problems(row: Mapping[str, Any]) -> Iterator[str]:
    if not RUN_ID.fullmatch(row["run_id"]):
        yield "a run id has sixteen hexadecimal digits"
    for name in ("protocol", "method", "dataset", "model", "norm", "recipe_name"):
        if not row[name].strip():
            yield f"{name} is empty"
    for name, least in (("numerics", 1), ("parameters", 0), ("seed", 0), ("epochs", 0)):
        if row[name] < least:
            yield f"{name} = {row[name]} lies below {least}"
    if row["sigma"] is not None and not 0 < row["sigma"] <= LARGEST:
        yield f"sigma = {row['sigma']} is not a positive number up to {LARGEST:g}"
    if (teacher := row["teacher_digest"]) is not None and not re.fullmatch(r"[0-9a-f]{64}", teacher):
        yield "teacher_digest is not 64 hexadecimal digits"
    yield from _radius_problems(row)
    yield from _recipe_problems(row)


def _radius_problems(row: Mapping[str, Any]) -> Iterator[str]:
    if row["radius"] is None and row["sigma"] is None:
        yield "has neither radius nor sigma"
    found = {}
    for name in ("radius", "cap"):
        if row[name] is not None:
            try:
                found[name] = parse_fraction(row[name])
            except ValueError as error:
                yield f"{name}: {error}"
    if len(found) == 2 and found["cap"] < found["radius"]:
        yield f"cap {row['cap']} lies below radius {row['radius']}"


def _recipe_problems(row: Mapping[str, Any]) -> Iterator[str]:
    try:
        recipe = json.loads(row["recipe"])
        canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError):
        yield "recipe is not JSON"
        return
    if not isinstance(recipe, dict) or canonical != row["recipe"]:
        yield "recipe is not a canonical JSON object"
        return
    if is_too_deep(recipe):
        yield "recipe is nested too deeply"
        return
    for column, path in _AGREE.items():
        said: Any = recipe
        for key in path:
            said = said.get(key) if isinstance(said, dict) else None
        if said is not None and said != row[column]:
            yield f"{column} is {row[column]!r}, but its recipe says {said!r}"


# Certificates ------------------------------------------------------------------------------------------------------


def _certificate_rules(table: pa.Table) -> Iterator[str]:
    yield from _names(table)
    column = table.column
    verdict, radius, margin = column("verdict"), column("radius"), column("margin")
    statistical = pc.equal(column("guarantee"), "statistical")
    failed = pc.is_in(verdict, pa.array(FAILURES))
    is_certified, is_missed = pc.equal(verdict, "certified"), pc.equal(verdict, "misclassified")
    right = pc.fill_null(pc.equal(column("prediction"), column("label")), False)
    known = pc.is_valid(column("prediction"))
    abstained = pc.equal(verdict, "abstain")

    def proved(values: Any) -> Any:
        return pc.and_(values, pc.invert(statistical))

    broken: dict[str, Callable[[], Any]] = {
        "index is negative": lambda: pc.less(column("index"), 0),
        "label is negative": lambda: pc.less(column("label"), 0),
        "prediction is negative": lambda: pc.less(column("prediction"), 0),
        "passes is negative": lambda: pc.less(column("passes"), 0),
        "radius is not finite": lambda: pc.invert(pc.is_finite(radius)),
        "radius is negative": lambda: pc.less(radius, 0.0),
        f"radius is larger than {LARGEST:g}": lambda: pc.and_(
            pc.greater(radius, LARGEST), pc.is_finite(radius)
        ),
        "radius is null though the image was decided": lambda: pc.and_(pc.is_null(radius), pc.invert(failed)),
        "margin is not a number": lambda: pc.or_(pc.is_nan(margin), pc.equal(margin, math.inf)),
        "is certified with a prediction that is not the label": lambda: pc.and_(
            is_certified, pc.invert(right)
        ),
        "is certified without a positive radius": lambda: pc.and_(is_certified, _not_positive(radius)),
        "is certified without a positive margin": lambda: proved(
            pc.and_(is_certified, _not_positive(margin))
        ),
        "is misclassified though the prediction is the label": lambda: pc.and_(is_missed, right),
        "is misclassified without a prediction": lambda: pc.and_(is_missed, pc.invert(known)),
        "is misclassified or abstains, yet has a radius": lambda: pc.and_(
            pc.or_(is_missed, abstained), pc.not_equal(radius, 0.0)
        ),
        "is decided without a prediction": lambda: proved(pc.invert(pc.or_(known, failed))),
        "has a wrong prediction but is not misclassified": lambda: proved(
            pc.and_(pc.and_(known, pc.invert(right)), pc.invert(pc.or_(is_missed, failed)))
        ),
        "sigma is not a positive number": lambda: _unless(pc.greater(column("sigma"), 0.0), column("sigma")),
        "alpha is not between 0 and 1/2": lambda: _unless(
            pc.and_(pc.greater(column("alpha"), 0.0), pc.less(column("alpha"), 0.5)), column("alpha")
        ),
        "k exceeds n": lambda: pc.greater(column("k"), column("n")),
        "a count is negative": lambda: _any(
            lambda values: pc.less(values, 0),
            table,
            ("n0", "n", "k", "draws", "straddling", "enumerated"),
        ),
        "a count is larger than 2^53": lambda: _any(
            lambda values: pc.greater(values, MOST), table, ("n0", "n", "k", "draws")
        ),
    }
    for problem, mask in broken.items():
        yield from _first(table, mask(), problem)


def _names(table: pa.Table) -> Iterator[str]:
    for name, known in (("verdict", VERDICTS), ("guarantee", GUARANTEES), ("deploy", DEPLOYMENTS)):
        mask = pc.invert(pc.is_in(table.column(name), pa.array(known)))
        yield from _first(table, mask, f"{name} is none of {', '.join(known)}")
    yield from _identifiers(table, ("certifier",), ("settings_digest",))


def _identifiers(table: pa.Table, names: tuple[str, ...], digests: tuple[str, ...]) -> Iterator[str]:
    for name, pattern in (("run_id", RUN_ID), *((digest, DIGEST) for digest in digests)):
        for value in distinct(table.column(name)):
            if not pattern.fullmatch(value):
                yield f"{name} {value[:40]!r} is not a hexadecimal digest"
    for name in names:
        if "" in distinct(table.column(name)):
            yield from _first(table, pc.equal(table.column(name), ""), f"{name} is empty")


def distinct(column: pa.ChunkedArray) -> list[Any]:
    """The different values of a column; quickly where, as in most files, there is only one."""
    if len(column) and pc.all(pc.equal(column, column[0])).as_py():
        return [column[0].as_py()]
    values: list[Any] = pc.unique(column).to_pylist()
    return values


def _not_positive(values: Any) -> Any:
    return pc.invert(pc.fill_null(pc.greater(values, 0.0), False))


def _unless(good: Any, values: Any) -> Any:
    """True where a value is there and is neither good nor finite."""
    return pc.invert(pc.and_(good, pc.is_finite(values)))


def _any(is_broken: Callable[[Any], Any], table: pa.Table, names: tuple[str, ...]) -> Any:
    masks = [pc.fill_null(is_broken(table.column(name)), False) for name in names]
    total = masks[0]
    for mask in masks[1:]:
        total = pc.or_(total, mask)
    return total


def _first(table: pa.Table, mask: Any, problem: str) -> Iterator[str]:
    """The problem with the first row it concerns; a null in the mask concerns none."""
    if pc.any(mask).as_py():
        row = table.slice(pc.index(mask, True).as_py(), 1)
        yield f"image {row.column('index')[0].as_py()} of run {row.column('run_id')[0].as_py()[:40]!r}: {problem}"


# Audits ------------------------------------------------------------------------------------------------------------


def _audit_rules(table: pa.Table) -> Iterator[str]:
    for name, known in (("outcome", OUTCOMES), ("kind", KINDS)):
        mask = pc.invert(pc.is_in(table.column(name), pa.array(known)))
        yield from _first(table, mask, f"{name} is none of {', '.join(known)}")
    yield from _identifiers(table, ("certifier", "attack"), ("settings_digest", "attack_settings_digest"))
    radius, found, distance = table.column("ball_radius"), table.column("found"), table.column("distance")
    witnessed = pc.is_in(table.column("outcome"), pa.array(WITNESSED))
    falsified = pc.starts_with(table.column("outcome"), "falsified")
    inside = pc.and_(pc.greater_equal(distance, 0.0), pc.less_equal(distance, radius))
    broken = {
        "index is negative": pc.less(table.column("index"), 0),
        "ball_radius is not a positive number": pc.invert(
            pc.and_(pc.is_finite(radius), pc.greater(radius, 0.0))
        ),
        "found contradicts the outcome": pc.not_equal(found, witnessed),
        "found without a distance within the ball": pc.and_(found, pc.invert(pc.fill_null(inside, False))),
        "has a distance though nothing was found": pc.and_(pc.invert(found), pc.is_valid(distance)),
        "is falsified at a certified radius, which is to be refuted": pc.and_(
            falsified, pc.equal(table.column("kind"), "certified_radius")
        ),
    }
    for problem, mask in broken.items():
        yield from _first(table, mask, problem)


# Timings -----------------------------------------------------------------------------------------------------------


def _timing_rules(table: pa.Table) -> Iterator[str]:
    for row in table.to_pylist():
        for problem in _timing_problems(row):
            yield f"run {row['run_id'][:40]!r}, stage {row['stage'][:60]!r}: {problem}"


def _timing_problems(row: Mapping[str, Any]) -> Iterator[str]:
    if not RUN_ID.fullmatch(row["run_id"]):
        yield "a run id has sixteen hexadecimal digits"
    if not STAGE.fullmatch(row["stage"]):
        yield "a stage is train, or certify-<certifier> or audit-<certifier>-... with 8 digits of a settings digest"
    if row["shard"] < 0:
        yield "shard is negative"
    if not 0 <= row["seconds"] <= LONGEST:
        yield f"seconds = {row['seconds']} is not a duration"
    if row["peak_memory_bytes"] is not None and row["peak_memory_bytes"] < 0:
        yield "peak_memory_bytes is negative"
    if not row["device"].strip():
        yield "device is empty"
    if not _is_utc(row["started_at"]):
        yield f"started_at {row['started_at'][:40]!r} is not an ISO 8601 time in UTC"


def _is_utc(text: str) -> bool:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return False
    return moment.tzinfo is not None and moment.utcoffset() == UTC.utcoffset(None)


# Submissions ------------------------------------------------------------------------------------------------------


def _submission_rules(table: pa.Table) -> Iterator[str]:
    for row in table.to_pylist():
        if not RUN_ID.fullmatch(row["run_id"]):
            yield f"run {row['run_id'][:40]!r}: a run id has sixteen hexadecimal digits"
        if not DIGEST.fullmatch(row["bundle_digest"]):
            yield f"run {row['run_id'][:40]!r}: bundle_digest is not a hexadecimal digest"
        if not row["submitter"].strip():
            yield f"run {row['run_id'][:40]!r}: submitter is empty"
        if row["rechecked"] < 0:
            yield f"run {row['run_id'][:40]!r}: rechecked is negative"


_RULES: dict[str, Callable[[pa.Table], Iterator[str]]] = {
    "runs": _run_rules,
    "certificates": _certificate_rules,
    "audits": _audit_rules,
    "timings": _timing_rules,
    "submissions": _submission_rules,
}
