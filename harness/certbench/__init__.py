"""certbench: certified robust training, run under one protocol, proved, recorded and ranked.

The Python interface is three functions; everything else is reached through its room (see ``docs/architecture.md``).
They import their engines when called, so that ``import certbench`` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from certbench.stages.record import RunOutcome

__version__ = "0.1.0"
__all__ = ["__version__", "certify", "load_results", "run_recipe"]


def run_recipe(recipe: str | Path, **options: Any) -> RunOutcome:
    """Train, certify and record one recipe; see :func:`certbench.run.run_recipe` for the options."""
    from certbench.run import run_recipe as run

    return run(recipe, **options)


def certify(run_id: str, *, out: str | Path = "certbench-out", **changes: Any) -> RunOutcome:
    """Certify a finished run again with other settings: ``certifier``, ``guarantee``, ``deploy``.

    See :func:`certbench.recorded.certify_again`, which also takes ``radius``, ``attack``, ``data``, ``device`` and ``reporter``.
    """
    from certbench.recorded import certify_again

    options = {
        key: changes.pop(key) for key in ("radius", "attack", "data", "device", "reporter") if key in changes
    }
    return certify_again(run_id, changes, out=out, **options)


def load_results(folder: str | Path, table: str = "certificates") -> pd.DataFrame:
    """One table (``runs``, ``certificates``, ``audits`` or ``timings``) of a folder that runs were written to, as a pandas frame."""
    from pathlib import Path

    from certbench.results.store import ResultStore

    frame: pd.DataFrame = ResultStore(Path(folder) / "results").read(table).to_pandas()
    return frame
