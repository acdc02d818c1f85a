"""Export: the ONNX file computes what the network computes, and a property says neither more nor less than a row."""

from __future__ import annotations

import copy
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import certbench
from certbench.cli import main
from certbench.cli.export import parse_indices
from certbench.contract import MethodCard, TrainTask
from certbench.data.catalog import DATASETS
from certbench.data.dataset import Split, to_pixels
from certbench.data.files import load_dataset
from certbench.errors import RunError, UsageError
from certbench.export import check_target, choose_images, onnx_bytes, property_text, write_benchmark
from certbench.export.files import write_folder
from certbench.hookspecs import hookimpl
from certbench.models import build_network
from certbench.models.cnn import head
from certbench.models.fold import deployed_network
from certbench.models.residual import basic_block, grouped_block, stem
from certbench.plugins import Plugins
from certbench.recipe import Recipe, Strict, Threat, parse_recipe
from certbench.recorded import load_run
from certbench.run import run_recipe
from certbench.training import Step, fit

DIGITS, CIFAR = DATASETS["digits"], DATASETS["cifar10"]
RADIUS = Fraction(1, 10)
THREAT = Threat(radius=RADIUS)


@pytest.fixture
def tools() -> dict[str, Any]:
    """onnx and onnxruntime, which only the extra ``export`` brings."""
    names = ("onnx", "onnxscript", "onnxruntime")
    return {
        n: pytest.importorskip(n, reason=f"{n} is not installed: pip install certbench[export]")
        for n in names
    }


# Networks ----------------------------------------------------------------------------------------------------------


def residual() -> nn.Module:
    """A narrow residual network with a shortcut of each kind and a grouped convolution."""
    return nn.Sequential(
        *stem(1, 8),
        basic_block(8, 8, 1),
        basic_block(8, 16, 2),
        grouped_block(16, 16, 2),
        *head(32 * 4, 20, 10),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "cnn-small": (lambda: build_network("cnn-small", DIGITS, 0), DIGITS.shape),
    "residual": (residual, DIGITS.shape),
    "normalised": (lambda: build_network("cnn-small", CIFAR, 0), CIFAR.shape),
}


def lived_in(network: nn.Module) -> nn.Module:
    """Batch norms as after training, some scales negative, so that forgetting any of their tensors shows."""
    generator = torch.Generator().manual_seed(1)

    def draw(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator)

    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(draw(module.running_mean) - 0.5)
            module.running_var.copy_(draw(module.running_var) + 0.5)
            module.weight.data.copy_(2 * draw(module.weight) - 0.5)
            module.bias.data.copy_(draw(module.bias) - 0.5)
    return network


def session(tools: dict[str, Any], content: bytes) -> Any:
    options = tools["onnxruntime"].SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return tools["onnxruntime"].InferenceSession(content, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_onnxruntime_computes_what_torch_computes(name: str, tools: dict[str, Any]) -> None:
    build, shape = NETWORKS[name]
    network = lived_in(build()).train()
    before = copy.deepcopy(network.state_dict())
    images = torch.rand(7, *shape, generator=torch.Generator().manual_seed(2))
    run = session(tools, onnx_bytes(network, images[:2]))
    assert network.training, "export must leave the network as it was"
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    (given,), (made,) = run.get_inputs(), run.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("X", "tensor(float)", list(shape))
    assert (made.name, made.type, made.shape[1:]) == ("Y", "tensor(float)", [10])
    network.eval()
    for batch in (1, 2, 7):
        with torch.no_grad():
            expected = network(images[:batch]).numpy()
        (found,) = run.run(["Y"], {"X": images[:batch].numpy()})
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_network_without_batch_norm_keeps_every_bit_of_its_weights(tools: dict[str, Any]) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    model = tools["onnx"].load_from_string(onnx_bytes(network, torch.rand(1, 1, 8, 8)))
    stored = {t.name: tools["onnx"].numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, tensor in network.state_dict().items():
        assert np.array_equal(stored[name], tensor.numpy()), name


def test_the_file_is_the_same_every_time_and_names_no_folder_of_this_machine(tools: dict[str, Any]) -> None:
    network, images = lived_in(residual()), torch.rand(2, *DIGITS.shape)
    content = onnx_bytes(network, images, {"certbench.run": "0123456789abcdef"})
    assert content == onnx_bytes(copy.deepcopy(network), images, {"certbench.run": "0123456789abcdef"})
    assert b"0123456789abcdef" in content
    places = {str(Path(p).parent) for p in (certbench.__file__, torch.__file__, __file__)}
    assert not [p for p in places if p.encode() in content]
    assert b"stack_trace" not in content and b'File "' not in content


class TwoFaced(nn.Module):
    """Computes something else while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return 1.1 * x if torch.compiler.is_exporting() else x


class Branching(nn.Module):
    """Its path depends on the values, which no static graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def with_weight(value: float) -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    network[1].weight.data[0, 0] = value
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (TwoFaced(), "does not compute what torch computes"),
        (Branching(), "cannot export this network"),
        (with_weight(float("nan")), "weight 1.weight holds NaN or infinity"),
        (with_weight(1.0).double(), "weight 1.weight holds torch.float64"),
    ],
    ids=["different", "branching", "nan", "float64"],
)
def test_a_network_that_cannot_be_exported_faithfully_is_refused_in_one_line(
    network: nn.Module, message: str, tools: dict[str, Any]
) -> None:
    with pytest.raises(RunError, match=message) as caught:
        onnx_bytes(network, torch.rand(2, 1, 8, 8))
    assert "\n" not in str(caught.value)


# Properties --------------------------------------------------------------------------------------------------------


class Property(NamedTuple):
    """A property read back: number of variables, bounds by input, and the disjuncts, each a list of (op, a, b)."""

    inputs: int
    outputs: int
    lower: dict[int, str]
    upper: dict[int, str]
    cases: list[list[tuple[str, str, str]]]

    def violated_by(self, logits: list[Any]) -> bool:
        assert len(logits) == self.outputs
        value = {f"Y_{j}": y for j, y in enumerate(logits)}
        order = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b}
        return any(all(order[op](value[a], value[b]) for op, a, b in case) for case in self.cases)


def expressions(text: str) -> list[Any]:
    """All s-expressions of a text without its comments, as nested lists of strings."""
    words = iter(re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text)))

    def listed(words: Iterator[str], top: bool = False) -> list[Any]:
        found: list[Any] = []
        for word in words:
            if word == ")":
                assert not top, "a parenthesis too many"
                return found
            found.append(listed(words) if word == "(" else word)
        assert top, "a parenthesis too few"
        return found

    return listed(words, top=True)


def read_back(text: str) -> Property:
    declared: list[str] = []
    bounds: dict[str, dict[int, str]] = {">=": {}, "<=": {}}
    cases: list[list[tuple[str, str, str]]] = []
    for keyword, *rest in expressions(text):
        if keyword == "declare-const":
            name, kind = rest
            assert kind == "Real"
            declared.append(name)
            continue
        assert keyword == "assert"
        ((operator, *terms),) = rest
        if operator == "or":
            assert not cases, "one disjunction"
            for conjunction, *parts in terms:
                assert conjunction == "and"
                cases.append([tuple(part) for part in parts])
            continue
        variable, bound = terms
        index = int(variable.removeprefix("X_"))
        assert index not in bounds[operator], "one bound each"
        bounds[operator][index] = bound
    inputs = sum(name.startswith("X_") for name in declared)
    names = [f"X_{i}" for i in range(inputs)] + [f"Y_{j}" for j in range(len(declared) - inputs)]
    assert declared == names
    return Property(inputs, len(declared) - inputs, bounds[">="], bounds["<="], cases)


def awkward_image() -> Tensor:
    """Both ends of the range and their neighbours, published pixels, tiny numbers, random ones; shape (1, 20, 20)."""
    published = (np.arange(256, dtype=np.float32) / np.float32(255)).tolist()
    ends = [0.0, 1.0, float(np.nextafter(np.float32(1), np.float32(0))), 2.0**-149, 2.0**-126, 1e-9]
    own = random.Random(3)
    others = [own.random() * 10.0 ** -own.randrange(8) for _ in range(400 - len(published) - len(ends))]
    return torch.tensor(published + ends + others, dtype=torch.float32).view(1, 20, 20)


@pytest.mark.parametrize(
    "radius", ["8/255", "1/255", "0.1", "1/3", "1/1000000007", "0.00000000000000000001", "1"]
)
def test_the_box_contains_the_exact_ball_and_hardly_more(radius: str) -> None:
    image, eps = awkward_image(), Fraction(radius)
    found = read_back(property_text(image, 3, 10, eps))
    assert found.inputs == image.numel() == len(found.lower) == len(found.upper)
    assert found.outputs == 10
    for i, pixel in enumerate(image.flatten().tolist()):
        low, high = max(Fraction(pixel) - eps, Fraction(0)), min(Fraction(pixel) + eps, Fraction(1))
        for read in (Fraction, lambda text: Fraction(float(text))):  # exactly, and as float64
            assert 0 <= read(found.lower[i]) <= low <= high <= read(found.upper[i]) <= 1, (pixel, radius)
        slack = Fraction(1, 2**52)
        assert low - Fraction(found.lower[i]) <= slack and Fraction(found.upper[i]) - high <= slack


def test_bounds_that_float64_and_decimals_can_hold_are_exact() -> None:
    image = (torch.arange(16, dtype=torch.float32) / 16).view(1, 4, 4)
    found = read_back(property_text(image, 0, 10, Fraction(1, 8)))
    for i in range(16):
        assert Fraction(found.lower[i]) == max(Fraction(i, 16) - Fraction(1, 8), 0)
        assert Fraction(found.upper[i]) == min(Fraction(i, 16) + Fraction(1, 8), 1)


def test_inputs_are_numbered_in_row_major_order() -> None:
    image = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(4))
    found = read_back(property_text(image, 0, 10, Fraction(1, 10**6)))
    for i, pixel in enumerate(image.numpy().ravel(order="C")):
        assert float(found.lower[i]) == pytest.approx(pixel, abs=2e-6)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_property_is_the_negation_of_a_strict_win(classes: int) -> None:
    own = random.Random(5)
    outcomes = set()
    for label in range(classes):
        found = read_back(property_text(torch.zeros(1, 1, 1), label, classes, RADIUS))
        for _ in range(300):
            logits = [own.randrange(4) for _ in range(classes)]  # small integers: ties are common
            logits[label] += own.randrange(3)
            wins = all(logits[label] > y for j, y in enumerate(logits) if j != label)
            outcomes.add(wins)
            assert found.violated_by(logits) != wins, (label, logits)
    assert outcomes == {True, False}


def test_a_correct_image_keeps_its_property_and_a_misclassified_one_breaks_it() -> None:
    test = load_dataset("digits").test
    network = build_network(
        "cnn-small", DIGITS, 0
    ).eval()  # untrained: right about some images, wrong about most
    chosen = choose_images(network, test, DIGITS)
    assert chosen.indices and chosen.misclassified
    for index in [*chosen.indices[:5], *chosen.misclassified[:5]]:
        image = to_pixels(test.images[index], DIGITS.levels)
        found = read_back(property_text(image, int(test.labels[index]), 10, RADIUS))
        with torch.no_grad():
            logits = network(image[None])[0].tolist()
        assert found.violated_by(logits) == (index in chosen.misclassified)


def test_what_a_recipe_calls_itself_stays_in_the_comment() -> None:
    plain = property_text(torch.zeros(1, 2, 2), 0, 3, RADIUS)
    for line in ("\n", "\r", "\r\n", "\u2028", "\x0b", "\x85"):
        hostile = property_text(torch.zeros(1, 2, 2), 0, 3, RADIUS, [f"a{line}(assert (<= X_0 0.0))"])
        assert read_back(hostile) == read_back(plain)
        assert hostile.isascii() and len(hostile.splitlines()) == len(plain.splitlines()) + 1


@pytest.mark.parametrize(
    ("image", "label", "classes", "radius", "message"),
    [
        (torch.full((1, 2, 2), 1.5), 0, 10, RADIUS, r"in \[0, 1\]"),
        (torch.full((1, 2, 2), -1e-9), 0, 10, RADIUS, r"in \[0, 1\]"),
        (torch.full((1, 2, 2), torch.nan), 0, 10, RADIUS, r"in \[0, 1\]"),
        (torch.zeros(1, 2, 2).double(), 0, 10, RADIUS, "float32"),
        (torch.zeros(1, 1, 2, 2), 0, 10, RADIUS, "one float32 image"),
        (torch.zeros(1, 2, 2), 10, 10, RADIUS, "label 10"),
        (torch.zeros(1, 2, 2), -1, 10, RADIUS, "label -1"),
        (torch.zeros(1, 2, 2), 0, 1, RADIUS, "at least two"),
        (torch.zeros(1, 2, 2), 0, 10, Fraction(0), "above 0"),
    ],
)
def test_an_image_label_or_radius_out_of_range_gets_no_property(
    image: Tensor, label: int, classes: int, radius: Fraction, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        property_text(image, label, classes, radius)


# Which images ------------------------------------------------------------------------------------------------------


class FirstPixels(nn.Module):
    """Logits: the first two pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2]


def pairs(*pixels: tuple[int, int]) -> Split:
    """Images whose first two pixels are given, all of class 0."""
    images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 2)
    return Split(images, torch.zeros(len(pixels), dtype=torch.int64))


def test_only_strictly_correct_images_are_chosen_and_no_more_than_asked() -> None:
    split = pairs((9, 3), (4, 4), (1, 8), (5, 2), (7, 0))
    chosen = choose_images(FirstPixels(), split, DIGITS)
    assert (chosen.indices, chosen.misclassified) == ((0, 3, 4), (1, 2))
    assert choose_images(FirstPixels(), split, DIGITS, limit=2).indices == (0, 3)
    assert choose_images(FirstPixels(), split, DIGITS, indices=[4, 2, 0]).indices == (4, 0)
    assert choose_images(FirstPixels(), split, DIGITS, indices=[4, 2, 0], limit=1).indices == (4,)


@pytest.mark.parametrize(
    ("indices", "limit", "message"),
    [
        ([5], None, "image 5 is not in the test set, which has images 0 to 4"),
        ([-1], None, "image -1 is not"),
        ([0, 0], None, "named twice"),
        ([1, 2], None, "none of the 2 images is classified correctly"),
        ([], None, "none of the 0 images"),
        (None, 0, "a limit of 0"),
    ],
)
def test_a_choice_that_leaves_nothing_is_an_error(
    indices: list[int] | None, limit: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_images(FirstPixels(), pairs((9, 3), (4, 4), (1, 8), (5, 2), (7, 0)), DIGITS, indices, limit)


def test_indices_are_numbers_and_rising_ranges() -> None:
    assert parse_indices("7, 0,2-4") == [7, 0, 2, 3, 4]
    assert parse_indices(None) is None
    for text in ("", "a", "3-1", "-1", "1,,2", "1.5", "0-99999999", "../x"):
        with pytest.raises(UsageError, match="--indices"):
            parse_indices(text)


# The folder --------------------------------------------------------------------------------------------------------

FILES = [("onnx/network.onnx", b"net"), ("vnnlib/image-00001.vnnlib", b"one"), ("instances.csv", b"list")]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_holds_one_property_per_image_and_lists_them(tmp_path: Path) -> None:
    test = load_dataset("digits").test
    write_benchmark(tmp_path / "b", b"net", test, DIGITS, THREAT, [3, 41], notes=["a note"], timeout=60)
    found = tree(tmp_path / "b")
    assert found["instances.csv"].decode().splitlines() == [
        "onnx/network.onnx,vnnlib/image-00003.vnnlib,60",
        "onnx/network.onnx,vnnlib/image-00041.vnnlib,60",
    ]
    listed = {name for line in found["instances.csv"].decode().splitlines() for name in line.split(",")[:2]}
    assert set(found) == listed | {"instances.csv"}
    for index in (3, 41):
        image = to_pixels(test.images[index], DIGITS.levels)
        text = found[f"vnnlib/image-{index:05d}.vnnlib"].decode()
        assert text.startswith("; a note\n") and f"Image {index} of the test set of digits" in text
        assert read_back(text) == read_back(property_text(image, int(test.labels[index]), 10, RADIUS))


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "vnnlib/../../x",
        "x",
        "onnx/network.onnx\n",
        "vnnlib/image-1.vnnlib/..",
        "vnnlib/image-١.vnnlib",
    ],
)
def test_no_name_leaves_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no name of an exported file"):
        write_folder(tmp_path / "a" / "b", [*FILES, (name, b"")])
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError()])
@pytest.mark.parametrize("before", [False, True])
def test_a_failure_half_way_leaves_what_was_there(error: BaseException, before: bool, tmp_path: Path) -> None:
    target = tmp_path / "b"
    if before:
        write_folder(target, FILES)

    def failing() -> Iterator[tuple[str, bytes]]:
        yield "instances.csv", b"new"
        raise error

    with pytest.raises((type(error), RunError)):
        write_folder(target, failing(), force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["b"] if before else [])
    assert not before or tree(target) == dict(FILES)


def test_an_export_is_replaced_only_when_asked_and_nothing_else_ever(tmp_path: Path) -> None:
    target = tmp_path / "b"
    target.mkdir()
    write_folder(target, FILES)  # an empty folder is as good as none
    with pytest.raises(UsageError, match="exists; --force replaces it"):
        write_folder(target, [("instances.csv", b"new")])
    assert tree(target) == dict(FILES)
    write_folder(target, [("instances.csv", b"new")], force=True)
    assert tree(target) == {"instances.csv": b"new"}
    (target / "vnnlib").mkdir()
    (target / "vnnlib" / "thesis.tex").write_bytes(b"years")
    with pytest.raises(UsageError, match="holds vnnlib/thesis.tex, which no export wrote"):
        write_folder(target, FILES, force=True)
    assert tree(target)["vnnlib/thesis.tex"] == b"years"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_targets_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path, folder in (
        (tmp_path / "file", True),
        (tmp_path, False),
        (tmp_path / "link", True),
        (Path("/"), True),
    ):
        with pytest.raises(UsageError, match="choose another"):
            check_target(path, force=True, folder=folder)
    with pytest.raises(RunError, match="cannot write"):
        write_folder(tmp_path / "file" / "b", FILES)


# The command -------------------------------------------------------------------------------------------------------


def recipe() -> Recipe:
    table = {
        "dataset": "digits",
        "model": "cnn-small",
        "method": {"name": "plain"},
        "threat": {"radius": str(RADIUS)},
        "train": {"epochs": 1},
    }
    return parse_recipe(table, "../../hostile\n(assert (<= X_0 0.0))")


class Plain:
    """A method that any installation has: cross entropy for one epoch."""

    @hookimpl
    def register_methods(self) -> list[MethodCard]:
        return [MethodCard("plain", "", "", "linf", "real_arith", Strict, "ibp")]

    @hookimpl
    def train(self, task: TrainTask) -> nn.Module:
        return fit(task, self)

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        self.network = network

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        return nn.functional.cross_entropy(self.network(images), labels), {}


class Point(EntryPoint):
    """An entry point that loads the plugin above."""

    def load(self) -> object:
        return Plain()


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str, nn.Module]:
    """A folder with one recorded run, its id, and its deployed network."""
    out, plugins = tmp_path / "out", Plugins([Point("plain", "plain", "certbench")])
    monkeypatch.setattr("certbench.recorded.installed", lambda: plugins)
    outcome = run_recipe(plugins.resolve(recipe()), out=out, device="cpu", plugins=plugins, attack=None)
    network = load_run(outcome.run_id, out, device="cpu", plugins=plugins).network
    return out, outcome.run_id, deployed_network(network)


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["export", *map(str, arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_export_writes_network_and_properties_of_a_recorded_run(
    recorded: tuple[Path, str, nn.Module],
    tools: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    out, run_id, network = recorded
    assert run(run_id[:4], "--out", out, "--limit", "3") == 0
    folder = out / "exports" / run_id
    assert "network and 3 properties" in capsys.readouterr().out
    found = tree(folder)
    test = load_dataset("digits").test
    chosen = choose_images(network, test, DIGITS, limit=3)
    assert sorted(found) == sorted(
        ["instances.csv", "onnx/network.onnx", *(f"vnnlib/image-{i:05d}.vnnlib" for i in chosen.indices)]
    )
    computed = session(tools, found["onnx/network.onnx"])
    for index in chosen.indices:
        image = to_pixels(test.images[index : index + 1], DIGITS.levels)
        written = read_back(found[f"vnnlib/image-{index:05d}.vnnlib"].decode())
        assert written == read_back(property_text(image[0], int(test.labels[index]), 10, RADIUS))
        (logits,) = computed.run(["Y"], {"X": image.numpy()})
        assert not written.violated_by(logits[0].tolist())
    assert {p.name for p in tmp_path.iterdir()} == {"out"}, "a recipe's name must not lead out of the folder"

    assert run(run_id[:4], "--out", out, "--limit", "3") == 2
    assert "--force replaces it" in capsys.readouterr().err
    alone = tmp_path / "alone" / "network.onnx"
    assert (
        run(
            run_id,
            "--out",
            out,
            "--onnx",
            alone,
            "--vnnlib",
            folder,
            "--indices",
            f"{chosen.indices[1]}",
            "--force",
        )
        == 0
    )
    assert alone.read_bytes() == found["onnx/network.onnx"] == tree(folder)["onnx/network.onnx"]
    assert len(tree(folder)) == 3
    assert run(run_id, "--out", out, "--onnx", alone) == 2
    assert "exists; --force" in capsys.readouterr().err


def test_what_cannot_be_exported_is_said_in_one_line(
    recorded: tuple[Path, str, nn.Module],
    tools: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    out, run_id, _ = recorded
    for arguments, message in {
        ("zzzz",): run_id,
        ("../../etc",): run_id,
        (run_id, "--indices", "360"): "images 0 to 359",
        (run_id, "--onnx", "x.onnx", "--limit", "1"): "choose images for --vnnlib",
        (run_id, "--limit", "0"): "--limit",
    }.items():
        assert run(*arguments, "--out", out) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, arguments
    (network,) = (out / "runs" / run_id).glob("epoch-*.safetensors")
    network.write_bytes(network.read_bytes()[:-1] + b"\xff")
    assert run(run_id, "--out", out, "--vnnlib", tmp_path / "b") == 3
    assert "digest" in capsys.readouterr().err and not (tmp_path / "b").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for other in {"onnx", "onnxscript", "onnxruntime"} - {package}:
        monkeypatch.setitem(
            sys.modules, other, sys
        )  # any module will do: they are not used before all are there
    monkeypatch.setitem(sys.modules, package, None)
    assert run("0123", "--out", tmp_path / "nothing") == 2
    error = capsys.readouterr().err
    assert (
        f"package {package}" in error and "pip install certbench[export]" in error and error.count("\n") == 1
    )
    assert not list(tmp_path.iterdir())


def test_properties_need_no_extra() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['onnx', 'onnxscript', 'onnxruntime']))\n"
        "from fractions import Fraction; import torch; from certbench.export import property_text\n"
        "sys.stdout.write(property_text(torch.zeros(1, 1, 1), 0, 2, Fraction(1, 2)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_back(done.stdout).outputs == 2
