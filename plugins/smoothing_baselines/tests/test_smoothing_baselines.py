"""The baselines' objectives against their formulas, and the whole chain on the digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from certbench.cli import main
from certbench.contract import TrainTask
from certbench.data.dataset import to_pixels
from certbench.data.files import load_dataset
from certbench.errors import UsageError
from certbench.models import build_network
from certbench.plugins import installed
from certbench.recorded import audit_again, certify_again
from certbench.results.checks import check_store
from certbench.results.store import ResultStore
from certbench.run import run_recipe
from certbench.training import Step, gaussian_noise
from certbench_smoothing_baselines.gaussian import Gaussian

QUICK = [
    "train.epochs=2",
    "train.milestones=[]",
    "certify.smoothing.n=500",
    "certify.smoothing.subset=every-4",
]


def test_gaussian_is_cross_entropy_on_noisy_images(tmp_path: Path) -> None:
    digits = load_dataset("digits", None)
    recipe = installed().find_recipe("gaussian/digits-l2-0.5", ["method.train_sigma=0.25"])
    task = TrainTask(
        recipe=recipe,
        settings=installed().settings(recipe),
        dataset=digits,
        device=torch.device("cpu"),
        folder=tmp_path,
        build_network=lambda: build_network("cnn-small", digits.info, 0),
    )
    objective, network = Gaussian(task), task.build_network().eval()
    objective.prepare(network, 10)
    images, labels = to_pixels(digits.train.images[:16], 16), digits.train.labels[:16]
    loss, _ = objective.loss(images, labels, Step(7, 1, 10))
    delta = gaussian_noise(images, 0.25, recipe.seed, Step(7, 1, 10))[0]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(network(images + delta), labels))
    again, _ = objective.loss(images, labels, Step(8, 1, 10))
    assert again != loss, "each step draws its own noise"


def test_noise_of_a_step_is_normal_and_comes_again() -> None:
    images, step = torch.zeros(50, 1, 8, 8), Step(3, 1, 10)
    noise = gaussian_noise(images, 0.5, 0, step, copies=4)
    assert noise.shape == (4, 50, 1, 8, 8)
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)
    torch.testing.assert_close(noise, gaussian_noise(images, 0.5, 0, step, copies=4))
    others = [
        gaussian_noise(images, 0.5, 1, step, copies=4),
        gaussian_noise(images, 0.5, 0, step, copies=4, purpose="attack"),
    ]
    assert all((noise - other).abs().max() > 0.1 for other in others)


def test_from_recipe_to_board(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, certify by two certifiers, audit; the store holds together and a board is built."""
    outcome = run_recipe("gaussian/digits-l2-0.5", out=tmp_path, device="cpu", overrides=QUICK, attack=None)
    row = ResultStore(tmp_path / "results").run(outcome.run_id)
    assert (row["norm"], row["radius"], row["cap"], row["sigma"]) == ("l2", None, None, 0.5)
    assert row["protocol"] == "l2-sequential-1-every-4"
    assert list((outcome.folder).glob("*.partial")) == []
    for certifier in ("smoothing", "smoothing-sequential-label"):
        certify_again(outcome.run_id, {"certifier": certifier}, out=tmp_path, device="cpu", attack=None)
    audited = audit_again(outcome.run_id, out=tmp_path, device="cpu")
    assert not audited.void
    store = ResultStore(tmp_path / "results")
    assert check_store(store) == []
    certificates = store.read("certificates").to_pandas()
    assert set(certificates["certifier"]) == {
        "smoothing",
        "smoothing-sequential",
        "smoothing-sequential-label",
    }
    assert set(certificates["index"]) == set(range(0, 360, 4))
    assert set(store.read("audits").to_pandas()["outcome"]) <= {"held"}
    with pytest.raises(SystemExit):
        main(["leaderboard", "build", str(tmp_path)])
    assert "digits-l2" in " ".join(path.name for path in tmp_path.iterdir())


def test_a_radius_cannot_be_asked_of_a_smoothed_run(tmp_path: Path) -> None:
    overrides = [*QUICK, "train.epochs=1", "certify.smoothing.subset=every-90"]
    outcome = run_recipe(
        "gaussian/digits-l2-0.5", out=tmp_path, device="cpu", overrides=overrides, attack=None
    )
    with pytest.raises(UsageError, match="radius says nothing"):
        certify_again(outcome.run_id, {}, "0.1", out=tmp_path, device="cpu")
    with pytest.raises(UsageError, match="unknown certifier 'crown' for norm l2"):
        certify_again(outcome.run_id, {"certifier": "crown"}, out=tmp_path, device="cpu")
    with pytest.raises(UsageError, match="guarantee says nothing"):
        certify_again(outcome.run_id, {"guarantee": "real_arith"}, out=tmp_path, device="cpu")


def test_lenet_has_the_published_size_and_needs_larger_images() -> None:
    from certbench.data.catalog import dataset_info

    network = build_network("lenet", dataset_info("mnist"), 0)
    assert sum(p.numel() for p in network.parameters()) == 431_080
    with pytest.raises(UsageError, match="16 pixels or more"):
        build_network("lenet", dataset_info("digits"), 0)
