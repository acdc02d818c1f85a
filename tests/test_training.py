"""The training loop: schedules, checkpoints, resume, and stopping when the loss is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.contract import SilentReporter, TrainTask
from certbench.data.dataset import Dataset
from certbench.data.files import load_dataset
from certbench.errors import RunError
from certbench.models import build_network
from certbench.recipe import Train, parse_recipe
from certbench.training import SmoothedRamp, Step, fit
from certbench.training.checkpoint import load_latest
from certbench.training.fit import build_optimizer, learning_rate


class CrossEntropy:
    """The plainest objective; loses its loss at ``bad_batch`` if asked."""

    def __init__(self, bad_batch: int = -1) -> None:
        self.bad_batch = bad_batch

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        self.network = network

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss = F.cross_entropy(self.network(images), labels)
        return (loss * torch.nan if step.batch == self.bad_batch else loss), {}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", None)


def task(digits: Dataset, folder: Path, epochs: int = 3, seed: int = 0) -> TrainTask:
    recipe = parse_recipe(
        {
            "dataset": "digits",
            "model": "cnn-small",
            "seed": seed,
            "threat": {"radius": "0.1"},
            "method": {"name": "plain"},
            "train": {"epochs": epochs, "batch_size": 128, "learning_rate": 5e-3, "milestones": [2]},
        },
        "plain",
    )
    return TrainTask(
        recipe=recipe,
        settings=None,
        dataset=digits,
        device=torch.device("cpu"),
        folder=folder,
        build_network=lambda: build_network("cnn-small", digits.info, seed),
        reporter=SilentReporter(),
    )


def weights(network: nn.Module) -> list[Tensor]:
    return [value.clone() for value in network.state_dict().values()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_training_learns_and_the_same_seed_gives_the_same_bits(digits: Dataset, tmp_path: Path) -> None:
    one = fit(task(digits, tmp_path / "a"), CrossEntropy())
    two = fit(task(digits, tmp_path / "b"), CrossEntropy())
    other = fit(task(digits, tmp_path / "c", seed=1), CrossEntropy())
    assert same(weights(one), weights(two))
    assert not same(weights(one), weights(other))
    assert not one.training
    with torch.no_grad():
        predictions = one(digits.test.images.float() / 16).argmax(1)
    assert (predictions == digits.test.labels).float().mean() > 0.9


class Figures(CrossEntropy):
    """Shows the number of its step, as what was measured on the batch and as what a schedule has reached."""

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, _ = super().loss(images, labels, step)
        shown: dict[str, Tensor | float] = {"measured": torch.tensor(step.batch), "scheduled": step.batch}
        return loss, shown if step.batch % step.batches_per_epoch else {}


def test_measured_figures_of_an_epoch_are_means_over_the_steps_that_have_them(
    digits: Dataset, tmp_path: Path
) -> None:
    fit(made := task(digits, tmp_path, epochs=2), Figures())
    saved = load_latest(made.folder)
    steps = -(-len(digits.train) // 128)
    assert saved is not None and steps > 3
    first, second = saved.history
    assert first["measured"] == (1 + steps - 1) / 2 and first["scheduled"] == steps - 1
    assert second["measured"] == (steps + 1 + 2 * steps - 1) / 2 and second["scheduled"] == 2 * steps - 1


class Interrupt(SilentReporter):
    """Stands for Ctrl-C in the middle of an epoch."""

    def __init__(self, after: int) -> None:
        self.after = after

    def epoch_done(self, epoch: int, *rest: object) -> None:
        if epoch == self.after:
            raise KeyboardInterrupt


def test_an_interrupted_run_resumes_to_the_same_bits(digits: Dataset, tmp_path: Path) -> None:
    whole = fit(task(digits, tmp_path / "whole", epochs=4), CrossEntropy())
    cut = task(digits, tmp_path / "cut", epochs=4)
    with pytest.raises(KeyboardInterrupt):
        fit(replace(cut, reporter=Interrupt(after=2)), CrossEntropy())
    saved = load_latest(cut.folder)
    assert saved is not None
    assert saved.epoch == 2
    assert same(weights(fit(cut, CrossEntropy())), weights(whole))
    assert [p.name for p in sorted(cut.folder.iterdir())] == ["epoch-0004.json", "epoch-0004.safetensors"]


def test_a_finished_run_is_loaded_and_not_trained_again(digits: Dataset, tmp_path: Path) -> None:
    first = fit(task(digits, tmp_path), CrossEntropy())
    again = fit(task(digits, tmp_path), CrossEntropy(bad_batch=0))
    assert same(weights(first), weights(again))


def test_nan_stops_the_run_and_names_step_and_last_good_checkpoint(digits: Dataset, tmp_path: Path) -> None:
    steps = 12  # 1437 images in batches of 128
    with pytest.raises(RunError, match=rf"at step {2 * steps + 5} \(epoch 3\).*epoch-0002") as caught:
        fit(task(digits, tmp_path), CrossEntropy(bad_batch=2 * steps + 5))
    assert "\n" not in str(caught.value)
    saved = load_latest(tmp_path)
    assert saved is not None
    assert saved.epoch == 2
    assert all(t.isfinite().all() for t in saved.network.values())
    with pytest.raises(RunError, match="at step 0 .*no checkpoint yet"):
        fit(task(digits, tmp_path / "new"), CrossEntropy(bad_batch=0))


@pytest.mark.parametrize(
    "damage", ["cut", "flip", "no tensors", "bad sidecar", "foreign sidecar", "other epoch", "no history"]
)
def test_a_damaged_checkpoint_is_named_and_nothing_is_trained_over_it(
    digits: Dataset, tmp_path: Path, damage: str
) -> None:
    fit(task(digits, tmp_path, epochs=1), CrossEntropy())
    path, sidecar = tmp_path / "epoch-0001.safetensors", tmp_path / "epoch-0001.json"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no tensors":
        path.unlink()
    elif damage == "bad sidecar":
        sidecar.write_text('{"format": 1')
    elif damage in ("other epoch", "no history"):
        wrong = {"epoch": 2} if damage == "other epoch" else {"history": []}
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | wrong))
    else:
        sidecar.write_text(json.dumps({"format": 99, "epoch": 1}))
    with pytest.raises(RunError, match=r"epoch-0001.*delete epoch-0001") as caught:
        fit(task(digits, tmp_path, epochs=2), CrossEntropy())
    assert "\n" not in str(caught.value)


def test_a_crash_between_the_two_files_leaves_the_previous_checkpoint(
    digits: Dataset, tmp_path: Path
) -> None:
    fit(task(digits, tmp_path, epochs=1), CrossEntropy())
    (tmp_path / "epoch-0002.safetensors").write_bytes(b"half")
    saved = load_latest(tmp_path)
    assert saved is not None
    assert saved.epoch == 1
    fit(task(digits, tmp_path, epochs=2), CrossEntropy())


def test_a_checkpoint_folder_that_cannot_be_written_is_named(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write checkpoint .*file"):
        fit(task(digits, tmp_path / "file", epochs=1), CrossEntropy())


def test_a_ramp_of_a_few_batches_is_linear() -> None:
    ramp = SmoothedRamp(0.4, start=1, length=1, batches_per_epoch=2)
    assert [ramp(k) for k in range(4)] == [0.0, 0.2, 0.4, 0.4]
    assert SmoothedRamp(0.4, 1, 1, 1)(1) == 0.4


def test_milestones_lower_the_rate_from_the_next_epoch_on() -> None:
    settings = Train(epochs=10, learning_rate=1.0, milestones=(7, 9), decay=0.2)
    rates = [learning_rate(settings, Step(4 * epoch - 1, epoch, 4)) for epoch in range(1, 11)]
    assert rates == pytest.approx([1.0] * 7 + [0.2] * 2 + [0.04])


@pytest.mark.parametrize("division", [1e4, 100])
def test_one_cycle_is_torchs_linear_three_phase_cycle(division: float) -> None:
    settings = Train(epochs=5, learning_rate=0.02, schedule="one-cycle", final_division=division)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        0.02,
        total_steps=35,
        three_phase=True,
        anneal_strategy="linear",
        cycle_momentum=False,
        final_div_factor=division,
    )
    for batch in range(35):
        step = Step(batch, batch // 7 + 1, 7)
        assert learning_rate(settings, step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if batch < 34:
            theirs.step()


def test_cosine_falls_from_the_rate_to_nearly_0() -> None:
    settings = Train(epochs=2, learning_rate=0.5, schedule="cosine")
    rates = [learning_rate(settings, Step(batch, batch // 50 + 1, 50)) for batch in range(100)]
    assert rates[0] == 0.5 and rates[50] == pytest.approx(0.25) and 0 < rates[-1] < 1e-3
    assert rates == sorted(rates, reverse=True)


def test_optimizers_take_momentum_and_decay_from_the_recipe() -> None:
    network = nn.Linear(2, 2)
    sgd = build_optimizer(network, Train(epochs=1, optimizer="sgd", momentum=0.8, weight_decay=1e-4))
    assert isinstance(sgd, torch.optim.SGD)
    asked = {"momentum": 0.8, "weight_decay": 1e-4, "nesterov": False}
    assert sgd.defaults.items() >= asked.items()
    adam = build_optimizer(network, Train(epochs=1, weight_decay=2e-4))
    assert isinstance(adam, torch.optim.Adam) and adam.defaults["weight_decay"] == 2e-4


class OwnRate(CrossEntropy):
    """Sets the rate itself, whatever the recipe says."""

    def learning_rate(self, step: Step) -> float:
        return 0.0 if step.epoch == 1 else 1e-3


def test_an_objective_may_set_the_learning_rate_itself(digits: Dataset, tmp_path: Path) -> None:
    first = weights(build_network("cnn-small", digits.info, 0))
    frozen = weights(fit(task(digits, tmp_path / "a", epochs=1), OwnRate()))
    parameters = [name for name, _ in build_network("cnn-small", digits.info, 0).named_parameters()]
    names = list(build_network("cnn-small", digits.info, 0).state_dict())
    assert all(torch.equal(a, b) for n, a, b in zip(names, first, frozen, strict=True) if n in parameters)
    moved = weights(fit(task(digits, tmp_path / "b", epochs=2), OwnRate()))
    assert not same(frozen, moved)
