"""What passes between the harness and a plugin: the method's card, its tasks, and its certificates.

Nothing here imports torch at run time, so that a plugin's registration costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import AfterValidator, Field

from certbench.recipe import Recipe, Strict

if TYPE_CHECKING:
    import numpy as np
    import torch

    from certbench.data.dataset import Dataset, Split

Guarantee = Literal["real_arith", "float_sound", "statistical"]
Deployment = Literal["float32", "float64", "tf32", "bf16", "fp16"]
Verdict = Literal[
    "certified", "falsified", "unknown", "misclassified", "abstain", "timeout", "error", "not_run"
]
Outcome = Literal[
    "held",
    "falsified",
    "falsified_in_float",
    "refuted",
    "refuted_in_float",
    "not_attacked",
    "error",
]
"""What an audit says of one ball. ``refuted``: a witness at the level of the guarantee, where a certificate stands;
``falsified``: the same where none does; ``..._in_float``: only floating point flips. Else it held, or was not or could
not be attacked."""


@dataclass(frozen=True)
class MethodCard:
    """What a method says of itself; leaderboards and ``certbench list methods`` read it.

    ``settings`` validates the ``[method]`` table; ``recipes`` and ``suites`` are folders of TOML files (see
    :mod:`certbench.suites`), ``published`` one with the figures of papers
    (:class:`certbench.leaderboard.published.PublishedFile`); ``certifier`` names the one of the core's that a recipe
    gets unless it names another. A ``baseline`` is what other methods are compared with; the quickstart leaves it out.

    ``numerics`` is raised whenever a change of the method moves numbers. It, not the distribution's version, enters
    the run id, so an update that changes no number does not force anyone to train again.
    """

    name: str
    summary: str
    paper: str
    norm: str
    guarantee: Guarantee
    settings: type[Strict]
    certifier: str
    recipes: Traversable | None = None
    suites: Traversable | None = None
    baseline: bool = False
    numerics: int = 1
    limits: str = ""
    published: Traversable | None = None


class Reporter(Protocol):
    """Where engines tell how far they are; they never print."""

    def stage(self, title: str, total: int, unit: str) -> None:
        """A stage of ``total`` units begins; it ends when the next begins or the run is over."""

    def advance(self, done: int, **figures: float) -> None:
        """``done`` units of the stage are finished (counted from its start); figures are shown beside it."""

    def epoch_done(self, epoch: int, epochs: int, seconds: float, figures: Mapping[str, float]) -> None:
        """An epoch of training is finished and its checkpoint written."""

    def say(self, line: str) -> None:
        """One line worth keeping."""


class SilentReporter:
    """A reporter for programs and tests."""

    def stage(self, title: str, total: int, unit: str) -> None: ...
    def advance(self, done: int, **figures: float) -> None: ...
    def epoch_done(self, epoch: int, epochs: int, seconds: float, figures: Mapping[str, float]) -> None: ...
    def say(self, line: str) -> None: ...


class Scratch(Protocol):
    """Where a certifier keeps work that is half done, so that an interrupted run goes on from there."""

    def load(self) -> bytes | None:
        """What was saved last for this network and these settings, if anything."""

    def save(self, content: bytes) -> None:
        """Replace what was saved."""


class NoScratch:
    """Keeps nothing: for programs and tests."""

    def load(self) -> bytes | None:
        return None

    def save(self, content: bytes) -> None: ...


@runtime_checkable
class SuitsRecipe(Protocol):
    """Settings that can tell, when a recipe is found and nothing is run yet, whether they suit the rest of it."""

    def check_recipe(self, recipe: Recipe) -> None:
        """
        Raises:
            UsageError: they do not.
        """


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("holds control characters")
    return name


class TeacherSettings(Strict):
    """Base of the ``[method]`` table of a method that learns from a finished network.

    The harness finds that network, trains it where it is missing, and hands it over as the task's ``teacher``.
    """

    teacher: Annotated[str, Field(min_length=1), AfterValidator(_printable)]
    """A recipe, by name or TOML file, with its own seed; or a ``.safetensors`` file with its card beside it."""
    teacher_id: str | None = Field(default=None, pattern=r"^[0-9a-f]{16,64}$")
    """Run id of that recipe, or SHA-256 of that file: filled in by the harness, so that it is part of the student's own
    run id; where a recipe gives it, another teacher is refused."""
    force_teacher: bool = False
    """Take a teacher of another noise level, other training data or another class order all the same."""


@dataclass(frozen=True)
class Teacher:
    """A finished network to learn from: in evaluation mode, without gradients, on the task's device.

    ``digest`` is the SHA-256 of its weights.
    """

    name: str
    network: torch.nn.Module
    digest: str


@dataclass(frozen=True)
class TrainTask:
    """All that ``train`` gets.

    ``settings`` is the method's own validated model. ``build_network`` returns a fresh network on ``device``, its
    first weights a function of recipe and seed alone, with the data set's normalisation inside: it takes raw pixels
    in [0, 1], shape (batch, channels, height, width). ``folder`` holds the run's checkpoints. The recipe's ``[certify]``
    may be a reason to refuse, and must not change the network: runs that differ in it alone share one training. With ``only_load`` the
    finished network is wanted and nothing may be trained. ``teacher`` is there where the settings are
    :class:`TeacherSettings`, unless ``only_load``.
    """

    recipe: Recipe
    settings: Any
    dataset: Dataset
    device: torch.device
    folder: Path
    build_network: Callable[[], torch.nn.Module]
    reporter: Reporter = field(default_factory=SilentReporter)
    only_load: bool = False
    teacher: Teacher | None = None

    @property
    def seed(self) -> int:
        return self.recipe.seed


@dataclass(frozen=True)
class CertifyTask:
    """All that ``certify`` gets: the trained network and the images to decide.

    ``split`` holds uint8 images in published order, pixel = integer / ``levels``; ``start`` is the index of its first
    image in that order, and ``stride`` the distance from each to the next.
    ``radius`` and ``cap`` are exact fractions of the pixel range; norm l2 asks for no radius, and both are 0.
    ``run_id`` keys the random numbers of a statistical certifier. ``reporter`` may be told more than that certificates
    come in, which the harness sees for itself.
    """

    recipe: Recipe
    settings: Any
    network: torch.nn.Module
    split: Split
    levels: int
    start: int
    radius: Fraction
    cap: Fraction
    device: torch.device
    stride: int = 1
    run_id: str = ""
    reporter: Reporter = field(default_factory=SilentReporter)
    scratch: Scratch = field(default_factory=NoScratch)


@dataclass(frozen=True)
class Certificates:
    """Certificates of consecutive images, one array entry each.

    ``radius`` is rounded down and was itself proved; NaN where none is known (``error``, ``timeout``, ``not_run``),
    0 for a misclassified image. ``margin`` is the proved lower bound of (logit of the label) - (any other logit) at
    the recipe's radius. ``verdict`` and ``proved_by`` hold strings; ``proved_by`` is empty where nothing was proved;
    ``ibp; radius crown`` where one bound proved the verdict and another the larger radius. ``columns`` holds further
    columns of the certificates table that its schema lets be null, such as ``draws`` or ``straddling``; every part of a
    run brings the same ones. A ``statistical`` certificate has no margin; its ``prediction`` is the class that was tested
    or certified, -1 where there is none, and its verdict ``certified`` says that some radius above 0 is.
    """

    index: np.ndarray
    prediction: np.ndarray
    verdict: np.ndarray
    radius: np.ndarray
    margin: np.ndarray
    proved_by: np.ndarray
    passes: np.ndarray
    guarantee: Guarantee
    deploy: str = "float32"
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)


TrainHook = Callable[[TrainTask], "torch.nn.Module"]
CertifyHook = Callable[[CertifyTask], Iterable[Certificates]]


@dataclass(frozen=True)
class Certifier:
    """A way to decide images; ``settings`` are what its results depend on, hashed into every row."""

    name: str
    summary: str
    certify: CertifyHook
    settings: Mapping[str, object]
