"""Fast IBP's objective, phase by phase, against its formula put together from the core's tested parts."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from certbench.bounds import RELU, input_box, trace
from certbench.contract import SilentReporter, TrainTask
from certbench.data.catalog import DATASETS
from certbench.data.dataset import Dataset, to_pixels
from certbench.data.files import load_dataset
from certbench.errors import UsageError
from certbench.models import MODELS, build_network
from certbench.plugins import installed
from certbench.suites import suites
from certbench.training import NATURAL_EPS, SmoothedRamp, Step, relu_balance, robust_cross_entropy, tightness
from certbench_fast_ibp.objective import FastIBP
from certbench_fast_ibp.settings import FastIBPSettings

BATCHES = 10


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", None)


def prepared(digits: Dataset, folder: Path, **settings: object) -> tuple[FastIBP, nn.Module]:
    """The objective on a freshly prepared network, two natural epochs before a ramp of four."""
    recipe = installed().find_recipe("fast-ibp/digits-linf-0.1")
    task = TrainTask(
        recipe=recipe,
        settings=FastIBPSettings(ramp_start=2, ramp_epochs=4, **settings),  # type: ignore[arg-type]
        dataset=digits,
        device=torch.device("cpu"),
        folder=folder,
        build_network=lambda: build_network("cnn-small", digits.info, 0),
    )
    objective, network = FastIBP(task), build_network("cnn-small", digits.info, 0).train()
    objective.prepare(network, BATCHES)
    return objective, network


def expected(network: nn.Module, images: Tensor, labels: Tensor, eps: float, lam: float) -> Tensor:
    """``L_rob + lam (L_tight + L_relu)``, with the clean loss in place of L_rob while eps is 0."""
    graph = trace(network, tuple(images.shape[1:]))
    clean = graph.run(images)
    box = input_box(images, max(eps, NATURAL_EPS))
    bounds = graph.bound(box, clean.statistics, keep={RELU})
    robust = robust_cross_entropy(bounds.margins(labels))
    loss = robust if eps > 0 else nn.functional.cross_entropy(clean.logits, labels)
    return loss + lam * (tightness(box.radius, bounds.kept) + relu_balance(bounds.kept))


@pytest.mark.parametrize(
    ("batch", "phase"), [(0, "natural"), (10, "first of the ramp"), (12, "ramp"), (40, "ramp"), (55, "full")]
)
def test_the_loss_of_each_phase(digits: Dataset, tmp_path: Path, batch: int, phase: str) -> None:
    objective, network = prepared(digits, tmp_path)
    images, labels = to_pixels(digits.train.images[:32], 16), digits.train.labels[:32]
    twin = copy.deepcopy(network)
    loss, figures = objective.loss(images, labels, Step(batch, batch // BATCHES + 1, BATCHES))
    eps = SmoothedRamp(0.1, 2, 4, BATCHES)(batch)
    assert figures["eps"] == eps
    assert (eps == 0) == (phase in {"natural", "first of the ramp"})
    lam = 0.0 if phase == "full" else 0.5 * (1 - eps / 0.1)
    torch.testing.assert_close(loss, expected(twin, images, labels, eps, lam))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    for name, value in twin.named_buffers():
        torch.testing.assert_close(dict(network.named_buffers())[name], value, msg=f"{name}: updated once")


def test_the_training_radius_may_differ_from_the_certified_one(digits: Dataset, tmp_path: Path) -> None:
    objective, _ = prepared(digits, tmp_path, train_radius="0.2", ramp="linear")
    assert objective.eps_at(10_000) == 0.2
    assert objective.eps_at(BATCHES + 2 * BATCHES) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.ramp_start=0", "method.ramp_start = 0"),
        ("method.tolerance=1.5", "method.tolerance = 1.5"),
        ("method.train_radius=8/0", "divides by zero"),
        ("method.ramp=cubic", "method.ramp"),
    ],
)
def test_bad_settings_are_explained(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        installed().find_recipe("fast-ibp/digits-linf-0.1", [override])


def test_published_recipes_carry_the_papers_figures() -> None:
    recipe = installed().find_recipe("fast-ibp/cifar10-linf-8-255")
    assert recipe.reference is not None
    assert (recipe.reference.clean_error, recipe.reference.certified_error) == (51.72, 65.58)
    assert (recipe.train.epochs, recipe.train.milestones, recipe.train.batch_size) == (160, (120, 140), 128)
    assert recipe.method.settings["ramp_epochs"] == 80


@pytest.mark.parametrize(
    ("model", "dataset", "count"),
    [
        ("cnn7", "cifar10", 17_192_650),
        ("cnn7", "mnist", 13_259_338),
        ("cnn7", "tinyimagenet", 17_290_120),
        ("wide-resnet-8", "cifar10", 21_547_882),
        ("wide-resnet-8", "mnist", 17_615_434),
        ("wide-resnet-8", "tinyimagenet", 91_424_776),
        ("resnext-2x32", "cifar10", 17_611_018),
        ("resnext-2x32", "mnist", 13_677_706),
        ("resnext-2x32", "tinyimagenet", 16_981_960),
    ],
)
def test_networks_have_the_published_numbers_of_parameters(model: str, dataset: str, count: int) -> None:
    info = DATASETS["mnist" if dataset == "mnist" else "cifar10"]
    if dataset == "tinyimagenet":
        info = replace(info, shape=(3, 64, 64), classes=200)
    with torch.device("meta"):
        network = MODELS[model](info)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize(
    ("keep", "kinds"),
    [("everywhere", {1, 2}), ("convolutions", {2}), ("none", set())],
)
def test_batch_norms_are_switched_off_by_kind(
    digits: Dataset, tmp_path: Path, keep: str, kinds: set[int]
) -> None:
    objective, network = prepared(digits, tmp_path, batch_norm=keep)
    found = {
        1 if isinstance(m, nn.BatchNorm1d) else 2 for m in network.modules() if "BatchNorm" in repr(type(m))
    }
    assert found == kinds
    images, labels = to_pixels(digits.train.images[:32], 16), digits.train.labels[:32]
    loss, _ = objective.loss(images, labels, Step(12, 2, BATCHES))
    assert loss.isfinite()


def test_each_regularizer_has_its_switch_and_default_weights_stay(digits: Dataset, tmp_path: Path) -> None:
    images, labels = to_pixels(digits.train.images[:32], 16), digits.train.labels[:32]

    def loss(**settings: object) -> Tensor:
        objective, _ = prepared(digits, tmp_path, **settings)
        return objective.loss(images, labels, Step(12, 2, BATCHES))[0]

    both, tight, balance = loss(), loss(relu_balance=False), loss(tightness=False)
    none = loss(tightness=False, relu_balance=False)
    torch.testing.assert_close(tight + balance, both + none)
    assert none < tight and none <= balance
    _, network = prepared(digits, tmp_path, initialization="default")
    fresh = build_network("cnn-small", digits.info, 0)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), fresh.parameters(), strict=True))


def test_a_training_radius_above_the_cap_is_refused(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="train_radius = 0.3 lies above certify.cap = 0.2"):
        prepared(digits, tmp_path, train_radius="0.3")


def test_a_ramp_that_outlasts_training_is_said_to(digits: Dataset, tmp_path: Path) -> None:
    class Told(SilentReporter):
        said: ClassVar[list[str]] = []

        def say(self, message: str) -> None:
            self.said.append(message)

    objective, network = prepared(digits, tmp_path)
    objective.task = replace(objective.task, reporter=Told())
    epochs = objective.task.recipe.train.epochs
    for ramp, start, length, words in (
        ("smoothed", 2, epochs - 1, []),
        (
            "smoothed",
            2,
            epochs,
            [f"the ramp would end with epoch {epochs + 1}, training ends with epoch {epochs}"],
        ),
        ("none", 2, epochs, []),
        ("none", epochs + 1, 1, ["never comes to the full radius"]),
    ):
        Told.said.clear()
        changes = {"ramp": ramp, "ramp_start": start, "ramp_epochs": length}
        objective.settings = objective.settings.model_copy(update=changes)
        objective.prepare(network, BATCHES)
        assert len(Told.said) == len(words) and all(word in Told.said[0] for word in words)


def test_regularizers_need_relus(digits: Dataset, tmp_path: Path) -> None:
    objective, _ = prepared(digits, tmp_path)
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    with pytest.raises(UsageError, match="look at ReLUs, and model 'cnn-small' has none"):
        objective.prepare(smooth, BATCHES)
    objective.settings = objective.settings.model_copy(update={"regularizer_weight": 0.0})
    objective.prepare(smooth, BATCHES)


def test_a_single_image_cannot_train_a_batch_norm(digits: Dataset, tmp_path: Path) -> None:
    objective, _ = prepared(digits, tmp_path)
    images, labels = to_pixels(digits.train.images[:1], 16), digits.train.labels[:1]
    with pytest.raises(UsageError, match="more than one value per channel"):
        objective.loss(images, labels, Step(12, 2, BATCHES))
    with pytest.raises(UsageError, match="train.batch_size = 1"):
        installed().find_recipe("fast-ibp/digits-linf-0.1", ["train.batch_size=1"])


def test_table_4_is_a_suite_of_eight_rows() -> None:
    suite = suites(installed())["fast-ibp/table-4-70ep"]
    assert len(suite.members) == 8
    assert suite.members[-1].overrides == (), "the method itself"
    assert len({member.name for member in suite.members}) == 8
