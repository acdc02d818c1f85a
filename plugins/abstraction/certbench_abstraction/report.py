"""What recorded rows say of each step: ``python -m certbench_abstraction.report [FOLDER]`` prints a Markdown table.

FOLDER holds ``results``, as ``leaderboards`` does and every ``--out`` of ``certbench run``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from certbench.results.store import ResultStore

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("abstraction", "abstraction-ibp")
PROOFS = ("single-cell", "cell-ibp", "linear", "enumeration", "branching")
LINEAR = ["crown-ibp", "zonotope", "crown", "zonotope-crown"]
HEADERS = (
    "method", "data", "radius", "model", "n", "seed", "guarantee",
    "clean % of g (reported upstream as verified)", "attacked %", "certified %", *PROOFS, "falsified %", "unknown %",
    "straddling", "passes",
)  # fmt: skip
NONE = "No row stands yet."


def table(folder: Path) -> str:
    """One line per run and set of certificates; the steps' columns are shares of all images, in percent."""
    store = ResultStore(folder / "results")
    runs = {row["run_id"]: row for row in store.read("runs").to_pylist() if row["method"] in METHODS}
    found = []
    for run_id, row in runs.items():
        for of in store.certificate_sets(run_id):
            if of[1] in METHODS:
                rows, audits = store.certificates(*of).to_pandas(), store.audits(*of).to_pandas()
                found.append(_line(row, rows, audits))
    if not found:
        return NONE
    found.sort(key=lambda line: line[:7])
    rule = ["---"] * len(HEADERS)
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(HEADERS), rule, *found])


def _line(run: dict[str, object], rows: pd.DataFrame, audits: pd.DataFrame) -> list[str]:
    recipe = json.loads(str(run["recipe"]))
    certified = rows["verdict"] == "certified"
    correct = rows["prediction"] == rows["label"]
    step = rows["proved_by"].str.split(";").str[0].replace(LINEAR, "linear")
    witnessed = audits["outcome"].isin(["falsified", "refuted"]) & (audits["kind"] == "recipe_radius")
    broken = rows["index"].isin(audits.loc[witnessed, "index"]) | (rows["verdict"] == "falsified")
    return [
        str(run["method"]),
        str(run["dataset"]),
        str(run["radius"]),
        str(run["model"]),
        str(recipe["method"]["n"] or "searched"),
        str(run["seed"]),
        str(rows["guarantee"].iloc[0]),
        _percent(correct),
        _percent(correct & ~broken) if len(audits) else "not audited",
        _percent(certified),
        *(_percent(certified & (step == proof)) for proof in PROOFS),
        _percent(correct & broken),
        _percent(correct & ~certified & ~broken),
        f"{rows['straddling'].mean():.1f}",
        f"{rows['passes'].mean():.1f}",
    ]


def _percent(mask: pd.Series) -> str:
    return f"{100 * mask.mean():.2f}"


if __name__ == "__main__":
    sys.stdout.write(table(Path(sys.argv[1] if len(sys.argv) > 1 else "leaderboards")) + "\n")
