"""Certificates of somebody else, made again from their checkpoint: honest ones agree, invented ones are found."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from certbench.cli import main
from certbench.errors import RunError
from certbench.plugins import installed
from certbench.recheck import Rechecked, recheck
from certbench.results.bundle import export_runs
from certbench.results.store import ResultStore
from certbench.run import run_recipe
from certbench.seeding import noise_key
from certbench.stages.record import RunOutcome
from certbench.stages.train import NETWORK
from certbench.stats.smoothing import RADII, two_sided_radius

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
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(RunError, match="is not a regular file"):
        recheck(store, tmp_path / "pipe.safetensors", 5, device="cpu", out=tmp_path)


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


# Statistical certificates ----------------------------------------------------------------------------------------------

needs_smoothing = pytest.mark.skipif(
    "gaussian" not in installed().methods(), reason="certbench-smoothing-baselines is not installed"
)
CERTIFIERS = ["smoothing", "smoothing-sequential", "smoothing-two-sided"]


def drawn(out: Path, certifier: str) -> RunOutcome:
    """A short run of which twelve images are certified from 400 draws at most."""
    settings = ["n=400", "subset=every-30", 'radii=["0","0.25"]']
    overrides = [f"certify.smoothing.{setting}" for setting in settings]
    overrides += ["train.epochs=2", "train.milestones=[]", f"certify.certifier={certifier}"]
    return run_recipe("gaussian/digits-l2-0.5", out=out, device="cpu", overrides=overrides, attack=None)


@pytest.fixture(scope="module", params=CERTIFIERS)
def here(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    return drawn(tmp_path_factory.mktemp("here"), request.param)


@pytest.fixture(scope="module", params=CERTIFIERS[:2])
def elsewhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    """A run whose noise is other noise than this machine's, and says that it is a GPU's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("certbench.smoothing.noise.noise_words", lambda run_id: b"sixteen bytes it")
        patch.setattr("certbench.smoothing.noise.noise_key", lambda run_id, device: noise_key(run_id, "cuda"))
        return drawn(tmp_path_factory.mktemp("elsewhere"), request.param)


def changed(outcome: RunOutcome, folder: Path, change: Callable[[dict[str, list[Any]]], None]) -> ResultStore:
    """A store with the rows of a run, some of them changed, past the rules that would not record them."""
    honest, store = ResultStore(outcome.store), ResultStore(folder / "results")
    store.write_run(honest.run(outcome.run_id))
    for timing in honest.read("timings").to_pylist():
        store.write_timing(timing)
    (certificates,) = honest.certificate_sets(outcome.run_id)
    rows = honest.certificates(*certificates)
    columns = {name: rows.column(name).to_pylist() for name in rows.column_names}
    change(columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("certbench.results.store.CrossCheck.problems", lambda *_: [])
        store.write_certificates(*certificates, columns)
    return store


def again(store: ResultStore, outcome: RunOutcome, folder: Path, sample: int = 100) -> Rechecked:
    return recheck(store, outcome.folder / NETWORK, sample, device="cpu", out=folder)


def with_hits(columns: dict[str, list[Any]], place: int, k: int) -> None:
    """Row ``place`` counts k hits, and all else follows from them."""
    columns["k"][place] = k
    if columns["certifier"][place] == "smoothing-two-sided":
        rival = columns["n"][place] - k
        columns["proved_by"][place] = f"clopper-pearson; rival {rival} of 10"
        radius = two_sided_radius(k, columns["n"][place], 0.001, 0.5, rival, 10)
    else:
        radius = RADII[columns["certifier"][place]](k, columns["n"][place], 0.001, 0.5)
    right = columns["prediction"][place] == columns["label"][place]
    columns["radius"][place] = float(radius) if right else 0.0
    columns["verdict"][place] = (
        ("certified" if right else "misclassified") if radius > 0 else columns["verdict"][place]
    )


@needs_smoothing
def test_draws_made_again_on_one_kind_of_device_are_equal_in_every_count(
    here: RunOutcome, tmp_path: Path
) -> None:
    found = again(ResultStore(here.store), here, tmp_path)
    assert (found.made, found.differences) == (12, ())
    (words,) = found.comparisons
    assert words.endswith("every count, exactly (made on cpu, as here)")

    def one_less(columns: dict[str, list[Any]]) -> None:
        place = next(i for i, radius in enumerate(columns["radius"]) if radius > 0)
        with_hits(columns, place, columns["k"][place] - 1)

    found = again(changed(here, tmp_path / "less", one_less), here, tmp_path)
    assert len(found.differences) == 1 and "draws for class" in found.differences[0]


@needs_smoothing
def test_draws_of_another_device_are_compared_by_a_test(elsewhere: RunOutcome, tmp_path: Path) -> None:
    store = ResultStore(elsewhere.store)
    found = again(store, elsewhere, tmp_path)
    assert (found.made, found.differences) == (12, ())
    (words,) = found.comparisons
    assert "counts by a test (made on cuda, here is cpu)" in words
    assert "level 0.001 over all images together" in words
    assert ("Clopper-Pearson" in words) == words.startswith("smoothing:")


@needs_smoothing
def test_counts_that_no_noise_gives_are_found_on_another_device(
    elsewhere: RunOutcome, tmp_path: Path
) -> None:
    def invented(columns: dict[str, list[Any]]) -> None:
        place = min(range(12), key=lambda i: columns["k"][i] / columns["n"][i])
        assert columns["k"][place] < 0.7 * columns["n"][place]
        with_hits(columns, place, columns["n"][place])

    found = again(changed(elsewhere, tmp_path / "invented", invented), elsewhere, tmp_path)
    (line,) = found.differences
    assert re.search(r"with (\d+) of \1 draws for class \d and radius [0-9.]+ there, and ", line)

    def bolder(columns: dict[str, list[Any]]) -> None:
        columns["alpha"] = [0.4] * 12

    found = again(changed(elsewhere, tmp_path / "bolder", bolder), elsewhere, tmp_path)
    assert len(found.differences) == 12


@needs_smoothing
def test_rows_of_other_noise_images_or_labels_are_refused(here: RunOutcome, tmp_path: Path) -> None:
    def foreign(columns: dict[str, list[Any]]) -> None:
        columns["generator_key"] = [noise_key("f" * 16, "cpu")] * 12

    def between(columns: dict[str, list[Any]]) -> None:
        columns["index"][3] += 1

    def beyond(columns: dict[str, list[Any]]) -> None:
        columns["index"][11] = 360

    def relabelled(columns: dict[str, list[Any]]) -> None:
        columns["label"] = [(label + 1) % 10 for label in columns["label"]]
        columns["radius"] = [0.0] * 12
        columns["verdict"] = ["abstain"] * 12

    for change, reason in (
        (foreign, "which is not that of its run"),
        (between, "image 91 is not among every 30th"),
        (beyond, "image 360 is not among those its recipe has certified: 12 images of digits, every 30th"),
        (relabelled, "or its label is another in digits here"),
    ):
        store = changed(here, tmp_path / change.__name__, change)
        with pytest.raises(RunError, match=reason):
            again(store, here, tmp_path)


@needs_smoothing
def test_counts_of_rivals_are_not_compared_across_devices(here: RunOutcome, tmp_path: Path) -> None:
    def of_a_gpu(columns: dict[str, list[Any]]) -> None:
        columns["generator_key"] = [noise_key(here.run_id, "cuda")] * 12

    store = changed(here, tmp_path / "gpu", of_a_gpu)
    if here.recipe.certify.certifier == "smoothing-two-sided":
        with pytest.raises(RunError, match="can only be compared on equal devices"):
            again(store, here, tmp_path)
    else:
        assert "by a test" in again(store, here, tmp_path).comparisons[0]


def test_deterministic_certificates_are_compared_by_verdict_and_radius(
    finished: tuple[Path, RunOutcome], tmp_path: Path
) -> None:
    out, outcome = finished
    found = again(ResultStore(out / "results"), outcome, tmp_path, 5)
    assert found.comparisons == ("ibp: predictions, verdicts, and radii up to a share of 0.0001",)
