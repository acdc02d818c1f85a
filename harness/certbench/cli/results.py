"""``certbench results``: look at rows, hand them on, take them in, verify and query them."""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certbench.errors import FoundError, UsageError

if TYPE_CHECKING:
    from certbench.results.bundle import Unpacked
    from certbench.results.store import ResultStore

_OUT = click.option(
    "--out",
    default="certbench-out",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The folder that holds results/.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="For a program.")


@click.group()
def command() -> None:
    """List and show runs, hand them on and take them in, verify them, query them.

    \b
    Example:
      certbench results list --out leaderboards
    """


@command.command(name="list")
@_OUT
@_JSON
def list_runs(out: Path, as_json: bool) -> None:
    """One line per run: what was trained, how it was certified, who submitted it.

    \b
    Example:
      certbench results list --out leaderboards
    """
    store = _store(out)
    submitted = {row["run_id"]: row for row in store.read("submissions").to_pylist()}
    runs = []
    for row in sorted(store.read("runs").to_pylist(), key=lambda row: (row["recipe_name"], row["seed"])):
        label = submitted.get(row["run_id"])
        runs.append(
            {
                "run_id": row["run_id"],
                "recipe": row["recipe_name"],
                "seed": row["seed"],
                "protocol": row["protocol"],
                "certified_by": [each[1] for each in store.certificate_sets(row["run_id"])],
                "submitter": label["submitter"] if label else None,
                "rechecked": label["rechecked"] if label else None,
            }
        )
    if as_json:
        click.echo(json.dumps(runs, indent=2))
        return
    headers = ("run", "recipe", "seed", "protocol", "certified by", "submitted by")
    _table(headers, [[*_plain(run)] for run in runs])


def _plain(run: dict[str, Any]) -> list[str]:
    who = f"{run['submitter']} ({run['rechecked']} re-checked)" if run["submitter"] else ""
    return [
        run["run_id"],
        run["recipe"],
        str(run["seed"]),
        run["protocol"],
        ", ".join(run["certified_by"]) or "nothing",
        who,
    ]


@command.command()
@click.argument("run")
@_OUT
@_JSON
def show(run: str, out: Path, as_json: bool) -> None:
    """Everything recorded of RUN: its id or the beginning of it.

    \b
    Example:
      certbench results show 726e --out leaderboards
    """
    from certbench.leaderboard.metrics import count_audits, measure
    from certbench.leaderboard.page.recipes import to_toml

    store = _store(out)
    row = store.run(_one(store, run))
    found: dict[str, Any] = {**row, "recipe": json.loads(row["recipe"]), "certificates": []}
    for each in store.certificate_sets(row["run_id"]):
        shard, audits = store.certificates(*each), store.audits(*each)
        metrics, audit = measure(shard), count_audits(shard, audits)
        found["certificates"].append(
            {
                "certifier": metrics.certifier,
                "settings_digest": metrics.settings_digest,
                "guarantee": metrics.guarantee,
                "images": metrics.images,
                "clean_accuracy": float(metrics.clean_accuracy),
                "certified_accuracy": float(metrics.certified_accuracy),
                "acr": metrics.acr,
                "verdicts": dict(metrics.verdicts),
                "audited": audit.tried if audit else None,
                "refuted": audit.refuted if audit else None,
            }
        )
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    recipe = to_toml(found.pop("recipe"))
    certificates = found.pop("certificates")
    _table(("column", "value"), [[name, str(value)] for name, value in found.items() if value is not None])
    click.echo("\nRecipe, every default written out\n")
    _printable(recipe)
    for each in certificates:
        click.echo("")
        _table(("certificates", "value"), [[name, _words(value)] for name, value in each.items()])


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items() if count)
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


@command.command()
@click.argument("bundle", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("runs", nargs=-1, metavar="[RUN...]")
@click.option("--submitter", required=True, metavar="NAME", help="Who vouches for these rows.")
@_OUT
def export(bundle: Path, runs: tuple[str, ...], submitter: str, out: Path) -> None:
    """Pack runs into the file BUNDLE, all of this folder's own unless some are named.

    \b
    Example:
      certbench results export rows.parquet --submitter "A Lab" --out certbench-out
    """
    from certbench.results.bundle import export_runs

    store = _store(out)
    foreign = {row["run_id"] for row in store.read("submissions").to_pylist()}
    all_runs = [row["run_id"] for row in store.read("runs").to_pylist()]
    chosen = [_one(store, run) for run in runs] or [run_id for run_id in all_runs if run_id not in foreign]
    if not chosen:
        raise UsageError(f"{out} holds no run of its own to export")
    packed = export_runs(store, sorted(set(chosen)), bundle, submitter)
    click.echo(f"{bundle}: {len(packed.runs)} runs in {packed.files} files, SHA-256 {packed.digest}")


@command.command(name="import")
@click.argument("bundle", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--recheck", default=0, type=click.IntRange(min=0), metavar="N", help="Make N certificates again."
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The network of the run to re-check, as safetensors.",
)
@click.option(
    "--data", default=None, metavar="DIR", help="Folder of the data sets [default: $CERTBENCH_DATA]."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@_OUT
def import_(
    bundle: Path, recheck: int, checkpoint: Path | None, data: str | None, device: str, out: Path
) -> None:
    """Take in the runs of BUNDLE, a file from elsewhere, labelled with who submitted them.

    Nothing in the file is trusted: every rule is checked, and every reason for which it is refused is shown. With
    --recheck, N certificates drawn at random are made again from the checkpoint; where one differs, nothing is taken in.

    \b
    Example:
      certbench results import rows.parquet --recheck 100 --checkpoint network.safetensors
    """
    from certbench.leaderboard.board import obstacles
    from certbench.results.bundle import Refused, unpack
    from certbench.results.joining import join
    from certbench.results.store import ResultStore

    if bool(recheck) != (checkpoint is not None):
        raise UsageError("--recheck N and --checkpoint FILE belong together")
    with tempfile.TemporaryDirectory() as folder:
        try:
            unpacked = unpack(bundle, Path(folder) / "results")
            done = join(
                unpacked,
                ResultStore(out / "results"),
                obstacles,
                lambda: (
                    _recheck(unpacked, checkpoint, recheck, data, device, Path(folder)) if checkpoint else {}
                ),
            )
        except Refused as error:
            for reason in error.reasons:
                _printable(f"refused: {reason}", err=True)
            raise FoundError(f"{bundle.name} is not imported; reasons: {len(error.reasons)}") from None
    known = f"; {len(done.known)} were here already" if done.known else ""
    _printable(f"{len(done.new)} runs by {done.submitter} imported into {out}{known}")
    for run_id, made in done.new.items():
        _printable(f"{run_id}: {made} certificates re-checked")


def _recheck(
    unpacked: Unpacked, checkpoint: Path, sample: int, data: str | None, device: str, folder: Path
) -> dict[str, int]:
    from certbench.recheck import recheck
    from certbench.results.bundle import Refused

    found = recheck(unpacked.store, checkpoint, sample, data=data, device=device, out=folder)
    if found.differences:
        raise Refused("the bundle", [f"run {found.run_id}: {line}" for line in found.differences])
    for line in found.comparisons:
        _printable(f"{found.run_id}: compared {line}")
    return {found.run_id: found.made}


@command.command()
@_OUT
def verify(out: Path) -> None:
    """Check every row: digests, schema, ranges, the rules between tables, run ids, radii from their counts.

    Exits 1 if anything is wrong, after one line for every problem.

    \b
    Example:
      certbench results verify --out leaderboards
    """
    from certbench.results.checks import check_store

    store = _store(out)
    problems = check_store(store, identities=True)
    for problem in problems:
        _printable(problem, err=True)
    if problems:
        raise FoundError(f"{store.folder}: {len(problems)} problem{'s' if len(problems) > 1 else ''} found")
    counted = ", ".join(f"{len(store.paths(name))} {name}" for name in ("runs", "certificates", "audits"))
    click.echo(f"{store.folder}: every row keeps every rule (files: {counted})")


@command.command()
@click.argument("statement")
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated, in full precision.")
@_OUT
def sql(statement: str, as_csv: bool, out: Path) -> None:
    """Query the tables runs, certificates, audits, timings and submissions with SQL (DuckDB, the extra `sql`).

    \b
    Example:
      certbench results sql "select verdict, count(*) from certificates group by 1" --out leaderboards
    """
    from certbench.results.sql import query

    names, rows = query(_store(out).folder, statement)
    if as_csv:
        from certbench.leaderboard.escape import csv_cell

        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([csv_cell(_number(value)) for value in row] for row in rows)
        return
    _table(names, [["" if value is None else str(value) for value in row] for row in rows])


def _number(value: Any) -> str | float | None:
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _store(out: Path) -> ResultStore:
    from certbench.results.store import ResultStore

    if not (out / "results").is_dir():
        raise UsageError(f"{out} holds no folder results/; name one that does, such as the --out of a run")
    return ResultStore(out / "results")


def _one(store: ResultStore, prefix: str) -> str:
    """The run whose id begins so.

    Raises:
        UsageError: none does, or several do.
    """
    found = [path.stem for path in store.paths("runs") if prefix and path.stem.startswith(prefix)]
    if len(found) != 1:
        what = "no run" if not found else f"{len(found)} runs"
        raise UsageError(
            f"{what} in {store.folder} begins with {prefix!r}; `certbench results list` shows all"
        )
    return found[0]


def _table(headers: tuple[str, ...] | list[str], rows: list[list[str]]) -> None:
    from tabulate import tabulate

    from certbench.leaderboard.escape import printable

    lines = [[printable(cell) for cell in row] for row in rows]
    click.echo(tabulate(lines, headers=headers, tablefmt="simple", disable_numparse=True))


def _printable(text: str, err: bool = False) -> None:
    """Lines for a terminal, with nothing in them that it would act on."""
    from certbench.leaderboard.escape import printable

    click.echo("\n".join(map(printable, text.splitlines())), err=err)
