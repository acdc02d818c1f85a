"""The audit of one certifier's certificates: which balls are attacked, and what is said of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from certbench.audit.ball import ball, contains, contains_exactly, distance
from certbench.audit.deployment import DeployedNetwork, NotDeployableError
from certbench.audit.judges import DeployedJudge, RealJudge
from certbench.audit.registry import CHUNK, Attack
from certbench.audit.search import Found, hunt
from certbench.contract import Guarantee, Outcome
from certbench.data.dataset import Split, to_pixels
from certbench.errors import RunError
from certbench.seeding import derive_seed
from certbench.threat import round_down


@dataclass(frozen=True)
class AuditTask:
    """Certificates of one network, one array entry each, and how to attack them.

    ``network`` is the one that is deployed. ``split`` holds all images that ``index`` points into. ``radius`` is
    what is claimed for each image, NaN or 0 where nothing is; ``recipe_radius`` what was asked of all. ``begin`` is
    told the number of balls, ``progress`` how many are done.
    """

    network: nn.Module
    split: Split
    levels: int
    index: np.ndarray
    prediction: np.ndarray
    verdict: np.ndarray
    radius: np.ndarray
    guarantee: Guarantee
    deploy: str
    recipe_radius: Fraction
    attack: Attack
    seed: int
    device: torch.device
    begin: Callable[[int], None] = lambda balls: None
    progress: Callable[[int], None] = lambda done: None


@dataclass(frozen=True)
class Audit:
    """``columns`` of the audits table, rows sorted by index and kind; ``limit`` says why nothing could be confirmed
    at the level of the guarantee, and is empty where that was possible."""

    columns: Mapping[str, np.ndarray]
    limit: str

    def count(self, outcome: Outcome) -> int:
        """Images with this outcome in any of their balls."""
        return len(np.unique(self.columns["index"][self.columns["outcome"] == outcome]))


def audit(task: AuditTask) -> Audit:
    """Attack every correct image at the recipe's radius, and every image at the radius that is claimed for it.

    Raises:
        RunError: an image outside [0, 1], a label or a radius that cannot be, a network with a wrong output, or a
            guarantee that this audit cannot judge.
    """
    if task.guarantee == "statistical":
        raise RunError(
            "statistical certificates err with probability alpha by definition; they need another audit"
        )
    rows = _rows(task)
    balls, place = np.unique(rows.balls, return_inverse=True)
    found, far = np.full(len(balls), NOT_ATTACKED), np.full(len(balls), np.nan)
    shape = tuple(task.split.images.shape[1:])
    try:
        network = DeployedNetwork(task.network, task.deploy, task.device, shape)
    except NotDeployableError as error:
        limit = str(error)
    else:
        judge = DeployedJudge(network) if task.guarantee == "float_sound" else RealJudge(task.network, shape)
        limit = judge.limit
        for part, level, away in _attack(task, network, judge, balls):
            found[part], far[part] = level, away
    found, far = found[place], far[place]
    seen = (found == Found.FLIP) | (found == Found.WITNESS)
    columns = {
        "index": rows.balls["index"],
        "kind": rows.kind,
        "ball_radius": rows.balls["radius"],
        "found": seen,
        "distance": np.where(seen, far, np.nan),
        "outcome": np.where(rows.certified, _names(found, CERTIFIED), _names(found, UNCERTIFIED)),
    }
    return Audit(columns, limit)


NOT_ATTACKED = -1
CERTIFIED: dict[int, Outcome] = {
    NOT_ATTACKED: "not_attacked",
    Found.NOTHING: "held",
    Found.FLIP: "refuted_in_float",
    Found.WITNESS: "refuted",
    Found.BROKEN: "error",
}
UNCERTIFIED: dict[int, Outcome] = CERTIFIED | {Found.FLIP: "falsified_in_float", Found.WITNESS: "falsified"}


def _names(found: np.ndarray, names: Mapping[int, Outcome]) -> np.ndarray:
    return np.array([names[level] for level in found.tolist()], dtype=object)


@dataclass(frozen=True)
class _Rows:
    """One entry per image and kind, sorted: the ball, and whether a certificate stands against a witness in it.

    ``balls`` is structured: ``index`` and ``radius``.
    """

    balls: np.ndarray
    kind: np.ndarray
    certified: np.ndarray


def _rows(task: AuditTask) -> _Rows:
    labels = task.split.labels.numpy(force=True)
    if len(task.index) and not (task.index.min() >= 0 and task.index.max() < len(labels)):
        raise RunError(
            f"images {task.index.min()} to {task.index.max()} are not all in a split of {len(labels)}"
        )
    correct = task.prediction == labels[task.index]
    claimed = np.nan_to_num(task.radius, nan=0.0) > 0
    if bool((claimed & ~correct).any()):
        raise RunError(
            f"image {task.index[claimed & ~correct][0]} is misclassified, yet has a certified radius"
        )
    balls = np.zeros(len(task.index), dtype=[("index", "i8"), ("radius", "f8")])
    balls["index"], balls["radius"] = task.index, round_down(task.recipe_radius)
    own = balls[claimed]
    own["radius"] = task.radius[claimed]
    asked = int(correct.sum())
    every = np.concatenate([balls[correct], own])
    kind = np.array(["recipe_radius"] * asked + ["certified_radius"] * len(own), dtype=object)
    certified = np.concatenate([task.verdict[correct] == "certified", np.ones(len(own), dtype=bool)])
    order = np.lexsort((kind.astype(str), every["index"]))
    return _Rows(every[order], kind[order], certified[order])


# Chunks ------------------------------------------------------------------------------------------------------------


def _attack(
    task: AuditTask, network: nn.Module, judge: RealJudge | DeployedJudge, balls: np.ndarray
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """What was found in each ball and how far from the centre, in chunks of fixed size."""

    def work(start: int) -> tuple[slice, np.ndarray, np.ndarray]:
        part = slice(start, start + CHUNK)
        return part, *_attack_chunk(task, network, judge, balls[part], start // CHUNK)

    task.begin(len(balls))
    with _one_thread_each(task.device) as workers:
        for part, found, far in workers.map(work, range(0, len(balls), CHUNK)):
            yield part, found, far
            task.progress(min(part.stop, len(balls)))


def _attack_chunk(
    task: AuditTask, network: nn.Module, judge: RealJudge | DeployedJudge, balls: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray]:
    where = torch.from_numpy(balls["index"].copy()).to(task.split.labels.device)
    images = to_pixels(task.split.images[where], task.levels).to(task.device)
    labels = task.split.labels[where].to(task.device)
    radius = torch.from_numpy(balls["radius"].copy()).to(task.device)

    def draw(phase: int, restart: int) -> Tensor:
        seed = derive_seed(task.seed, "audit", task.attack.name, number, phase, restart)
        return torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))

    state = hunt(network, ball(images, radius), labels, task.attack, judge, draw)
    inside = contains(images, radius, state.witness)
    claims = dict(zip(task.index.tolist(), task.radius.tolist(), strict=True))
    for place in (state.found == Found.WITNESS).nonzero().squeeze(1).tolist():
        exact = Fraction(float(balls["radius"][place]))
        if (
            claims[int(balls["index"][place])] >= exact
        ):  # it would void a row: checked once more, by other means
            inside[place] &= contains_exactly(images[place].cpu(), exact, state.witness[place].cpu())
    if not inside.all():
        image = balls["index"][int((~inside).nonzero()[0])]
        raise RunError(
            f"the attack left the ball of image {image}; that is a fault of the attack, please report it"
        )
    return state.found.numpy(force=True), distance(images, state.witness).numpy(force=True)


@contextmanager
def _one_thread_each(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Workers that run one chunk each on a single thread: the number of threads per operation would change bits."""
    cores = torch.get_num_threads()

    def single() -> None:
        torch.set_num_threads(1)

    single()
    try:
        with ThreadPoolExecutor(cores if device.type == "cpu" else 1, initializer=single) as workers:
            yield workers
    finally:
        torch.set_num_threads(cores)
