"""The columns of every result table: explicit, plainly typed and versioned.

A new table is one more entry of :data:`TABLES`, with its rules in :mod:`certbench.results.rules`. A change of columns
raises the table's version and comes with a step in :mod:`certbench.results.migrations`, so that older files stay
readable; a file of any other version is refused, never guessed at.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from certbench.errors import UsageError, nearest


@dataclass(frozen=True)
class TableSpec:
    """One table: its columns, the columns by which rows are sorted and unique, and those that name its files.

    Values of ``plain`` columns rarely repeat: a dictionary of them would be larger than they are.
    """

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    shard: tuple[str, ...]
    version: int = 1
    plain: tuple[str, ...] = ()


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


RUNS = TableSpec(
    name="runs",
    schema=pa.schema(
        [
            _required("run_id", pa.string()),
            _required("protocol", pa.string()),
            _required("method", pa.string()),
            _required("plugin", pa.string()),
            _required("plugin_version", pa.string()),
            _required("numerics", pa.int32()),
            _required("dataset", pa.string()),
            _required("dataset_digest", pa.string()),
            _required("model", pa.string()),
            _required("parameters", pa.int64()),
            _required("norm", pa.string()),
            pa.field("radius", pa.string()),
            pa.field("sigma", pa.float64()),
            pa.field("cap", pa.string()),
            _required("seed", pa.int64()),
            _required("recipe_name", pa.string()),
            _required("recipe", pa.string()),
            _required("checkpoint_digest", pa.string()),
            _required("epochs", pa.int32()),
            _required("torch_version", pa.string()),
            _required("python_version", pa.string()),
            _required("certbench_version", pa.string()),
            pa.field("code_revision", pa.string()),
            pa.field("structure", pa.string()),
            pa.field("teacher_digest", pa.string()),
        ]
    ),
    key=("run_id",),
    shard=("run_id",),
    version=3,
)
"""One row per trained network. ``radius`` and ``cap`` are reduced fractions such as ``8/255``; ``recipe`` is the
canonical JSON of the resolved recipe, published figures included. ``structure`` is a hash of what the network computes
whatever its weights; ``teacher_digest`` the SHA-256 of the weights of the network that this one learnt from. Both are null
in rows made before they were recorded."""

CERTIFICATES = TableSpec(
    name="certificates",
    schema=pa.schema(
        [
            _required("run_id", pa.string()),
            _required("certifier", pa.string()),
            _required("settings_digest", pa.string()),
            _required("index", pa.int32()),
            _required("image_digest", pa.string()),
            _required("label", pa.int32()),
            pa.field("prediction", pa.int32()),
            _required("verdict", pa.string()),
            pa.field("radius", pa.float64()),
            pa.field("margin", pa.float64()),
            _required("guarantee", pa.string()),
            _required("deploy", pa.string()),
            _required("proved_by", pa.string()),
            _required("passes", pa.int32()),
            pa.field("sigma", pa.float64()),
            pa.field("alpha", pa.float64()),
            pa.field("n0", pa.int64()),
            pa.field("n", pa.int64()),
            pa.field("k", pa.int64()),
            pa.field("draws", pa.int64()),
            pa.field("stop_reason", pa.string()),
            pa.field("generator_key", pa.string()),
            pa.field("exact_noise", pa.bool_()),
            pa.field("straddling", pa.int32()),
            pa.field("enumerated", pa.int32()),
        ]
    ),
    key=("run_id", "certifier", "settings_digest", "index"),
    shard=("run_id", "certifier", "settings_digest"),
    plain=("index", "image_digest", "radius", "margin"),
)
"""One row per image and certifier. ``prediction`` is null where none was made, ``radius`` where none is known."""

AUDITS = TableSpec(
    name="audits",
    schema=pa.schema(
        [
            _required("run_id", pa.string()),
            _required("certifier", pa.string()),
            _required("settings_digest", pa.string()),
            _required("index", pa.int32()),
            _required("attack", pa.string()),
            _required("attack_settings_digest", pa.string()),
            _required("ball_radius", pa.float64()),
            _required("kind", pa.string()),
            _required("found", pa.bool_()),
            pa.field("distance", pa.float64()),
            _required("outcome", pa.string()),
            pa.field("attack_summary", pa.string()),
            pa.field("attack_limit", pa.string()),
        ]
    ),
    key=("run_id", "certifier", "settings_digest", "attack", "attack_settings_digest", "index", "kind"),
    shard=("run_id", "certifier", "settings_digest", "attack", "attack_settings_digest"),
    version=2,
    plain=("index", "ball_radius"),
)
"""One row per image, attack and ``kind`` of ball: ``recipe_radius`` for every correct image, ``certified_radius`` for
every image with a proved radius, and of a statistical one also ``recount``: fresh draws at the image itself. ``found``:
the attack flipped the deployed network; ``outcome`` says at which level that holds. ``distance`` is that of the witness,
rounded up. ``attack_summary`` says in words what the settings digest names, ``attack_limit`` why no witness could be
confirmed, if so. They stand beside certificates and never change them."""

TIMINGS = TableSpec(
    name="timings",
    schema=pa.schema(
        [
            _required("run_id", pa.string()),
            _required("stage", pa.string()),
            _required("shard", pa.int32()),
            _required("seconds", pa.float64()),
            _required("device", pa.string()),
            pa.field("peak_memory_bytes", pa.int64()),
            _required("started_at", pa.string()),
        ]
    ),
    key=("run_id", "stage", "shard", "started_at"),
    shard=("run_id", "stage"),
)
"""All that differs between two equal runs. Rows accumulate: every session that works on a shard of a stage (the first,
and each one that resumes it) adds its own row, so a stage has cost the sum of its rows. ``shard`` is 0 where the work
is not split."""

SUBMISSIONS = TableSpec(
    name="submissions",
    schema=pa.schema(
        [
            _required("run_id", pa.string()),
            _required("submitter", pa.string()),
            _required("bundle_digest", pa.string()),
            _required("rechecked", pa.int32()),
        ]
    ),
    key=("run_id",),
    shard=("run_id",),
)
"""One row per run that was imported. ``rechecked``: how many of its certificates, drawn at random, this harness has made
again from the checkpoint and found equal; 0 where none was. A run without a row here was recorded by this harness."""

TABLES = {spec.name: spec for spec in (RUNS, CERTIFICATES, AUDITS, TIMINGS, SUBMISSIONS)}


def table_spec(name: str) -> TableSpec:
    """The table of that name.

    Raises:
        UsageError: no such table; names the nearest.
    """
    if name not in TABLES:
        raise UsageError(f"unknown table {name!r}; {nearest(name, TABLES)}")
    return TABLES[name]
