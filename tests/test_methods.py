"""One list for every installed method: each trains, resumes, certifies and records under the same checks."""

from __future__ import annotations

import re
import tempfile
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from certbench.audit.ball import ball
from certbench.audit.search import gradient_guide
from certbench.bounds import input_box, trace
from certbench.contract import Reporter, SilentReporter, TeacherSettings, TrainTask
from certbench.data.dataset import to_pixels
from certbench.data.files import load_dataset
from certbench.models import build_network
from certbench.plugins import installed
from certbench.recipe import parse_recipe
from certbench.recorded import load_run
from certbench.results.checks import check_store
from certbench.results.store import ResultStore
from certbench.run import run_recipe
from certbench.stages.record import RunOutcome
from certbench.training import NoisyObjective, Step, fit
from certbench.training.checkpoint import save_network
from certbench.training.teacher import NetworkCard

METHODS = sorted(set(installed().methods()) - {"constant"})
"""The constant classifier learns nothing and keeps no checkpoint; its plugin tests it."""
SHORT = ["train.epochs=4", "train.milestones=[3]", "train.batch_size=128"]
RAMP = ["method.ramp_epochs=2"]
ATTACK = [*RAMP, "method.attack_steps=2"]
DRAWS = ["certify.smoothing.n=300", "certify.smoothing.subset=every-4"]
CLIMB = [*DRAWS, "method.warm_up_epochs=2", "method.attack_iterations=2"]
PER_METHOD = {
    "fast-ibp": RAMP,
    "adaptive-radii": RAMP,
    "ibp": RAMP,
    "crown-ibp": RAMP,
    "sabr": ATTACK,
    "mtl-ibp": ATTACK,
    "abstraction": ["train.schedule=milestones"],
    "abstraction-ibp": [
        *("method.ramp_start=3", "method.ramp_epochs=2"),
        *("train.batch_size=32", "train.schedule=milestones"),
    ],
    "smoothmix": CLIMB,
    "crt": DRAWS,
    "gaussian": DRAWS,
    "stability": DRAWS,
    "consistency": DRAWS,
    "smoothadv": CLIMB,
    "macer": [*DRAWS, "method.delay_epochs=2"],
}
"""What a four-epoch run of a method needs besides ``SHORT``; a new method adds its line here."""

pytestmark = pytest.mark.skipif(not METHODS, reason="no method is installed: this is the core alone")


def recipe_of(method: str) -> str:
    return next(name for name in installed().recipes() if name.startswith(f"{method}/digits-"))


class PlainNoise(NoisyObjective):
    """Cross entropy on noisy images."""

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        logits = self.network(images + self.noises(images, 1, step)[0])
        return torch.nn.functional.cross_entropy(logits, labels), {}


@cache
def teacher() -> Path:
    """A network file for methods that learn from one, made by the core alone."""
    folder, dataset = Path(tempfile.mkdtemp()), load_dataset("digits", None)
    content = {
        "dataset": "digits",
        "model": "cnn-small",
        "threat": {"norm": "l2", "sigma": 0.5},
        "method": {"name": "plain"},
        "train": {"epochs": 8, "learning_rate": 5e-3},
    }
    recipe = parse_recipe(content, "teacher")
    task = TrainTask(
        recipe=recipe,
        settings=None,
        dataset=dataset,
        device=torch.device("cpu"),
        folder=folder / "run",
        build_network=lambda: build_network("cnn-small", dataset.info, 1),
    )
    save_network(folder / "teacher.safetensors", fit(task, PlainNoise(task)))
    (folder / "teacher.json").write_text(NetworkCard.of(recipe, dataset).model_dump_json())
    return folder / "teacher.safetensors"


def overrides(method: str) -> list[str]:
    learns = issubclass(installed().owner(method).card.settings, TeacherSettings)
    return [*SHORT, *PER_METHOD.get(method, []), *([f"method.teacher={teacher()}"] if learns else [])]


def short_run(method: str, out: Path, reporter: Reporter | None = None) -> RunOutcome:
    return run_recipe(
        recipe_of(method), out=out, device="cpu", overrides=overrides(method), reporter=reporter
    )


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
    assert certificates["index"] == list(range(0, 360, outcome.recipe.smoothing.stride))
    assert set(certificates["verdict"]) <= {"certified", "unknown", "misclassified", "falsified", "abstain"}
    assert check_store(ResultStore(out / "results")) == []
    assert 0 <= outcome.certified_accuracy <= outcome.clean_accuracy <= 1
    if outcome.recipe.threat.norm == "linf":  # a smoothed classifier abstains where it only guesses better
        assert outcome.clean_accuracy > 0.2, "four epochs are enough to beat guessing"
    run = ResultStore(out / "results").run(outcome.run_id)
    assert (run["method"], run["dataset"], run["epochs"]) == (method, "digits", 4)
    shown = [re.sub(r"^(method\.teacher=).*/", r"\1", change) for change in overrides(method)]
    assert run["recipe_name"].endswith(" ".join(f"+{change}" for change in shown))
    assert {"train"} < set(rows(out, "timings")["stage"])


def test_no_certificate_is_broken_by_points_inside_its_own_ball(
    finished: tuple[str, Path, RunOutcome],
) -> None:
    _, out, outcome = finished
    if outcome.recipe.threat.norm != "linf":
        pytest.skip("a statistical certificate is about the smoothed network; its audit attacks that")
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
    sessions = ResultStore(tmp_path / "results").read("timings").to_pandas()
    sessions = sessions[(sessions["run_id"] == again.run_id) & (sessions["stage"] == "train")]
    assert len(sessions) == 2 and (sessions["seconds"] > 0).all(), "both sessions count"
    assert not list(again.folder.glob(".cost-*"))
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
    if recipe.threat.norm != "linf":
        return  # no radius is asked for; that radii follow from counts is among the rules of the store
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
