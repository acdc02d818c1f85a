"""Certificates of somebody else, made again from their checkpoint: honest ones agree, invented ones are found."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from certbench.cli import main
from certbench.errors import RunError
from certbench.plugins import installed
from certbench.recheck import recheck
from certbench.results.bundle import export_runs
from certbench.results.store import ResultStore
from certbench.run import RunOutcome, run_recipe
from certbench.stages.train import NETWORK

pytestmark = pytest.mark.skipif(
    "fast-ibp" not in installed().methods(), reason="certbench-fast-ibp is not installed"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunOutcome]:
    out = tmp_path_factory.mktemp("out")
    overrides = ["train.epochs=2", "train.milestones=[]", "method.ramp_epochs=1"]
    return out, run_recipe(
        "fast-ibp/digits-linf-0.1", out=out, device="cpu", overrides=overrides, attack=None
    )


def test_honest_certificates_agree(finished: tuple[Path, RunOutcome], tmp_path: Path) -> None:
    out, outcome = finished
    store = ResultStore(out / "results")
    found = recheck(store, outcome.folder / NETWORK, 40, device="cpu", out=tmp_path)
    assert (found.run_id, found.made, found.differences) == (outcome.run_id, 40, ())
    assert recheck(store, outcome.folder / NETWORK, 10_000, device="cpu", out=tmp_path).made == 360


def test_invented_certificates_are_found(finished: tuple[Path, RunOutcome], tmp_path: Path) -> None:
    out, outcome = finished
    honest, invented = ResultStore(out / "results"), ResultStore(tmp_path / "results")
    invented.write_run(honest.run(outcome.run_id))
    (certificates,) = honest.certificate_sets(outcome.run_id)
    rows = honest.certificates(*certificates)
    columns = {name: rows.column(name).to_pylist() for name in rows.column_names}
    at = columns["verdict"].index("unknown")
    columns["verdict"][at], columns["radius"][at], columns["margin"][at] = "certified", 0.1, 1.0
    other = next(i for i, radius in enumerate(columns["radius"]) if i != at and 0 < radius < 0.19)
    columns["radius"][other] += 0.01
    invented.write_certificates(*certificates, columns)
    found = recheck(invented, outcome.folder / NETWORK, 10_000, device="cpu", out=tmp_path)
    assert len(found.differences) == 2
    assert any(line.startswith(f"image {at} is certified") for line in found.differences)


def test_another_network_is_refused(finished: tuple[Path, RunOutcome], tmp_path: Path) -> None:
    out, outcome = finished
    store = ResultStore(out / "results")
    weights = load_file(outcome.folder / NETWORK)
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name] + 1}, tmp_path / "other.safetensors")
    save_file({"x": weights[name]}, tmp_path / "foreign.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"not tensors")
    for file in ("other", "foreign"):
        with pytest.raises(RunError, match="is the network of no run"):
            recheck(store, tmp_path / f"{file}.safetensors", 5, device="cpu", out=tmp_path)
    with pytest.raises(RunError, match="cannot read"):
        recheck(store, tmp_path / "junk.safetensors", 5, device="cpu", out=tmp_path)


def test_an_import_says_how_many_were_made_again(
    finished: tuple[Path, RunOutcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, outcome = finished
    export_runs(ResultStore(out / "results"), [outcome.run_id], tmp_path / "rows.parquet", "A Lab")
    words = ["results", "import", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "here")]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--recheck", "7", "--checkpoint", str(outcome.folder / NETWORK), "--device", "cpu"])
    assert not caught.value.code
    assert f"{outcome.run_id}: 7 certificates re-checked" in capsys.readouterr().out
    (label,) = ResultStore(tmp_path / "here" / "results").read("submissions").to_pylist()
    assert (label["submitter"], label["rechecked"]) == ("A Lab", 7)
