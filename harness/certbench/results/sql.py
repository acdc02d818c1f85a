"""SQL over the folder of rows, by DuckDB (extra ``sql``), which opens the Parquet files where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from certbench.errors import UsageError
from certbench.results.schema import TABLES


def query(folder: Path, statement: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Column names and rows of a query over the tables ``runs``, ``certificates``, ``audits``, ``timings`` and
    ``submissions``; the files are only read.

    Raises:
        UsageError: DuckDB is not installed, or it does not take the statement.
    """
    try:
        import duckdb
    except ImportError:
        raise UsageError("SQL needs duckdb; install it with `pip install 'certbench[sql]'`") from None
    with duckdb.connect(":memory:") as connection:
        for name, spec in TABLES.items():
            empty = spec.schema.empty_table()
            connection.register(f"empty_{name}", empty)
            files = sorted(str(path) for path in (folder / name).glob("[!.]*.parquet"))
            if files:
                listed = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
                source = (
                    f"select * from empty_{name} union all by name "
                    f"select * from read_parquet([{listed}], union_by_name = true)"
                )
            else:
                source = f"select * from empty_{name}"
            connection.execute(f"create view {name} as {source}")
        try:
            found = connection.execute(statement)
            names = [column[0] for column in found.description or ()]
            return names, found.fetchall() if names else []
        except duckdb.Error as error:
            raise UsageError(f"DuckDB: {' '.join(str(error).split())}") from None
