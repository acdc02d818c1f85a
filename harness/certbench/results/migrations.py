"""Older versions of tables, brought up to date one step at a time when they are read. Files are never rewritten by it."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from certbench.results.schema import TableSpec

Step = Callable[[pa.Table], pa.Table]

_SUMMARIES = {
    "b809aa7507b33669": "APGD-CE 20 steps; APGD-DLR 20 steps",
    "c83ecf6a0729b2a4": "APGD-CE 100 steps, 3 restarts; APGD-DLR 100 steps, 3 restarts",
    "9ba3a4daac0f75db": "PGD-CE 40 steps",
    "5947e98d88b406c1": "PGD-DLR 40 steps",
    "18c591fefddc8c66": "APGD-CE 100 steps",
    "b67c4de9a5c12e73": "APGD-DLR 100 steps",
}
"""What the attacks of version 1 did, by the digest of their settings, which names it exactly."""


def _audits_say_how(table: pa.Table) -> pa.Table:
    """Version 2 of audits: what the attack did in words, where it is known, and what kept a witness from counting."""
    digests = table.column("attack_settings_digest").combine_chunks()
    known = pc.index_in(digests, pa.array(list(_SUMMARIES)))
    summaries = pa.array(list(_SUMMARIES.values())).take(known)
    table = table.append_column(pa.field("attack_summary", pa.string()), summaries)
    return table.append_column(pa.field("attack_limit", pa.string()), pa.nulls(table.num_rows, pa.string()))


def _runs_say_structure(table: pa.Table) -> pa.Table:
    """Version 2 of runs: a hash of how the network is built, unknown of older ones."""
    return table.append_column(pa.field("structure", pa.string()), pa.nulls(table.num_rows, pa.string()))


def _runs_say_teacher(table: pa.Table) -> pa.Table:
    """Version 3 of runs: the digest of the network that was learnt from, unknown of older ones."""
    return table.append_column(pa.field("teacher_digest", pa.string()), pa.nulls(table.num_rows, pa.string()))


STEPS: dict[tuple[str, int], Step] = {
    ("audits", 1): _audits_say_how,
    ("runs", 1): _runs_say_structure,
    ("runs", 2): _runs_say_teacher,
}
"""(table, version) -> what makes the next version of it."""


def migrated(table: pa.Table, spec: TableSpec, version: int) -> pa.Table:
    """The rows of a file of that version in the columns of today; broken columns are left for the rules to report."""
    for step in range(version, spec.version):
        try:
            table = STEPS[spec.name, step](table)
        except KeyError:  # a column that the step reads is missing
            return table
    return table
