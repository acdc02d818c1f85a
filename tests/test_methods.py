"""One list for every installed method: each trains, resumes, certifies and records under the same checks."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from certbench.audit.ball import ball
from certbench.audit.search import gradient_guide
from certbench.bounds import input_box, trace
from certbench.contract import Reporter, SilentReporter
from certbench.data.dataset import to_pixels
from certbench.data.files import load_dataset
from certbench.plugins import installed
from certbench.recorded import load_run
from certbench.results.checks import check_store
from certbench.results.store import ResultStore
from certbench.run import RunOutcome, run_recipe

METHODS = sorted(installed().methods())
SHORT = ["train.epochs=4", "train.milestones=[3]", "train.batch_size=128"]
PER_METHOD = {
    "fast-ibp": ["method.ramp_epochs=2"],
    "abstraction": ["train.schedule=milestones"],
    "abstraction-ibp": [
        *("method.ramp_start=3", "method.ramp_epochs=2"),
        *("train.batch_size=32", "train.schedule=milestones"),
    ],
}
"""What a four-epoch run of a method needs besides ``SHORT``; a new method adds its line here."""

pytestmark = pytest.mark.skipif(not METHODS, reason="no method is installed: this is the core alone")


def recipe_of(method: str) -> str:
    return next(name for name in installed().recipes() if name.startswith(f"{method}/digits-"))


def short_run(method: str, out: Path, reporter: Reporter | None = None) -> RunOutcome:
    overrides = [*SHORT, *PER_METHOD.get(method, [])]
    return run_recipe(recipe_of(method), out=out, device="cpu", overrides=overrides, reporter=reporter)


@pytest.fixture(scope="module", params=METHODS)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, RunOutcome]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp(request.param)
    return request.param, out, short_run(request.param, out)


def rows(out: Path, table: str) -> dict[str, list[object]]:
    columns: dict[str, list[object]] = ResultStore(out / "results").read(table).to_pydict()
    return columns


def test_every_test_image_gets_one_certificate_and_the_store_holds_together(
    finished: tuple[str, Path, RunOutcome],
) -> None:
    method, out, outcome = finished
    certificates = rows(out, "certificates")
    assert certificates["index"] == list(range(360))
    assert set(certificates["verdict"]) <= {"certified", "unknown", "misclassified", "falsified"}
    assert check_store(ResultStore(out / "results")) == []
    assert 0 <= outcome.certified_accuracy <= outcome.clean_accuracy <= 1
    assert outcome.clean_accuracy > 0.2, "four epochs are enough to beat guessing"
    run = ResultStore(out / "results").run(outcome.run_id)
    assert (run["method"], run["dataset"], run["epochs"]) == (method, "digits", 4)
    assert run["recipe_name"].endswith(" ".join(f"+{o}" for o in [*SHORT, *PER_METHOD.get(method, [])]))
    assert {"train"} < set(rows(out, "timings")["stage"])


def test_no_certificate_is_broken_by_points_inside_its_own_ball(
    finished: tuple[str, Path, RunOutcome],
) -> None:
    _, out, outcome = finished
    info, split = load_dataset("digits", None).info, load_dataset("digits", None).test
    network = load_run(outcome.run_id, out, device="cpu").network.double()
    radius = torch.tensor(np.array(rows(out, "certificates")["radius"], dtype=float))
    certified = (radius > 0).nonzero().squeeze(1)
    if not len(certified):
        pytest.skip("this method certifies nothing in four epochs")
    images = to_pixels(split.images[certified], info.levels, torch.float64)
    labels = split.labels[certified]
    box = input_box(images, radius[certified])
    if set(rows(out, "certificates")["certifier"]) == {"ibp"}:
        proved = trace(network, info.shape).bound(box).margins(labels) > 0
        assert proved.all(), "a reported radius was not proved"
    network = gradient_guide(network)
    inside = ball(images.float(), radius[certified])  # exact: a radius may end one float below a border
    x = images.clone()
    for step in range(20):
        x = x.detach().requires_grad_()
        torch.nn.functional.cross_entropy(network(x), labels, reduction="sum").backward()
        assert x.grad is not None
        x = inside.project((x + box.radius * (0.5 if step else 1.0) * x.grad.sign()).float()).double()
        assert (network(x).argmax(1) == labels).all()


def test_two_equal_runs_write_equal_bytes(finished: tuple[str, Path, RunOutcome], tmp_path: Path) -> None:
    method, out, _ = finished
    short_run(method, tmp_path)
    for table in ("runs", "certificates"):
        first = {p.name: p.read_bytes() for p in (out / "results" / table).iterdir()}
        second = {p.name: p.read_bytes() for p in (tmp_path / "results" / table).iterdir()}
        assert first == second, table


class Interrupt(SilentReporter):
    """Stands for Ctrl-C after an epoch."""

    def epoch_done(self, epoch: int, *rest: object) -> None:
        if epoch == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_resumes_to_the_same_rows(
    finished: tuple[str, Path, RunOutcome], tmp_path: Path
) -> None:
    method, out, outcome = finished
    with pytest.raises(KeyboardInterrupt):
        short_run(method, tmp_path, Interrupt())
    assert not (tmp_path / "results").exists(), "nothing half done is recorded"
    again = short_run(method, tmp_path)
    assert again.run_id == outcome.run_id
    name = f"{outcome.run_id}.parquet"
    one, two = (pq.read_table(folder / "results" / "runs" / name) for folder in (out, tmp_path))
    assert one.equals(two)


def test_a_finished_run_is_not_done_again(finished: tuple[str, Path, RunOutcome]) -> None:
    method, out, outcome = finished
    files = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    again = short_run(method, out)
    assert again == outcome
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == files


def test_reported_radii_agree_with_verdict_and_cap(finished: tuple[str, Path, RunOutcome]) -> None:
    _, out, outcome = finished
    columns = rows(out, "certificates")
    recipe = outcome.recipe
    for verdict, radius, margin in zip(columns["verdict"], columns["radius"], columns["margin"], strict=True):
        assert isinstance(radius, float)
        assert Fraction(radius) <= recipe.cap
        if verdict == "misclassified":
            assert radius == 0
        elif verdict == "certified":
            assert isinstance(margin, float)
            assert margin > 0
            assert radius >= float(recipe.threat.radius) * (1 - 1e-15)
        else:
            assert radius < recipe.threat.radius


def test_every_recipe_of_every_plugin_resolves_and_names_its_settings() -> None:
    plugins = installed()
    for name in plugins.recipes():
        recipe = plugins.find_recipe(name)
        method, _, rest = name.partition("/")
        assert recipe.method.name == method
        assert rest.startswith(f"{recipe.dataset}-{recipe.threat.norm}-")
        assert plugins.resolve(recipe).canonical() == recipe.canonical(), "resolving twice changes nothing"
        if recipe.reference is not None:
            assert recipe.reference.source
