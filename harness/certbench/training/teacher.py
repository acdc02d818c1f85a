"""Networks to learn from: the card beside a network's file, reading such a file, and whether it suits a student."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from certbench.contract import Teacher, TeacherSettings
from certbench.data.dataset import Dataset
from certbench.errors import UsageError
from certbench.models import build_network
from certbench.plugins import Plugins
from certbench.recipe import Recipe, Strict, changed_name, explain, split_name
from certbench.training.checkpoint import network_digest


class NetworkCard(Strict):
    """What the file of a network does not say: kept beside it as JSON, under the same name."""

    model: str
    dataset: str
    dataset_digest: str
    class_names: tuple[str, ...]
    sigma: float | None = None
    """The noise it was trained for, in raw pixel units; none for L-inf."""

    @classmethod
    def of(cls, recipe: Recipe, dataset: Dataset) -> NetworkCard:
        return cls(
            model=recipe.model,
            dataset=recipe.dataset,
            dataset_digest=dataset.digest,
            class_names=dataset.info.class_names,
            sigma=recipe.threat.sigma,
        )


@dataclass(frozen=True)
class NetworkFile:
    """A network's file as it was read; ``id`` is its SHA-256."""

    path: Path
    id: str
    card: NetworkCard
    content: bytes = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> NetworkFile:
        """
        Raises:
            UsageError: the file or its card is missing, is no regular file (reading a pipe may never end), or cannot be
                read.
        """
        card = path.with_suffix(".json")
        try:
            for each in (path, card):
                if not stat.S_ISREG(each.stat().st_mode):
                    raise UsageError(f"teacher {path}: {each} is not a regular file")
            known = NetworkCard.model_validate_json(card.read_text(encoding="utf-8"))
            content = path.read_bytes()
            return cls(path, hashlib.sha256(content).hexdigest(), known, content)
        except FileNotFoundError as error:
            hint = "" if path.is_file() else "; a teacher may also be the name of a recipe"
            raise UsageError(f"teacher {path}: there is no {error.filename}{hint}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"teacher {path} cannot be read: {error}") from None
        except ValidationError as error:
            raise UsageError(explain(error, NetworkCard, str(card))) from None

    def network(self, plugins: Plugins) -> nn.Module:
        """
        Raises:
            UsageError: the weights are not those of the model that the card names.
        """
        network = build_network(self.card.model, plugins.dataset(self.card.dataset), 0, plugins.models())
        try:
            network.load_state_dict(load(self.content))
        except (SafetensorError, RuntimeError) as error:
            line = str(error).split("\n")[0]
            raise UsageError(f"teacher {self.path} holds no weights of {self.card.model!r}: {line}") from None
        return network


def ready(name: str, network: nn.Module, device: torch.device) -> Teacher:
    """The network as a student gets it."""
    network = network.to(device).eval().requires_grad_(False)
    return Teacher(name, network, network_digest(network))


def check_teacher(
    card: NetworkCard, student: Recipe, dataset: Dataset, settings: TeacherSettings, plugins: Plugins
) -> None:
    """Refuse a teacher whose answers mean something else than the student's.

    Raises:
        UsageError: images of another shape or another number of classes; or, unless it is forced, another noise level,
            other training data or another class order.
    """
    info, taught = dataset.info, plugins.dataset(card.dataset)
    where = f"{student.name}: teacher {settings.teacher}"
    if taught.shape != info.shape or taught.classes != info.classes:
        raise UsageError(
            f"{where} takes images {taught.shape} of {taught.classes} classes, the student {info.shape} of {info.classes}"
        )
    for what, its, own in _differences(card, student, dataset):
        if its != own and not settings.force_teacher:
            raise UsageError(
                f"{where} has another {what}: {its}, the student {own}; method.force_teacher = true takes it all the same"
            )


def _differences(
    card: NetworkCard, student: Recipe, dataset: Dataset
) -> Iterator[tuple[str, object, object]]:
    """What is compared: its name, the teacher's, the student's."""
    info = dataset.info
    yield "noise level", card.sigma, student.threat.sigma
    yield (
        "number of class names",
        len(card.class_names),
        len(info.class_names),
    )  # none where classes have no names
    pairs = zip(card.class_names, info.class_names, strict=False)
    yield from ((f"class {number}", its, own) for number, (its, own) in enumerate(pairs))
    its_data = f"{card.dataset} ({card.dataset_digest[:16]})"
    yield "training set", its_data, f"{info.name} ({dataset.digest[:16]})"


def is_file(teacher: str) -> bool:
    """Whether a teacher is a network's file, and no recipe."""
    return Path(teacher).suffix.lower() == ".safetensors"


def find_teacher(student: Recipe, plugins: Plugins) -> Recipe | NetworkFile:
    """The teacher that a student's recipe names, as yet untrained.

    Raises:
        UsageError: there is no such recipe or file, or the teachers' recipes name each other in a circle.
    """
    first = plugins.settings(student).teacher
    if is_file(first):
        return NetworkFile.read(Path(first))
    recipe, chain = plugins.find_recipe(first), [first]
    settings = plugins.settings(recipe)
    while isinstance(settings, TeacherSettings) and not is_file(settings.teacher):
        if settings.teacher in chain:
            raise UsageError(
                f"{student.name}: teachers in a circle: {' <- '.join([*chain, settings.teacher])}"
            )
        chain.append(settings.teacher)
        settings = plugins.settings(plugins.find_recipe(settings.teacher))
    return recipe


def _renamed(name: str, teacher: str) -> str:
    """A recipe's name in which no override names another teacher, or this one by its folder."""
    base, changes = split_name(name)
    ours = [k for k, change in enumerate(changes) if change.startswith("method.teacher=")]
    if ours:
        changes[ours[-1]] = f"method.teacher={teacher}"
    return changed_name(base, [change for k, change in enumerate(changes) if k not in ours[:-1]])


def pinned(student: Recipe, identity: str, settings: TeacherSettings) -> Recipe:
    """The recipe with its teacher's identity in it; of a teacher's file only the name stays, wherever it lies.

    Raises:
        UsageError: it names another one already.
    """
    if settings.teacher_id not in (None, identity):
        raise UsageError(
            f"{student.name}: teacher {settings.teacher} is {identity}, not the {settings.teacher_id} that "
            "method.teacher_id asks for"
        )
    content = student.canonical()
    content["method"] |= {"teacher_id": identity}
    teacher = settings.teacher
    if is_file(teacher) or Path(teacher).suffix == ".toml":
        teacher = Path(teacher).name
    content["method"] |= {"teacher": teacher}
    content["name"] = _renamed(student.name.replace(settings.teacher, teacher), teacher)
    return Recipe.model_validate(content)
