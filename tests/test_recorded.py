"""Finished runs, found again and certified with other settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from certbench.audit.certificates import Audit, AuditTask, audit
from certbench.cli import main
from certbench.contract import SilentReporter
from certbench.errors import RunError, UsageError
from certbench.plugins import installed
from certbench.recipe import CORE_NUMERICS
from certbench.recorded import certify_again, load_run
from certbench.results.store import ResultStore
from certbench.run import run_recipe
from certbench.stages.record import RunOutcome
from certbench.stages.timing import Timer
from certbench.stages.train import TAKEN, Trained, find_trained, training_id

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


OTHERWISE = ["train.epochs=1", "method.ramp_epochs=1", "certify.cap=0.1", "certify.guarantee=real_arith"]


def test_runs_that_differ_in_certify_alone_share_one_training(
    finished: tuple[Path, RunOutcome], tmp_path: Path
) -> None:
    out, first = finished
    shared = tmp_path / "out"
    shutil.copytree(out, shared)
    said = Sayings()
    second = run_recipe(
        "fast-ibp/digits-linf-0.1", out=shared, device="cpu", overrides=OTHERWISE, attack=None, reporter=said
    )
    assert second.run_id != first.run_id
    assert any(f"trained like run {first.run_id}; its network is taken" in line for line in said.lines)
    store = ResultStore(shared / "results")
    one, two = store.run(first.run_id), store.run(second.run_id)
    assert one["checkpoint_digest"] == two["checkpoint_digest"]
    timings = store.read("timings").to_pandas().query("stage == 'train'").set_index("run_id")
    assert timings.loc[first.run_id].equals(timings.loc[second.run_id])  # what that network did cost
    run_recipe(
        "fast-ibp/digits-linf-0.1", out=tmp_path / "own", device="cpu", overrides=OTHERWISE, attack=None
    )
    alone = ResultStore(tmp_path / "own/results")
    assert alone.run(second.run_id)["checkpoint_digest"] == two["checkpoint_digest"]
    assert alone.certificates(*alone.certificate_sets(second.run_id)[0]).equals(
        store.certificates(*store.certificate_sets(second.run_id)[0])
    )


@pytest.mark.parametrize("change", ["train.learning_rate=2e-3", "seed=1", "threat.radius=0.05"])
def test_another_training_is_not_shared(
    finished: tuple[Path, RunOutcome], tmp_path: Path, change: str
) -> None:
    out, first = finished
    run = load_run(first.run_id, out, device="cpu").run
    same = training_id(run.recipe.canonical(), run.dataset.digest, run.owned.card.numerics)
    other = installed().find_recipe("fast-ibp/digits-linf-0.1", [*OTHERWISE[:2], change])
    assert find_trained(run.store, out / "runs", "another", same, run.applicability.structure) is not None
    assert training_id(other.canonical(), run.dataset.digest, run.owned.card.numerics) != same
    away = find_trained(run.store, tmp_path, "another", same, run.applicability.structure)
    assert away is None  # its checkpoints are gone


def test_a_training_of_other_numerics_or_of_a_network_built_otherwise_is_not_shared(
    finished: tuple[Path, RunOutcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = finished
    run = load_run(first.run_id, out, device="cpu").run

    def found(structure: str) -> Trained | None:
        wanted = training_id(run.recipe.canonical(), run.dataset.digest, run.owned.card.numerics)
        return find_trained(run.store, out / "runs", "another", wanted, structure)

    assert found(run.applicability.structure) is not None
    assert found("0" * 16) is None
    monkeypatch.setattr("certbench.stages.train.CORE_NUMERICS", CORE_NUMERICS + 1)
    assert found(run.applicability.structure) is None


@pytest.mark.parametrize("harm", ["gone", "cut short"])
def test_a_run_whose_checkpoints_are_no_longer_its_own_is_not_taken(
    finished: tuple[Path, RunOutcome], tmp_path: Path, harm: str
) -> None:
    out, first = finished
    shared = tmp_path / "out"
    shutil.copytree(out, shared)
    for checkpoint in (shared / "runs" / first.run_id).glob("epoch-*"):
        if harm == "gone":
            checkpoint.unlink()
        elif checkpoint.suffix == ".safetensors":
            checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    said = Sayings()
    second = run_recipe(
        "fast-ibp/digits-linf-0.1", out=shared, device="cpu", overrides=OTHERWISE, attack=None, reporter=said
    )
    assert any("trained anew" in line for line in said.lines)
    assert not (second.folder / TAKEN).exists()
    store = ResultStore(shared / "results")
    timings = store.read("timings").to_pandas().query("stage == 'train'").set_index("run_id")
    assert timings.loc[first.run_id, "started_at"] != timings.loc[second.run_id, "started_at"]


def test_taking_a_network_that_was_broken_off_is_begun_again(
    finished: tuple[Path, RunOutcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = finished
    shared = tmp_path / "out"
    shutil.copytree(out, shared)

    def take() -> RunOutcome:
        return run_recipe(
            "fast-ibp/digits-linf-0.1", out=shared, device="cpu", overrides=OTHERWISE, attack=None
        )

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("copy_cost", "adopt"):
        with monkeypatch.context() as patch:
            patch.setattr(f"certbench.run.{step}", stopped)
            with pytest.raises(KeyboardInterrupt):
                take()
    second = take()
    timings = ResultStore(shared / "results").read("timings").to_pandas().query("stage == 'train'")
    seconds = timings.groupby("run_id")["seconds"].sum()
    assert seconds[second.run_id] == seconds[first.run_id]


@pytest.mark.parametrize(
    ("left", "count"), [(None, 2), ("[", 1), ('[{"seconds": 1}]', 1), ("[" * 100_000, 1)]
)
def test_a_session_that_was_broken_off_counts_as_far_as_it_was_saved(
    tmp_path: Path, left: str | None, count: int
) -> None:
    store, folder, stage = ResultStore(tmp_path / "results"), tmp_path / "run", "certify-any-01234567"

    def timer(goes_on: bool) -> Timer:
        return Timer(store, "0123456789abcdef", stage, torch.device("cpu"), folder, goes_on)

    folder.mkdir()
    first = timer(goes_on=False)
    first.keep()
    first.keep()
    if left is not None:
        (folder / f".cost-{stage}.json").write_text(left)
    second = timer(goes_on=True)
    second.keep()
    second.record()
    rows = store.read("timings").to_pylist()
    assert len(rows) == count and all(row["seconds"] > 0 for row in rows)
    assert list(folder.iterdir()) == []
    first.keep()  # of work that is no longer there
    timer(goes_on=False).record()
    assert store.read("timings").num_rows == count + 1


class Sayings(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)
