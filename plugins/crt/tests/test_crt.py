"""CRT against arrays of its released code, teachers of every kind, and teachers it must refuse."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.cli import main
from certbench.contract import SilentReporter, TrainTask
from certbench.data.dataset import to_pixels
from certbench.data.files import load_dataset
from certbench.errors import DataError, RunError, UsageError
from certbench.models import build_network
from certbench.plugins import installed
from certbench.recipe import Augmentation
from certbench.recorded import load_run
from certbench.results.store import ResultStore
from certbench.run import Run, run_recipe
from certbench.stages.record import RunOutcome
from certbench.training import Step, fit, gaussian_noise
from certbench.training.checkpoint import save_network
from certbench.training.teacher import ready
from certbench_crt.objective import CRT, transfer_loss

ARRAYS = np.load(Path(__file__).parent / "data" / "crt.npz", allow_pickle=False)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


def array(name: str) -> Tensor:
    return torch.from_numpy(ARRAYS[name])


def tiny(start: str) -> nn.Module:
    """The tiny network of the arrays with the weights that begin with ``start``."""
    weights = {key.removeprefix(start): array(key) for key in ARRAYS if key.startswith(start)}
    parts: list[tuple[str, nn.Module]] = [("conv", nn.Conv2d(1, 4, 3, padding=1))]
    parts += [("bn", nn.BatchNorm2d(4))] if "bn.weight" in weights else []
    parts += [
        ("relu", nn.ReLU()),
        ("pool", nn.AvgPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(64, 5)),
    ]
    network = nn.Sequential(OrderedDict(parts)).double()
    network.load_state_dict(weights, strict=False)
    return network


@pytest.mark.parametrize("case", ["crt_a", "crt_b"])
def test_three_steps_as_the_released_code_takes_them(case: str) -> None:
    a, sigma, _, momentum, weight_decay = array(f"{case}_hp").tolist()
    teacher, student = tiny(f"{case}_teacher_").eval(), tiny(f"{case}_w0_").train()
    optimizer = torch.optim.SGD(student.parameters(), 1.0, momentum, weight_decay=weight_decay)
    for k in range(3):
        optimizer.param_groups[0]["lr"] = float(array(f"{case}_lr")[k])
        x = array(f"{case}_x")[k] + sigma * array(f"{case}_z")[k]
        z_S, z_T = student(x), teacher(x).detach()
        transfer, natural = transfer_loss(z_S, z_T), F.cross_entropy(z_S, array(f"{case}_y")[k])
        loss = a * transfer + (1 - a) * natural
        for name, value in (("logit_loss", transfer), ("cls_loss", natural), ("loss", loss)):
            torch.testing.assert_close(value, array(f"{case}_{name}")[k], **TOLERANCE)
        optimizer.zero_grad()
        loss.backward()
        grad = torch.cat([p.grad.flatten() for p in student.parameters()])
        torch.testing.assert_close(grad, array(f"{case}_grad")[k], **TOLERANCE)
        optimizer.step()
    for key, value in tiny(f"{case}_w1_").state_dict().items():
        if key in {name.removeprefix(f"{case}_w1_") for name in ARRAYS}:
            torch.testing.assert_close(student.state_dict()[key], value, **TOLERANCE)


def test_distances_by_hand_and_in_probabilities() -> None:
    z_S, z_T = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    assert float(transfer_loss(z_S, z_T)) == pytest.approx(2.5)
    p = transfer_loss(z_S, z_T, "probs")
    assert float(p) == pytest.approx(float((z_S.softmax(1) - z_T.softmax(1)).norm(dim=1).mean()))
    z = z_T.clone().requires_grad_()
    transfer_loss(z, z_T).backward()
    assert torch.equal(z.grad, torch.zeros(2, 2)), "no slope at equality"
    far = (z_T + torch.tensor([1e-6, 0.0])).requires_grad_()
    transfer_loss(far, z_T).backward()
    torch.testing.assert_close(
        far.grad.norm(dim=1), torch.full((2,), 0.5), msg="a unit vector for each image"
    )


# The teacher, found by the harness ----------------------------------------------------------------------------------

SHORT = ["train.epochs=2", "train.milestones=[]", "train.batch_size=128", "certify.smoothing.n=1000"]
DIGITS = load_dataset("digits", None)


def teacher_file(folder: Path, **card: object) -> Path:
    """An untrained network with its card, as a run leaves it behind."""
    folder.mkdir(exist_ok=True)
    path = folder / "teacher.safetensors"
    save_network(path, build_network("cnn-small", DIGITS.info, 5))
    known = {
        "model": "cnn-small",
        "dataset": "digits",
        "dataset_digest": DIGITS.digest,
        "class_names": DIGITS.info.class_names,
        "sigma": 0.5,
        **card,
    }
    path.with_suffix(".json").write_text(json.dumps(known))
    return path


def prepared(teacher: object, out: Path, *overrides: str) -> Run:
    recipe = installed().find_recipe(
        "crt/digits-l2-0.5", [f"method.teacher={teacher}", *SHORT, "train.epochs=1", *overrides]
    )
    return Run.prepare(recipe, out, None, torch.device("cpu"), installed(), SilentReporter())


def teacher_recipe(folder: Path) -> Path:
    """A short recipe for a teacher, as a file; it is a student itself, of a file, so that no other plugin is needed."""
    text = installed().recipes()["crt/digits-l2-0.5"].read_text(encoding="utf-8")
    text = text.replace('"smoothmix/digits-l2-0.5"', json.dumps(str(teacher_file(folder / "first"))))
    text = re.sub(r"(?m)^epochs = \d+$", "epochs = 1", text)
    path = folder / "teach.toml"
    path.write_text(re.sub(r"(?m)^milestones = .*$", "", text), encoding="utf-8")
    return path


def run_student(teacher: object, out: Path, *overrides: str) -> RunOutcome:
    changes = [f"method.teacher={teacher}", *SHORT, *overrides]
    return run_recipe("crt/digits-l2-0.5", out=out, device="cpu", overrides=changes)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, RunOutcome]:
    """A teacher's file, the folder of results, and the student's run."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("crt")
    path = teacher_file(out / "files")
    return path, out / "out", run_student(path, out / "out")


def test_a_student_of_a_file_records_its_teacher(taught: tuple[Path, Path, RunOutcome]) -> None:
    path, out, outcome = taught
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    row = ResultStore(out / "results").run(outcome.run_id)
    recorded = json.loads(row["recipe"])["method"]
    assert (recorded["teacher"], recorded["teacher_id"]) == ("teacher.safetensors", digest)
    assert row["teacher_digest"] == digest
    assert row["recipe_name"].startswith("crt/digits-l2-0.5 +method.teacher=teacher.safetensors +")
    assert str(path.parent) not in row["recipe"] + row["recipe_name"]
    notes = json.loads((outcome.folder / "teacher.json").read_text())
    assert notes["id"] == notes["digest"] == digest
    assert notes["card"]["sigma"] == 0.5


def test_the_run_id_follows_the_teachers_content_and_not_its_place(
    taught: tuple[Path, Path, RunOutcome], tmp_path: Path
) -> None:
    path, out, outcome = taught
    moved = teacher_file(tmp_path / "elsewhere")
    assert run_student(moved, out) == replace(outcome, recipe=run_student(moved, out).recipe)
    other = build_network("cnn-small", DIGITS.info, 6)
    save_network(moved, other)
    changed = prepared(moved, tmp_path / "out")
    assert changed.id != outcome.run_id
    assert path.read_bytes() != moved.read_bytes()


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.teacher={}"],
        ["method.teacher=/home/me/secret.safetensors", "method.teacher={}"],
        ["method.teacher=/home/me/secret.toml", "train.epochs=1", "method.teacher={}"],
        ['method.teacher="{}"'],
    ],
)
def test_no_folder_gets_into_a_name(tmp_path: Path, overrides: list[str]) -> None:
    path = teacher_file(tmp_path / "secret +here")
    changes = [change.format(path) for change in overrides]
    recipe = installed().find_recipe("crt/digits-l2-0.5", changes)
    run = Run.prepare(recipe, tmp_path / "out", None, torch.device("cpu"), installed(), SilentReporter())
    assert "secret" not in run.recipe.canonical_json()
    assert run.recipe.name.endswith("+method.teacher=teacher.safetensors")


def test_a_slash_after_a_recipes_file_changes_nothing(tmp_path: Path) -> None:
    path = teacher_recipe(tmp_path)
    plain, slashed = prepared(path, tmp_path / "out"), prepared(f"{path}/", tmp_path / "out")
    assert plain.id == slashed.id and plain.recipe.name == slashed.recipe.name


def test_a_finished_student_is_loaded_without_its_teacher(taught: tuple[Path, Path, RunOutcome]) -> None:
    path, out, outcome = taught
    path.rename(path.with_suffix(".away"))
    try:
        network = load_run(outcome.run_id, out=out, device="cpu").network
    finally:
        path.with_suffix(".away").rename(path)
    assert not network.training


def test_a_student_teaches_the_next_and_is_trained_when_it_is_missing(
    taught: tuple[Path, Path, RunOutcome], tmp_path: Path
) -> None:
    path, out, outcome = taught
    recipe = installed().recipes()["crt/digits-l2-0.5"].read_text()
    first = tmp_path / "first.toml"
    text = recipe.replace('"smoothmix/digits-l2-0.5"', json.dumps(str(path))).replace(
        "epochs = 30", "epochs = 1"
    )
    first.write_text(text.replace("milestones = [20, 26]", "").replace("10_000", "1000"))
    second = run_student(first, out)
    rows = {row["run_id"]: row for row in ResultStore(out / "results").read("runs").to_pylist()}
    teacher_id = json.loads(rows[second.run_id]["recipe"])["method"]["teacher_id"]
    assert teacher_id in rows
    assert (
        json.loads(rows[teacher_id]["recipe"])["method"]["teacher_id"]
        == hashlib.sha256(path.read_bytes()).hexdigest()
    )
    notes = json.loads((second.folder / "teacher.json").read_text())
    assert notes["digest"] == rows[teacher_id]["checkpoint_digest"]
    stages = ResultStore(out / "results").read("timings").to_pandas().groupby("run_id")["stage"].apply(list)
    assert stages[teacher_id] == ["train"], (
        "the teacher's training has its own timing, and it is not certified"
    )
    by_file = run_student(out / "runs" / teacher_id / "network.safetensors", out)
    assert by_file.run_id != second.run_id
    weights = [load_file(run.folder / "network.safetensors") for run in (second, by_file)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]), (
        "the same teacher either way"
    )
    assert outcome.run_id not in (second.run_id, teacher_id)


def test_a_finished_student_needs_its_teacher_no_longer(tmp_path: Path) -> None:
    recipe = teacher_recipe(tmp_path)
    student = prepared(recipe, tmp_path / "out")
    trained = student.train()
    assert isinstance(student.teacher, Run)
    digest = student.store.run(student.id)["teacher_digest"]
    assert digest == student.store.run(student.teacher.id)["checkpoint_digest"]
    shutil.rmtree(student.teacher.folder)
    again = prepared(recipe, tmp_path / "out").train()
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not any(student.teacher.folder.glob("epoch-*")), "the teacher was trained again for nothing"
    assert student.store.run(student.id)["teacher_digest"] == digest


def test_a_student_that_began_with_another_network_is_not_gone_on_with(tmp_path: Path) -> None:
    student = prepared(teacher_file(tmp_path / "files"), tmp_path / "out")
    student.train()
    (student.folder / "network.safetensors").unlink()
    note = student.folder / "teacher.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "digest": "0" * 64}))
    for row in (tmp_path / "out" / "results" / "runs").iterdir():
        row.unlink()
    with pytest.raises(RunError, match="began to learn from network 0000000000000000, teacher"):
        student.train()
    for broken in ("[]", "[" * 100_000, '{"digest": ["x"]}', '{"digest": "ABC"}'):
        note.write_text(broken)
        with pytest.raises(RunError, match="teacher.json cannot be read .*; remove its folder to train"):
            student.train()
    note.unlink()
    with pytest.raises(RunError, match="began to learn from an unknown network"):
        student.train()


def test_what_is_recorded_of_a_teacher_stays(tmp_path: Path) -> None:
    student = prepared(teacher_file(tmp_path / "files"), tmp_path / "out")
    student.train()
    recorded = student.store.run(student.id)
    (student.folder / "teacher.json").unlink()
    student.train()
    assert student.store.run(student.id)["teacher_digest"] == recorded["teacher_digest"] is not None
    with pytest.raises(DataError, match="learnt from network"):
        student.store.write_run({**recorded, "teacher_digest": "0" * 64})


def test_a_network_that_is_taken_keeps_its_teacher(tmp_path: Path) -> None:
    path = teacher_file(tmp_path / "files")
    first = prepared(path, tmp_path / "out")
    first.train()
    second = prepared(path, tmp_path / "out", "certify.smoothing.n=2000")
    second.train()
    assert first.id != second.id
    rows = [first.store.run(run.id) for run in (first, second)]
    assert (
        rows[0]["teacher_digest"]
        == rows[1]["teacher_digest"]
        == hashlib.sha256(path.read_bytes()).hexdigest()
    )


def test_a_teacher_that_was_submitted_or_is_built_otherwise_is_refused(tmp_path: Path) -> None:
    student = prepared(teacher_recipe(tmp_path), tmp_path / "out")
    teacher = student.teacher
    assert isinstance(teacher, Run)
    (teacher.folder / "structure.txt").write_text("other")
    with pytest.raises(RunError, match="is built otherwise than when run"):
        student.train()
    (teacher.folder / "structure.txt").unlink()
    teacher.train()
    submission = {"run_id": teacher.id, "submitter": "somebody", "bundle_digest": "0" * 64, "rechecked": 0}
    teacher.store.write_submission(submission)
    with pytest.raises(RunError, match="imported from 'somebody'"):
        student.train()
    assert not list(student.folder.glob("epoch-*"))


def test_teachers_in_a_circle_are_refused(tmp_path: Path) -> None:
    recipe = installed().recipes()["crt/digits-l2-0.5"].read_text()
    names = [tmp_path / "one.toml", tmp_path / "two.toml"]
    for own, other in (names, names[::-1]):
        own.write_text(recipe.replace('"smoothmix/digits-l2-0.5"', json.dumps(str(other))))
    with pytest.raises(UsageError, match="teachers in a circle: .*one.toml <- .*two.toml <- .*one.toml"):
        run_recipe(str(names[1]), out=tmp_path / "out", device="cpu")


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"sigma": 0.25}, "another noise level: 0.25, the student 0.5; method.force_teacher = true"),
        ({"sigma": None}, "another noise level: None, the student 0.5"),
        ({"class_names": ["1", "0", *map(str, range(2, 10))]}, "another class 0: 1, the student 0"),
        ({"dataset_digest": "0" * 64}, r"another training set: digits \(0000000000000000\)"),
        ({"class_names": ["0", "1"]}, "another number of class names: 2, the student 10"),
        ({"dataset": "mnist"}, r"takes images \(1, 28, 28\)"),
        ({"model": "cnn7"}, "holds no weights of 'cnn7'"),
        ({"model": "cnn8"}, "unknown model 'cnn8'"),
        ({"modle": "cnn7"}, "unknown key 'modle'; did you mean 'model'?"),
    ],
)
def test_an_unsuitable_teacher_is_refused_before_training(
    tmp_path: Path, card: dict[str, object], words: str
) -> None:
    path = teacher_file(tmp_path / "files", **card)
    with pytest.raises(UsageError, match=words):
        run_student(path, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("epoch-*"))


def test_a_forced_teacher_of_another_noise_level_is_taken(tmp_path: Path) -> None:
    path = teacher_file(tmp_path / "files", sigma=0.25)
    assert run_student(path, tmp_path / "out", "method.force_teacher=true", "train.epochs=1").run_id


def test_a_missing_teacher_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="there is no .*none.safetensors; a teacher may also be the name of a recipe"
    ):
        run_student(tmp_path / "none.safetensors", tmp_path / "out")
    path = teacher_file(tmp_path / "files")
    path.with_suffix(".json").unlink()
    with pytest.raises(UsageError, match=r"there is no .*teacher.json"):
        run_student(path, tmp_path / "out")
    with pytest.raises(UsageError, match="unknown recipe 'crt/nothing'"):
        run_student("crt/nothing", tmp_path / "out")


def test_an_unknown_teacher_is_refused_before_the_first_run_of_a_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = [
        "run",
        "crt/digits-l2-0.5",
        "--set",
        "method.teacher=crt/nothing",
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit) as caught:
        main(student)
    assert caught.value.code == 2 and "unknown recipe 'crt/nothing'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", [".safetensors", ".json"])
def test_a_teacher_that_is_a_pipe_or_a_folder_is_refused(tmp_path: Path, ending: str) -> None:
    """Reading a pipe waits for a writer, for ever."""
    path = teacher_file(tmp_path / "files").with_suffix(ending)
    for make in (os.mkfifo, Path.mkdir):
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(UsageError, match=f"teacher{ending} is not a regular file"):
            prepared(path.with_suffix(".safetensors"), tmp_path / "out")


def test_a_teachers_file_is_known_by_its_ending_in_any_case(tmp_path: Path) -> None:
    path = teacher_file(tmp_path / "files")
    plain = prepared(path, tmp_path / "out")
    upper = prepared(path.rename(path.with_suffix(".SafeTensors")), tmp_path / "out")
    assert "files" not in upper.recipe.canonical_json()
    assert upper.recipe.method.settings["teacher"] == "teacher.SafeTensors"
    assert upper.recipe.method.settings["teacher_id"] == plain.recipe.method.settings["teacher_id"]


def test_a_pinned_teacher_must_be_the_one(tmp_path: Path) -> None:
    path = teacher_file(tmp_path / "files")
    with pytest.raises(UsageError, match="not the 0123456789abcdef that method.teacher_id asks for"):
        run_student(path, tmp_path / "out", "method.teacher_id=0123456789abcdef")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_a_teacher_with_logits_that_are_not_finite_is_refused_before_training(
    tmp_path: Path, value: float
) -> None:
    path = teacher_file(tmp_path / "files")
    network = build_network("cnn-small", DIGITS.info, 5)
    with torch.no_grad():
        network[-1].bias[3] = value
    save_network(path, network)
    with pytest.raises(RunError, match="gives logits on noise that are NaN, infinite or too large"):
        run_student(path, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("epoch-*"))


class FailsInTheDark(nn.Module):
    """Logits that are not finite where an image is darker than noise is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        dark = x.mean((1, 2, 3)) < 0.25
        logits: Tensor = self.network(x)
        return logits.masked_fill(dark[:, None], torch.nan)


def test_a_teacher_that_fails_on_training_images_alone_is_named(tmp_path: Path) -> None:
    task = objective_task(tmp_path)
    teacher = ready("a wary network", FailsInTheDark(task.teacher.network), torch.device("cpu"))
    with pytest.raises(RunError, match="a wary network gives logits on training images that are NaN"):
        installed().train(replace(task, teacher=teacher))


def test_a_rate_that_is_too_high_is_not_the_teachers_fault(tmp_path: Path) -> None:
    task = objective_task(
        tmp_path, "train.learning_rate=1e30", "train.optimizer=sgd", "train.gradient_clip=0"
    )
    with pytest.raises(RunError, match="lower train.learning_rate"):
        installed().train(task)


@pytest.mark.parametrize("space", ["logits", "probs"])
@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_the_loss_is_the_sum_of_its_two_terms(tmp_path: Path, a: float, space: str) -> None:
    """L = a mean_i ||z_S,i - z_T,i||_2 + (1 - a) mean_i CE(z_S,i, y_i), all of the same noisy images."""
    task = objective_task(tmp_path, f"method.transfer_weight={a}", f"method.space={space}")
    objective, step = CRT(task), Step(3, 1, 10)
    student = task.build_network().eval()  # the loss is then the same twice
    objective.prepare(student, 10)
    images, y = to_pixels(DIGITS.train.images[:16], 16), DIGITS.train.labels[:16]
    loss, figures = objective.loss(images, y, step)
    x = images + gaussian_noise(images, 0.5, task.seed, step)[0]
    z_S, z_T = student(x), task.teacher.network(x)
    outputs = {"logits": (z_S, z_T), "probs": (z_S.softmax(1), z_T.softmax(1))}
    p_S, p_T = outputs[space]
    transfer = ((p_S - p_T) ** 2).sum(1).sqrt().mean()
    natural = (z_S.logsumexp(1) - z_S.gather(1, y[:, None])[:, 0]).mean()
    torch.testing.assert_close(loss, a * transfer + (1 - a) * natural)
    torch.testing.assert_close(figures["transfer"], transfer.detach())
    assert abs((transfer - natural).detach()) > 0.1, "the two terms are told apart"


def test_recipes_hold_the_released_settings() -> None:
    """Section by section of the release's configurations: CIFAR-10 and ImageNet, and its recommendation of one sigma."""
    found = {}
    for name in installed().recipes():
        method, _, rest = name.partition("/")
        if method != "crt" or not rest.startswith(("cifar10", "imagenet")):
            continue
        recipe = installed().find_recipe(name)
        of, train, on_imagenet = installed().settings(recipe), recipe.train, recipe.dataset == "imagenet"
        epochs, batch = (90, 400) if on_imagenet else (200, 128)
        assert (of.transfer_weight, of.space, of.force_teacher) == (1.0, "logits", False)
        assert (train.epochs, train.batch_size, train.learning_rate) == (epochs, batch, 0.1)
        assert (train.optimizer, train.momentum, train.weight_decay) == ("sgd", 0.9, 1e-4)
        assert (train.schedule, train.decay, train.milestone_lag) == ("milestones", 0.1, 0)
        assert train.milestones == (epochs // 2, 3 * epochs // 4)
        assert train.augment and not train.gradient_clip
        crop = Augmentation(flip=True, crop_padding=4, crop_fill=0.0)
        assert train.augmentation == (None if on_imagenet else crop)  # ImageNet's own is the released one
        drawn = recipe.smoothing
        assert recipe.certify.certifier == "smoothing"
        assert (drawn.n0, drawn.n, drawn.failure_probability) == (100, 100_000, 0.001)
        assert drawn.subset == ("every-100" if on_imagenet else "all")
        assert recipe.model != "resnet20", "the smallest network teaches"
        found[recipe.model, recipe.sigma, of.teacher] = name
        if of.teacher in installed().recipes():  # another plugin may bring it
            assert installed().find_recipe(of.teacher).sigma == recipe.sigma
    assert len(found) == 15


def test_the_student_comes_to_agree_with_its_teacher(tmp_path: Path) -> None:
    task = objective_task(tmp_path)
    student = fit(task, CRT(task))
    x = to_pixels(DIGITS.train.images, 16)
    x = x + 0.5 * torch.randn(x.shape)
    with torch.no_grad():
        z_S, z_T = student(x), task.teacher.network(x)
    assert (z_S.argmax(1) == z_T.argmax(1)).float().mean() > 0.9
    assert not any(p.requires_grad for p in task.teacher.network.parameters())
    assert not task.teacher.network.training


def objective_task(folder: Path, *overrides: str) -> TrainTask:
    """A student that starts from other weights than its teacher, which was never trained."""
    changes = ["train.epochs=12", "train.milestones=[8]", *overrides]
    recipe = installed().find_recipe("crt/digits-l2-0.5", changes)
    network = build_network("cnn-small", DIGITS.info, 5)
    return TrainTask(
        recipe=recipe,
        settings=installed().settings(recipe),
        dataset=DIGITS,
        device=torch.device("cpu"),
        folder=folder,
        build_network=lambda: build_network("cnn-small", DIGITS.info, 0),
        teacher=ready("a random network", network, torch.device("cpu")),
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.transfer_weight=1.5", "method.transfer_weight = 1.5"),
        ("method.space=cosine", "method.space"),
        ("method.teacher_id=xyz", "method.teacher_id"),
        ("method.teacher=", "method.teacher"),
        ('method.teacher="a\\u0000b.safetensors"', "holds control characters"),
        ('method.teacher="a\\u001b[31mb.toml"', "holds control characters"),
        ("method.a=1", "unknown key 'method.a'"),
        ("teacher=x.safetensors", "unknown key 'teacher'; did you mean 'method.teacher'?"),
        ("train.space=probs", "unknown key 'train.space'; did you mean 'method.space'?"),
        (
            "method.alpha=0.3",
            "is transfer_weight; the alpha of certification is certify.smoothing.failure_prob",
        ),
    ],
)
def test_bad_settings_are_explained(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        installed().find_recipe("crt/digits-l2-0.5", [override])
