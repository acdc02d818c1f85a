"""What objectives of smoothed classifiers share, and several steps per batch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.contract import TrainTask
from certbench.data.dataset import Dataset, Split
from certbench.data.files import load_dataset
from certbench.errors import DataError, UsageError
from certbench.models import build_network
from certbench.recipe import Train, parse_recipe
from certbench.training import (
    NoisyObjective,
    Step,
    climb,
    fit,
    frozen,
    keep_near,
    noisy_logits,
    soft_vote,
    warm_up,
)
from certbench.training.fit import learning_rate


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", None)


def task(data: Dataset, folder: Path, **train: object) -> TrainTask:
    recipe = parse_recipe(
        {
            "dataset": "digits",
            "model": "cnn-small",
            "threat": {"norm": "l2", "sigma": 0.5},
            "method": {"name": "plain"},
            "train": {"epochs": 2, "batch_size": 128, **train},
        },
        "plain",
    )
    return TrainTask(
        recipe=recipe,
        settings=None,
        dataset=data,
        device=torch.device("cpu"),
        folder=folder,
        build_network=lambda: build_network("cnn-small", data.info, 0),
    )


class Recorder(NoisyObjective):
    """Trains on noisy images and writes down what it was given."""

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        super().prepare(network, batches_per_epoch)
        self.announced, self.seen = batches_per_epoch, []

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        self.seen.append((step, images, labels))
        (noise,) = self.noises(images, 1, step)
        return F.cross_entropy(self.network(images + noise), labels), {}


def recorded(data: Dataset, folder: Path, chunks: int, **train: object) -> Recorder:
    objective = Recorder(task(data, folder, **train))
    fit(objective.task, objective, chunks)
    return objective


def test_chunks_are_consecutive_equal_parts_of_a_batch(digits: Dataset, tmp_path: Path) -> None:
    whole, cut = recorded(digits, tmp_path / "1", 1), recorded(digits, tmp_path / "3", 3)
    assert cut.announced == 3 * whole.announced == 36
    assert [step.batch for step, _, _ in cut.seen] == list(range(72))
    for number, (_, images, labels) in enumerate(whole.seen):
        parts = cut.seen[3 * number : 3 * number + 3]
        size = len(labels) // 3
        assert torch.equal(torch.cat([part[1] for part in parts]), images[: 3 * size])
        assert torch.equal(torch.cat([part[2] for part in parts]), labels[: 3 * size])
        assert {part[0].epoch for part in parts} == {number // 12 + 1}


def test_a_last_batch_smaller_than_the_chunks_is_left_out(digits: Dataset, tmp_path: Path) -> None:
    few = replace(digits, train=digits.train.slice(0, 34))
    cut = recorded(few, tmp_path, 4, batch_size=16)
    assert [step.batch for step, _, _ in cut.seen] == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15, 16, 17, 18, 19]
    assert {len(labels) for _, _, labels in cut.seen} == {4}


@pytest.mark.parametrize(("batch_size", "images"), [(4, 100), (64, 4)])
def test_more_chunks_than_images_are_refused(
    digits: Dataset, tmp_path: Path, batch_size: int, images: int
) -> None:
    few = replace(digits, train=digits.train.slice(0, images))
    with pytest.raises(UsageError, match="cannot be cut into 5 chunks"):
        recorded(few, tmp_path, 5, batch_size=batch_size)
    assert not list(tmp_path.iterdir())


def test_images_outside_the_pixel_range_are_refused_before_training(digits: Dataset, tmp_path: Path) -> None:
    images = digits.train.images.clone()
    images[5, 0, 0, 0] = 17
    broken = replace(digits, train=Split(images, digits.train.labels))
    with pytest.raises(DataError, match=r"leave \[0, 1\]: one holds 17, and 1 is 16"):
        recorded(broken, tmp_path, 1)


def test_noise_depends_on_seed_and_step_alone_and_has_its_standard_deviation(
    digits: Dataset, tmp_path: Path
) -> None:
    objective = Recorder(task(digits, tmp_path))
    images = torch.zeros(50, 1, 8, 8)
    first = objective.noises(images, 4, Step(3, 1, 10))
    torch.rand(7)
    assert torch.equal(first, objective.noises(images, 4, Step(3, 2, 5)))
    assert not torch.equal(first, objective.noises(images, 4, Step(4, 1, 10)))
    assert first.shape == (4, 50, 1, 8, 8)
    assert 0.48 < float(first.std()) < 0.52
    assert not torch.equal(first[0], first[1])


def test_a_lagging_milestone_takes_effect_one_epoch_later() -> None:
    train = Train(epochs=90, learning_rate=1.0, milestones=(30, 60), decay=0.1, milestone_lag=1)
    rates = [learning_rate(train, Step(0, epoch, 10)) for epoch in range(1, 91)]
    assert rates.count(1.0) == 31, "epochs 0 to 30, counted from 0, as released"
    assert rates[31] == pytest.approx(0.1)
    assert rates[60:62] == pytest.approx([0.1, 0.01])
    nominal = Train(epochs=90, learning_rate=1.0, milestones=(30, 60), decay=0.1)
    assert learning_rate(nominal, Step(0, 31, 10)) == pytest.approx(0.1)
    assert "milestone_lag" not in nominal.model_dump(), "run ids of earlier rows stay"


def small(classes: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, classes)
    ).double()


def test_one_pass_is_the_passes_one_by_one() -> None:
    network = small().eval()
    images, noises = torch.rand(4, 1, 5, 5).double(), torch.randn(3, 4, 1, 5, 5).double()
    logits = noisy_logits(network, images, noises)
    torch.testing.assert_close(logits, torch.stack([network(images + noise) for noise in noises]))
    by_hand = sum(network(images + noise).softmax(1) for noise in noises) / 3
    torch.testing.assert_close(soft_vote(logits), by_hand)


def test_the_climb_goes_up_leaves_the_network_alone_and_stays_among_pixels() -> None:
    network, images = small().train(), torch.rand(6, 1, 5, 5).double()
    images.requires_grad_(False)
    labels, noises = torch.arange(6) % 3, 0.1 * torch.randn(2, 6, 1, 5, 5).double()
    network[1].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    path = climb(network, images, labels, noises, 5, 0.05)
    assert len(path) == 6
    assert path[0] is images
    network.eval()
    hits = [soft_vote(noisy_logits(network, x, noises)).gather(1, labels[:, None]) for x in path]
    assert all((after < start).all() for start, after in itertools.pairwise(hits))
    steps = [(b - a).flatten(1).norm(dim=1) for a, b in itertools.pairwise(path)]
    assert all((step <= 0.05 + 1e-9).all() for step in steps)
    assert all(((x >= 0) & (x <= 1)).all() for x in path)
    network.train()
    climb(network, images, labels, noises, 1, 0.05)
    assert network.training
    assert all(module.training for module in network)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"
    assert all(p.grad is None for p in network.parameters())
    assert [p.requires_grad for p in network.parameters()] == [True, True, False, True, True, True]


def test_a_frozen_network_is_put_back_after_an_error() -> None:
    network = small().train()
    with pytest.raises(RuntimeError), frozen(network):
        assert not network.training
        raise RuntimeError
    assert network.training
    assert all(p.requires_grad for p in network.parameters())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 3))
def test_points_kept_near_are_near_and_pixels(seed: int, radius: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(4, 1, 3, 3, generator=generator).double()
    x = images + 3 * torch.randn(4, 1, 3, 3, generator=generator).double()
    near = keep_near(x, images, radius)
    assert ((near - images).flatten(1).norm(dim=1) <= radius + 1e-12).all()
    assert ((near >= 0) & (near <= 1)).all()
    assert torch.equal(keep_near(x, images, None), x.clamp(0, 1))
    if radius == 0:
        assert torch.equal(near, images)


def test_warm_up_reaches_one_at_its_last_epoch() -> None:
    assert [warm_up(epoch, 4) for epoch in range(1, 7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warm_up(1, 0) == 1.0
