"""Finished runs, found again and certified with other settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from certbench.audit.certificates import Audit, AuditTask, audit
from certbench.cli import main
from certbench.errors import RunError, UsageError
from certbench.plugins import installed
from certbench.recorded import certify_again, load_run
from certbench.results.store import ResultStore
from certbench.run import RunOutcome, run_recipe

pytestmark = pytest.mark.skipif(
    "fast-ibp" not in installed().methods(), reason="certbench-fast-ibp is not installed"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunOutcome]:
    out = tmp_path_factory.mktemp("out")
    overrides = ["train.epochs=1", "method.ramp_epochs=1", "certify.cap=0.1"]
    return out, run_recipe("fast-ibp/digits-linf-0.1", out=out, device="cpu", overrides=overrides)


def test_other_settings_add_rows_and_train_nothing(finished: tuple[Path, RunOutcome]) -> None:
    out, outcome = finished
    before = sorted(outcome.folder.glob("*.safetensors"))
    changed = [p.stat().st_mtime_ns for p in before]
    certify_again(outcome.run_id[:6], {"deploy": "bf16"}, out=out, device="cpu")
    certify_again(outcome.run_id, {"guarantee": "real_arith"}, out=out, device="cpu")
    rows = ResultStore(out / "results").read("certificates").to_pandas()
    kinds = rows[["settings_digest", "guarantee", "deploy"]].drop_duplicates()
    assert sorted(zip(kinds["guarantee"], kinds["deploy"], strict=True)) == [
        ("float_sound", "bf16"),
        ("float_sound", "float32"),
        ("real_arith", "float32"),
    ]
    assert kinds["settings_digest"].is_unique
    assert [p.stat().st_mtime_ns for p in before] == changed
    settings = sorted(outcome.folder.glob("certify-ibp-*.json"))
    assert len(settings) == 3
    with pytest.raises(SystemExit) as caught:
        main(["certify", outcome.run_id, "--radius", "0.001", "--out", str(out), "--device", "cpu"])
    assert not caught.value.code
    assert len(ResultStore(out / "results").paths("certificates")) == 3, (
        "another radius is shown, not recorded"
    )


def test_evaluations_are_certified_and_attacked_with_plain_kernels_alone(
    finished: tuple[Path, RunOutcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a deployment that is asked for makes the bounds float-sound, whatever the certifier."""
    out, outcome = finished
    seen = []

    def switches(task: AuditTask) -> Audit:
        seen.append((torch.backends.cudnn.enabled, torch.get_float32_matmul_precision()))
        return audit(task)

    monkeypatch.setattr("certbench.stages.audit.audit", switches)
    before = torch.backends.cudnn.enabled
    found = certify_again(outcome.run_id, {"deploy": "tf32"}, out=out, device="cpu")
    assert seen == [(False, "highest")] and torch.backends.cudnn.enabled is before
    assert (found.recipe.certify.guarantee, found.recipe.certify.deploy) == ("float_sound", "tf32")
    audits = ResultStore(out / "results").read("audits").to_pandas()
    assert "not_attacked" not in set(audits["outcome"])
    resolved = installed().find_recipe(
        "fast-ibp/digits-linf-0.1", ["certify.certifier=crown", "certify.deploy=bf16"]
    )
    assert resolved.certify.guarantee == "float_sound"


def test_a_run_that_is_not_there_or_not_finished_is_refused(finished: tuple[Path, RunOutcome]) -> None:
    out, outcome = finished
    with pytest.raises(UsageError, match="no run in"):
        load_run("zz", out)
    sidecar = next(outcome.folder.glob("epoch-*.json"))
    sidecar.rename(sidecar.with_suffix(".away"))
    try:
        with pytest.raises(RunError, match="no finished checkpoint"):
            load_run(outcome.run_id, out, device="cpu")
    finally:
        sidecar.with_suffix(".away").rename(sidecar)


def test_the_structure_of_the_network_goes_into_the_row(finished: tuple[Path, RunOutcome]) -> None:
    out, outcome = finished
    row = ResultStore(out / "results").run(outcome.run_id)
    assert row["structure"] == (outcome.folder / "structure.txt").read_text()
    assert len(row["structure"]) == 16


def test_a_submitted_run_is_not_taken_for_our_own(finished: tuple[Path, RunOutcome], tmp_path: Path) -> None:
    out, outcome = finished
    copied = tmp_path / "out"
    shutil.copytree(out, copied)
    submission = {
        "run_id": outcome.run_id,
        "submitter": "somebody",
        "bundle_digest": "0" * 64,
        "rechecked": 0,
    }
    ResultStore(copied / "results").write_submission(submission)
    with pytest.raises(RunError, match="imported from 'somebody'; choose another --out"):
        run_recipe(outcome.recipe, out=copied, device="cpu")
    with pytest.raises(RunError, match="imported from 'somebody'"):
        load_run(outcome.run_id, copied, device="cpu")
