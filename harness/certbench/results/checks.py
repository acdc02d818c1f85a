"""The rules that hold between tables: certificates against their run, audits against both, runs against each other."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from certbench.errors import DataError
from certbench.recipe import CORE_NUMERICS, identify
from certbench.results.rules import distinct, parse_fraction, problems_of
from certbench.results.smoothed import smoothed_problems
from certbench.threat import round_down, round_up

if TYPE_CHECKING:
    from certbench.results.store import ResultStore


class CrossCheck:
    """Compares the certificates of run after run with what is known already.

    ``runs`` maps run ids to their rows. Images are compared across runs: those of one data digest have one label and
    one digest per index, whoever certified them.
    """

    def __init__(self, runs: Mapping[str, Mapping[str, Any]]) -> None:
        self._runs = runs
        self._images: dict[str, pa.Table] = {}

    def problems(self, shard: pa.Table) -> list[str]:
        """What is wrong with the certificates of one run by one certifier; each problem is one line."""
        run_id = shard.column("run_id")[0].as_py()
        if run_id not in self._runs:
            return [f"run {run_id}: has certificates but no row in runs"]
        run = self._runs[run_id]
        certifier = shard.column("certifier")[0].as_py()
        found = [
            *_uniform(shard),
            *_radii(shard, run),
            *smoothed_problems(shard, run),
            *self._same_images(shard, run),
        ]
        return [f"run {run_id}, certifier {certifier}: {problem}" for problem in found]

    def _same_images(self, shard: pa.Table, run: Mapping[str, Any]) -> Iterator[str]:
        mine = shard.select(["index", "label", "image_digest"])
        known = self._images.setdefault(run["dataset_digest"], mine)
        if mine.equals(known):
            return
        both = known.join(mine, keys="index", join_type="full outer", right_suffix="_here")
        differs = pc.or_(
            pc.not_equal(both.column("label"), both.column("label_here")),
            pc.not_equal(both.column("image_digest"), both.column("image_digest_here")),
        )
        wrong = both.column("index").filter(pc.fill_null(differs, False))
        if len(wrong):
            yield f"image {pc.min(wrong).as_py()} is another image than in other runs on {run['dataset']}"
        new = mine.filter(pc.invert(pc.is_in(mine.column("index"), known.column("index").combine_chunks())))
        if new.num_rows:
            self._images[run["dataset_digest"]] = pa.concat_tables([known, new]).sort_by("index")


def audit_problems(audits: pa.Table, certificates: pa.Table, run: Mapping[str, Any]) -> list[str]:
    """What is wrong with the audits of one run's certificates by one certifier; each problem is one line."""
    where = f"run {run['run_id']}, certifier {audits.column('certifier')[0].as_py()}"
    wanted = ["index", "label", "prediction", "verdict", "radius"]
    both = audits.join(certificates.select(wanted), keys="index", join_type="left outer")
    own = pc.is_in(both.column("kind"), pa.array(["certified_radius", "recount"]))
    certified = pc.equal(both.column("verdict"), "certified")
    outcome, ball = both.column("outcome"), both.column("ball_radius")
    asked = round_down(parse_fraction(run["radius"])) if run["radius"] is not None else math.nan
    broken = {
        "was audited but never certified": pc.is_null(both.column("verdict")),
        "was audited though its prediction is not the label": pc.invert(
            pc.fill_null(pc.equal(both.column("prediction"), both.column("label")), False)
        ),
        "was not attacked at its certified radius": pc.and_(
            own, pc.invert(pc.fill_null(pc.equal(ball, both.column("radius")), False))
        ),
        "was not attacked at the recipe's radius": pc.and_(pc.invert(own), pc.not_equal(ball, asked)),
        "is refuted, but nothing was certified": pc.and_(
            pc.and_(pc.invert(own), pc.starts_with(outcome, "refuted")), pc.invert(certified)
        ),
        "is certified and falsified, which is to be refuted": pc.and_(
            pc.starts_with(outcome, "falsified"), certified
        ),
    }
    found = []
    for problem, mask in broken.items():
        images = both.column("index").filter(pc.fill_null(mask, False))
        if len(images):
            found.append(f"{where}: image {pc.min(images).as_py()} {problem}")
    return found


def _uniform(shard: pa.Table) -> Iterator[str]:
    for name in ("guarantee", "deploy"):
        values = distinct(shard.column(name))
        if len(values) > 1:
            yield f"mixes {name} {' and '.join(map(repr, sorted(values)))}"


def _radii(shard: pa.Table, run: Mapping[str, Any]) -> Iterator[str]:
    """At the recipe's radius the verdict decides, so a radius must not contradict it, nor exceed the cap."""
    verdict, radius = shard.column("verdict"), shard.column("radius")
    broken = {}
    if run["radius"] is not None:
        asked = round_down(parse_fraction(run["radius"]))
        reached = pc.greater_equal(radius, asked)
        broken[f"is certified, but with a radius below {run['radius']}"] = pc.and_(
            pc.equal(verdict, "certified"), pc.invert(reached)
        )
        broken[f"is falsified, but with a radius above {run['radius']}"] = pc.and_(
            pc.equal(verdict, "falsified"), pc.greater(radius, asked)
        )
    if run["cap"] is not None:
        broken[f"has a radius above the cap {run['cap']}"] = pc.greater(
            radius, round_up(parse_fraction(run["cap"]))
        )
    for problem, mask in broken.items():
        if pc.any(mask).as_py():
            place = pc.index(mask, True).as_py()
            yield f"image {shard.column('index')[place].as_py()} {problem}"


def identity_problem(run: Mapping[str, Any]) -> str | None:
    """What is wrong with a run's id: it names the content of the run, and is computed again from it."""
    content = json.loads(run["recipe"])
    for core in range(1, CORE_NUMERICS + 1):  # rows keep the ids they were made under
        numerics = core, run["numerics"]
        if identify(content, run["dataset_digest"], numerics, run["protocol"]) == run["run_id"]:
            return None
    return f"run {run['run_id']}: its id is not that of its recipe, data, numerics and protocol"


def check_store(store: ResultStore, identities: bool = False) -> list[str]:
    """Everything wrong with a store, one line each, empty where all rows keep all rules; damaged files are listed.

    With ``identities`` every run's id is computed again from what it names.
    """
    found: list[str] = []

    def readable(name: str, paths: Sequence[Path]) -> Iterator[pa.Table]:
        """The tables that keep their own rules; of the others every problem is noted."""
        for path in paths:
            try:
                table = store.fetch(name, path)
                problems = [f"{path}: {problem}" for problem in problems_of(table, name)]
                if not problems:
                    yield store.accept(name, path, table)
                found.extend(problems)
            except DataError as error:
                found.append(str(error))

    # Listed in this order, since a run is always written before its certificates, and they before their audits.
    paths = {name: store.paths(name) for name in ("audits", "certificates", "timings", "submissions", "runs")}
    runs = {row["run_id"]: row for table in readable("runs", paths["runs"]) for row in table.to_pylist()}
    if identities:
        found += [problem for run in runs.values() if (problem := identity_problem(run)) is not None]
    for name in ("timings", "submissions"):
        for table in readable(name, paths[name]):
            run_id = table.column("run_id")[0].as_py()
            if run_id not in runs:
                found.append(f"run {run_id}: has {name} but no row in runs")
    check = CrossCheck(runs)
    for table in readable("certificates", paths["certificates"]):
        found += check.problems(table)
    for table in readable("audits", paths["audits"]):
        try:
            found += _audit_file(store, table, runs)
        except DataError as error:
            found.append(str(error))
    return found


def _audit_file(store: ResultStore, audits: pa.Table, runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    run_id, certifier, settings_digest = (
        audits.column(name)[0].as_py() for name in ("run_id", "certifier", "settings_digest")
    )
    certificates = store.certificates(run_id, certifier, settings_digest)
    if run_id not in runs or not certificates.num_rows:
        return [f"run {run_id}, certifier {certifier}: has audits but no run or no certificates"]
    return audit_problems(audits, certificates, runs[run_id])
