"""Plugins: found one by one, clashes refused, tasks sent to the owner alone."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from certbench.contract import MethodCard, TeacherSettings
from certbench.data.catalog import DATASETS
from certbench.data.info import DatasetInfo
from certbench.errors import PluginError, RunError, UsageError
from certbench.hookspecs import hookimpl
from certbench.plugins import Plugins, installed
from certbench.recipe import Recipe, Strict, parse_recipe


class Settings(Strict):
    strength: float = 0.5


def card(name: str) -> MethodCard:
    return MethodCard(
        name=name,
        summary="a toy",
        paper="none",
        norm="linf",
        guarantee="real_arith",
        settings=Settings,
        recipes=Path(__file__).parent / "no-recipes",
        certifier="ibp",
    )


class Toy:
    """A plugin object with the given methods; ``train`` answers with its own name."""

    def __init__(self, *names: str) -> None:
        self.names = names

    @hookimpl
    def register_methods(self) -> list[MethodCard]:
        return [card(name) for name in self.names]

    @hookimpl
    def train(self, task: Any) -> Any:
        return self.names


class Mute:
    """A plugin without a train hook."""

    @hookimpl
    def register_methods(self) -> list[MethodCard]:
        return [card("mute")]


class Named(Distribution):
    """A distribution that is only a name."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def metadata(self) -> Any:
        return {"Name": self._name, "Version": "1.0"}

    def read_text(self, filename: str) -> None:
        return None

    def locate_file(self, path: Any) -> Any:
        return path


class Point(EntryPoint):
    """An entry point whose ``load`` gives an object, or raises."""

    def load(self) -> Any:
        loaded = TOYS[self.value]
        if isinstance(loaded, BaseException):
            raise loaded
        return loaded


TOYS: dict[str, Any] = {}


def plugins(**objects: Any) -> Plugins:
    """Plugins from ``name=object``, each in a distribution ``toy-<name>``."""
    points = []
    for name, thing in objects.items():
        TOYS[f"toys_{name}"] = thing
        point = Point(name, f"toys_{name}", "certbench")
        points.append(point._for(Named(f"toy-{name}")))  # type: ignore[attr-defined]  # how importlib.metadata ties the two
    return Plugins(points)


class FakeTask:
    """Just enough of a task to be routed."""

    def __init__(self, method: str) -> None:
        self.recipe = parse_recipe(
            {
                "dataset": "digits",
                "model": "cnn-small",
                "threat": {"radius": "0.1"},
                "method": {"name": method},
                "train": {"epochs": 1},
            },
            "fake",
        )


def test_exactly_the_expected_methods_are_registered() -> None:
    """In each environment of the matrix: the core alone has none, the others have those they name."""
    if "CERTBENCH_EXPECT" not in os.environ:
        pytest.skip("CERTBENCH_EXPECT names the methods of a tox environment; it is not set")
    expected = set(os.environ["CERTBENCH_EXPECT"].split())
    assert set(installed().methods()) == expected
    assert not [p for p in installed().loaded if p.error]


def test_plugins_load_in_sorted_order_and_a_broken_one_does_not_stop_the_others() -> None:
    found = plugins(
        zeta=Toy("z"), broken=ImportError("no module named 'nothing'\nsecond line"), alpha=Toy("a")
    )
    assert [p.name for p in found.loaded] == ["alpha", "broken", "zeta"]
    assert found.loaded[1].error == "ImportError: no module named 'nothing'"
    assert set(found.methods()) == {"a", "z"}
    with pytest.raises(UsageError, match="toy-broken .ImportError: no module named 'nothing'"):
        found.owner("absent")


@pytest.mark.parametrize("error", [SystemExit(3), RuntimeError("boom"), SyntaxError("bad")])
def test_a_plugin_may_raise_anything_on_import(error: BaseException) -> None:
    found = plugins(bad=error, good=Toy("fine"))
    assert set(found.methods()) == {"fine"}
    assert found.loaded[0].error


def test_two_plugins_with_one_name_are_an_error_that_names_both_distributions() -> None:
    with pytest.raises(PluginError, match="'same' is claimed by two distributions, toy-one and toy-two"):
        plugins(one=Toy("same"), two=Toy("same")).methods()


def test_a_plugin_with_a_broken_registration_is_named() -> None:
    class Liar:
        @hookimpl
        def register_methods(self) -> list[str]:
            return ["a string"]

    with pytest.raises(
        PluginError, match="toy-liar: register_methods must return MethodCard objects, not str"
    ):
        plugins(liar=Liar()).methods()


def test_train_goes_only_to_the_owner() -> None:
    found = plugins(a=Toy("first"), b=Toy("second", "third"), c=Mute())
    assert found.train(FakeTask("first")) == ("first",)  # type: ignore[arg-type]
    assert found.train(FakeTask("third")) == ("second", "third")  # type: ignore[arg-type]
    assert not found.has_certifier("third")
    with pytest.raises(Exception, match="toy-c has no train hook for 'mute'"):
        found.train(FakeTask("mute"))  # type: ignore[arg-type]


def test_trace_prints_hook_calls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CERTBENCH_TRACE", "1")
    plugins(a=Toy("first")).train(FakeTask("first"))  # type: ignore[arg-type]
    printed = capsys.readouterr().err
    assert "call train(task)" in printed and "toy-a:a" in printed


def test_method_settings_are_checked_by_the_methods_own_model(tmp_path: Path) -> None:
    found = plugins(a=Toy("first"))
    table = {
        "dataset": "digits",
        "model": "cnn-small",
        "threat": {"radius": "0.1"},
        "train": {"epochs": 1},
    }
    resolved = found.resolve(parse_recipe({**table, "method": {"name": "first"}}, "r"))
    assert resolved.method.settings == {"strength": 0.5}, "defaults are part of the resolved recipe"
    with pytest.raises(UsageError, match="unknown key 'method.strenght'; did you mean 'strength'"):
        found.resolve(parse_recipe({**table, "method": {"name": "first", "strenght": 1}}, "r"))
    path = tmp_path / "r.toml"
    path.write_text(
        'dataset = "digits"\nmodel = "cnn-small"\nthreat.radius = "0.1"\ntrain.epochs = 1\nmethod.name = "first"\n'
    )
    with pytest.raises(UsageError, match="unknown key 'strength'; did you mean 'method.strength'"):
        found.find_recipe(str(path), ["strength=1"])
    with pytest.raises(UsageError, match="unknown method 'frist'; did you mean 'first'"):
        found.resolve(parse_recipe({**table, "method": {"name": "frist"}}, "r"))


class Raising(Toy):
    """Breaks while it trains."""

    @hookimpl
    def train(self, task: Any) -> Any:
        raise ValueError("boom\nsecond line")


class SelfCertifying(Toy):
    """Trains nothing and certifies everything by a method of its own."""

    @hookimpl
    def train(self, task: Any) -> Any:
        return task.build_network()

    @hookimpl
    def certify(self, task: Any) -> Any:
        import numpy as np

        from certbench.contract import Certificates

        count = len(task.split)
        yield Certificates(
            index=np.arange(task.start, task.start + count),
            prediction=task.split.labels.numpy(),
            verdict=np.full(count, "unknown", dtype=object),
            radius=np.zeros(count),
            margin=np.full(count, -1.0),
            proved_by=np.full(count, "", dtype=object),
            passes=np.ones(count, dtype=np.int32),
            guarantee="real_arith",
        )


def digits_recipe(method: str) -> Any:
    return parse_recipe(
        {
            "dataset": "digits",
            "model": "cnn-small",
            "threat": {"radius": "0.1"},
            "method": {"name": method},
            "train": {"epochs": 1},
        },
        f"{method}/digits",
    )


def test_a_plugin_that_raises_in_train_is_one_line_and_what_was_recorded_stays(tmp_path: Path) -> None:
    from certbench.errors import RunError
    from certbench.run import run_recipe

    found = plugins(own=SelfCertifying("own"), bad=Raising("bad"))
    run_recipe(found.resolve(digits_recipe("own")), out=tmp_path, device="cpu", plugins=found, attack=None)
    before = {p: p.read_bytes() for p in (tmp_path / "results").rglob("*.parquet")}
    with pytest.raises(
        RunError, match="plugin toy-bad failed in train: ValueError: boom second line"
    ) as caught:
        run_recipe(found.resolve(digits_recipe("bad")), out=tmp_path, device="cpu", plugins=found)
    assert "\n" not in str(caught.value)
    (report,) = tmp_path.glob("runs/*/error.txt")
    assert str(report) in str(caught.value)
    assert "Traceback" in report.read_text()
    assert {p: p.read_bytes() for p in (tmp_path / "results").rglob("*.parquet")} == before


def test_rows_of_a_plugins_own_certifier_carry_its_name_and_the_cores_do_not(tmp_path: Path) -> None:
    from certbench.results.store import ResultStore
    from certbench.run import run_recipe

    found = plugins(own=SelfCertifying("own"))
    for certifier in (None, "crown-ibp"):
        recipe = digits_recipe("own")
        table = recipe.canonical()
        table["certify"]["certifier"] = certifier
        resolved = found.resolve(type(recipe).model_validate(table))
        run_recipe(resolved, out=tmp_path, device="cpu", plugins=found, attack=None)
    rows = ResultStore(tmp_path / "results").read("certificates").to_pandas()
    assert set(rows["certifier"]) == {"own", "crown-ibp"}
    assert set(rows.loc[rows["certifier"] == "own", "margin"]) == {-1.0}
    assert len(set(rows.loc[rows["certifier"] == "crown-ibp", "margin"])) > 100


class Exiting(Toy):
    """Tries to end the whole process."""

    @hookimpl
    def train(self, task: Any) -> Any:
        raise SystemExit(0)


class Mutating(SelfCertifying):
    """Changes the network it was asked to certify."""

    @hookimpl
    def certify(self, task: Any) -> Any:
        next(task.network.parameters()).data.mul_(0.5)
        yield from super().certify(task)


class Restless(SelfCertifying):
    """Returns another network each time it is asked for the finished one."""

    @hookimpl
    def train(self, task: Any) -> Any:
        import torch

        network = task.build_network()
        Restless.calls += 1
        with torch.no_grad():
            next(network.parameters()).add_(Restless.calls)
        return network

    calls = 0


def test_a_plugin_that_exits_is_a_failed_run_and_not_a_finished_process(tmp_path: Path) -> None:
    from certbench.errors import RunError
    from certbench.run import run_recipe

    found = plugins(out=Exiting("leaving"))
    with pytest.raises(RunError, match="plugin toy-out failed in train: SystemExit"):
        run_recipe(found.resolve(digits_recipe("leaving")), out=tmp_path, device="cpu", plugins=found)


def test_certificates_of_a_certifier_that_changes_the_network_are_not_recorded(tmp_path: Path) -> None:
    from certbench.errors import RunError
    from certbench.run import run_recipe

    found = plugins(mut=Mutating("mutating"))
    with pytest.raises(RunError, match="changed the network it was given"):
        run_recipe(found.resolve(digits_recipe("mutating")), out=tmp_path, device="cpu", plugins=found)
    assert not list(tmp_path.glob("results/certificates/*"))


def test_a_recorded_network_is_never_overwritten_by_another(tmp_path: Path) -> None:
    from certbench.errors import DataError
    from certbench.run import run_recipe

    found = plugins(rest=Restless("restless"))
    recipe = found.resolve(digits_recipe("restless"))
    outcome = run_recipe(recipe, out=tmp_path, device="cpu", plugins=found, attack=None)
    before = (outcome.folder / "network.safetensors").read_bytes()
    with pytest.raises(DataError, match="certificates of checkpoint"):
        run_recipe(recipe, out=tmp_path, device="cpu", plugins=found, attack="standard")
    assert (outcome.folder / "network.safetensors").read_bytes() == before


def test_hook_specifications_hold_no_logic() -> None:
    """The page an author reads first: signatures and docstrings only."""
    import ast

    import certbench.hookspecs

    assert certbench.hookspecs.__file__ is not None
    tree = ast.parse(Path(certbench.hookspecs.__file__).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions
    for function in functions:
        assert len(function.body) == 1 and isinstance(function.body[0], ast.Expr), function.name
        assert ast.get_docstring(function), function.name


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["list", "methods"],
        ["list", "recipes"],
        ["list", "datasets"],
        ["list", "suites"],
        ["list", "attacks"],
        ["audit", "--help"],
        ["list", "plugins"],
    ],
)
def test_help_and_list_import_no_torch(arguments: list[str]) -> None:
    import subprocess

    code = (
        "import sys, certbench.cli as c\n"
        "try: c.main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'sklearn', 'pandas', 'pyarrow', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# Data sets and models


INFO = replace(DATASETS["digits"], name="tiny-random", digest="", reader="random_digits:read")


class Brings:
    """A plugin with a data set and a network."""

    def __init__(self, name: str = "tiny-random") -> None:
        self.name = name

    @hookimpl
    def register_datasets(self) -> list[DatasetInfo]:
        return [replace(INFO, name=self.name)]

    @hookimpl
    def register_models(self) -> dict[str, Any]:
        return {self.name: lambda info: None}


def test_data_sets_and_models_of_plugins_join_the_cores() -> None:
    found = plugins(more=Brings())
    assert found.dataset("tiny-random").reader == "random_digits:read"
    assert found.dataset("tiny-random-validation").whole == INFO
    assert set(found.datasets()) == {*DATASETS, "tiny-random"}
    assert set(found.models()) > {"cnn7", "tiny-random"}
    assert "tiny-random" not in DATASETS
    with pytest.raises(UsageError, match="did you mean 'tiny-random'"):
        found.dataset("tiny-randm")


class Checks(Strict):
    radius_seen: bool = False

    def check_recipe(self, recipe: Recipe) -> None:
        raise ValueError("boom")


def test_a_check_of_a_plugins_settings_that_fails_is_one_line() -> None:
    card = MethodCard("checks", "s", "p", "linf", "real_arith", Checks, certifier="ibp")

    class Method:
        @hookimpl
        def register_methods(self) -> list[MethodCard]:
            return [card]

    found = plugins(checks=Method())
    recipe = smoothed_recipe(0.5).canonical() | {"method": {"name": "checks"}}
    resolved = found.resolve(parse_recipe({**recipe, "threat": {"radius": "0.1"}}, "mine"))
    with pytest.raises(PluginError, match="toy-checks: check_recipe of checks failed: ValueError: boom"):
        found._checked(resolved)


def test_a_teacher_may_have_learnt_a_plugins_data_or_classes_without_names() -> None:
    from certbench.data.dataset import Dataset, Split
    from certbench.training.teacher import NetworkCard, check_teacher

    found = plugins(more=Brings())
    student = smoothed_recipe(sigma=0.5)
    settings = TeacherSettings(teacher="teacher")
    for info in (found.dataset("tiny-random"), DATASETS["imagenet"]):
        nothing = Split(torch.zeros(0, *info.shape, dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
        dataset = Dataset(info, nothing, nothing, "0" * 64)
        card = NetworkCard.of(student.model_copy(update={"dataset": info.name}), dataset)
        check_teacher(card, student, dataset, settings, found)
        for change, words in (({"sigma": 0.25}, "noise level"), ({"class_names": ("a",)}, "class")):
            other = card.model_copy(update=change)
            with pytest.raises(UsageError, match=f"has another .*{words}"):
                check_teacher(other, student, dataset, settings, found)
            check_teacher(
                other, student, dataset, TeacherSettings(teacher="teacher", force_teacher=True), found
            )


def smoothed_recipe(sigma: float) -> Recipe:
    return parse_recipe(
        {
            "dataset": "digits",
            "model": "cnn-small",
            "threat": {"norm": "l2", "sigma": sigma},
            "method": {"name": "student"},
            "train": {"epochs": 1},
        },
        "student",
    )


@pytest.mark.parametrize("name", ["same", "mnist"])
def test_a_data_set_that_is_claimed_twice_is_refused(name: str) -> None:
    owner = "certbench" if name == "mnist" else "toy-one"
    with pytest.raises(
        PluginError, match=f"data set '{name}' is claimed by two distributions, {owner} and toy-"
    ):
        plugins(one=Brings(name), two=Brings(name)).datasets()


def test_a_model_that_is_claimed_twice_is_refused() -> None:
    with pytest.raises(
        PluginError, match="model 'cnn7' is claimed by two distributions, certbench and toy-one"
    ):
        plugins(one=Brings("cnn7")).models()


def test_what_registers_something_else_is_named() -> None:
    class Liar:
        @hookimpl
        def register_datasets(self) -> list[str]:
            return ["cifar10"]

        @hookimpl
        def register_models(self) -> dict[str, Any]:
            raise ImportError("no module named 'nothing'")

    found = plugins(liar=Liar())
    with pytest.raises(
        PluginError, match="toy-liar: register_datasets must return DatasetInfo objects, not str"
    ):
        found.datasets()
    with pytest.raises(PluginError, match="toy-liar failed in register_models: ImportError"):
        found.models()


def test_a_plugins_data_set_and_network_train_and_a_bound_that_does_not_apply_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    from certbench.run import run_recipe

    (tmp_path / "random_digits.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)
    trained = []

    class Author(Brings):
        @hookimpl
        def register_methods(self) -> list[MethodCard]:
            return [card("toy")]

        @hookimpl
        def register_models(self) -> dict[str, Any]:
            def plain(info: DatasetInfo) -> nn.Module:
                return nn.Sequential(nn.Flatten(), nn.Linear(64, info.classes))

            def attentive(info: DatasetInfo) -> nn.Module:
                return nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, info.classes))

            return {"plain": plain, "attentive": attentive}

        @hookimpl
        def train(self, task: Any) -> nn.Module:
            trained.append(task.dataset.info.name)
            network: nn.Module = task.build_network()
            return network

    found = plugins(author=Author())
    recipe = parse_recipe(
        {
            "dataset": "tiny-random",
            "model": "attentive",
            "threat": {"radius": "0.1"},
            "method": {"name": "toy"},
            "train": {"epochs": 1},
        },
        "r",
    )
    with pytest.raises(UsageError, match=r"certifier ibp does not apply to model attentive: node layer_norm"):
        run_recipe(found.resolve(recipe), out=tmp_path, device="cpu", plugins=found)
    assert trained == []
    plain = found.resolve(recipe.model_copy(update={"model": "plain"}))
    outcome = run_recipe(plain, out=tmp_path, device="cpu", attack=None, plugins=found)
    assert trained == ["tiny-random"]
    (outcome.folder / "structure.txt").write_text("0" * 16)
    for rows in (tmp_path / "results").rglob("*.parquet"):
        rows.unlink()
    with pytest.raises(RunError, match="model plain is built otherwise than when run"):
        run_recipe(plain, out=tmp_path, device="cpu", attack=None, plugins=found)
    assert trained == ["tiny-random"]


READER = """
import numpy as np


def read(info, root):
    random = np.random.default_rng(0)

    def part(size):
        return random.integers(0, 17, (size, *info.shape), dtype=np.uint8), random.integers(0, 10, size)

    return part(info.train_size), part(info.test_size)
"""
