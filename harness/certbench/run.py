"""One run, from a recipe to rows: load, train, certify, audit, record."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from certbench.audit.certificates import Audit
from certbench.audit.registry import DEFAULT
from certbench.bounds.applicability import Applicability, applicability
from certbench.contract import (
    Certificates,
    Certifier,
    CertifyTask,
    NoScratch,
    Reporter,
    SilentReporter,
    Teacher,
    TeacherSettings,
    TrainTask,
)
from certbench.data.dataset import Dataset, Split
from certbench.data.files import load_dataset
from certbench.errors import CertbenchError, RunError, UsageError
from certbench.models import build_network
from certbench.models.fold import deployed_network
from certbench.plugins import Owned, Plugins, installed
from certbench.recipe import Recipe, run_id
from certbench.results.files import write_atomically
from certbench.results.store import ResultStore, audit_stage, certify_stage
from certbench.seeding import derive_seed
from certbench.stages.audit import AnyAttack, Auditor, can_be_audited, choose_attack
from certbench.stages.certify import (
    CertificateSet,
    ScratchFile,
    certificate_columns,
    certified_share,
    certify_settings,
    choose_certifier,
    complete,
    digest_settings,
)
from certbench.stages.record import RunOutcome, outcome, run_row
from certbench.stages.student import copy_teacher, keep_teacher, teacher_digest
from certbench.stages.timing import KeepsCost, Timer
from certbench.stages.train import (
    CARD,
    NETWORK,
    STRUCTURE,
    adopt,
    copy_checkpoints,
    copy_cost,
    find_trained,
    has_checkpoints,
    training_id,
)
from certbench.training.checkpoint import network_digest, save_network
from certbench.training.teacher import (
    NetworkCard,
    NetworkFile,
    check_teacher,
    find_teacher,
    pinned,
    ready,
)

T = TypeVar("T")


def run_recipe(
    recipe: str | Path | Recipe,
    *,
    out: str | Path = "certbench-out",
    data: str | Path | None = None,
    device: str = "auto",
    seed: int | None = None,
    overrides: Iterable[str] = (),
    attack: str | None = DEFAULT,
    reporter: Reporter | None = None,
    plugins: Plugins | None = None,
) -> RunOutcome:
    """Train, certify, audit and record one recipe; what a former call has finished is not done again.

    Args:
        recipe: a recipe's name, a TOML file, or a resolved recipe.
        out: where checkpoints (``runs/<run id>``) and rows (``results``) go.
        data: the folder of the data sets; by default ``CERTBENCH_DATA``.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: in place of the recipe's.
        overrides: ``key=value`` settings in place of the recipe's.
        attack: what the certificates are audited with; None leaves them unaudited.

    Raises:
        CertbenchError: anything that went wrong, in one line. What was recorded before stays.
    """
    plugins = plugins or installed()
    if not isinstance(recipe, Recipe):
        recipe = plugins.find_recipe(str(recipe), overrides)
    if seed is not None:
        recipe = recipe.with_seed(seed)
    chosen = choose_attack(attack, recipe) if attack is not None else None
    run = Run.prepare(recipe, Path(out), data, choose_device(device), plugins, reporter or SilentReporter())
    return run.execute(chosen)


def choose_device(name: str) -> torch.device:
    """``auto`` takes the GPU where there is one.

    Raises:
        UsageError: CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; `certbench doctor` shows what it sees")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in training and in certificates
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device(name)


@dataclass(frozen=True)
class Run:
    """One recipe with all it needs at hand."""

    recipe: Recipe
    owned: Owned
    plugins: Plugins
    dataset: Dataset
    certifier: Certifier
    device: torch.device
    id: str
    folder: Path
    store: ResultStore
    reporter: Reporter
    teacher: Run | NetworkFile | None = None

    @classmethod
    def prepare(
        cls,
        recipe: Recipe,
        out: Path,
        data: str | Path | None,
        device: torch.device,
        plugins: Plugins,
        reporter: Reporter,
        identity: str | None = None,
    ) -> Run:
        """Check everything that can be checked before any training starts; ``identity`` names a recorded run."""
        owned = plugins.owner(recipe.method.name)
        certifier = choose_certifier(recipe, owned, plugins)
        dataset = load_dataset(plugins.dataset(recipe.dataset), Path(data) if data is not None else None)
        settings, teacher = plugins.settings(recipe), None
        if isinstance(settings, TeacherSettings) and identity is None:
            found = find_teacher(recipe, plugins)
            teacher = (
                found
                if isinstance(found, NetworkFile)
                else cls.prepare(found, out, data, device, plugins, reporter)
            )
            check_teacher(teacher.card, recipe, dataset, settings, plugins)
            recipe = pinned(recipe, teacher.id, settings)
        identity = identity or run_id(recipe, dataset.digest, owned.card.numerics)
        folder = out / "runs" / identity
        make_writable(folder)
        store = ResultStore(out / "results")
        return cls(
            recipe, owned, plugins, dataset, certifier, device, identity, folder, store, reporter, teacher
        )

    def execute(self, attack: AnyAttack | None) -> RunOutcome:
        """Do what is not done yet of training, certifying and auditing.

        Raises:
            CertbenchError: anything that went wrong, in one line.
        """
        self.refuse_submitted()
        certified = self.is_certified
        if certified and self.is_audited(attack):
            self.reporter.say(f"{self.recipe.name}: run {self.id} is already recorded")
            return self.outcome()
        if certified and not self._has_network:
            self.reporter.say(
                f"{self.recipe.name}: run {self.id} is recorded; not audited, its checkpoints are gone"
            )
            return self.outcome()
        self.check_network()
        network = self.train()
        if not certified:
            self.record(self.certify(network))
        if attack is not None:
            self.audit(network, attack)
        return self.outcome()

    def refuse_submitted(self) -> None:
        """Rows that somebody else submitted are not taken for this harness's own, nor mixed with them.

        Raises:
            RunError: the store holds this run as a submission.
        """
        if submitter := self.store.submitter(self.id):
            raise RunError(
                f"{self.recipe.name}: run {self.id} in {self.store.folder} was imported from {submitter!r}; choose "
                "another --out to make it here"
            )

    def record(self, certificates: list[Certificates]) -> None:
        """Write certificates, and beside the network in plain words what their settings digest stands for."""
        columns = certificate_columns(self.certified_split, certificates)
        self.store.write_certificates(*self._certificates, columns)
        stage = certify_stage(*self._certificates[1:])
        write_json(self.folder / f"{stage}.json", certify_settings(self.certifier, self.recipe))
        for partial in self.folder.glob(f"{stage}-*.partial"):
            partial.unlink()

    def train(self) -> nn.Module:
        """The trained network, with its row in ``runs`` and its weights in ``network.safetensors``.

        Where another run of the store differs in ``[certify]`` alone, its network is taken, and what that one cost.
        """
        network = self._finished_student()
        if network is None:
            network = self._taken()
        if network is None:
            teacher = self._ready_teacher()  # its training is not the student's, and has a timing of its own
            timer = self._timer("train", goes_on=has_checkpoints(self.folder))
            is_new = not self.store.has_run(self.id)
            reporter = KeepsCost(self.reporter, timer) if is_new else self.reporter
            network = self.trained(teacher=teacher, reporter=reporter)
            if is_new:
                timer.record()
        row = run_row(self.id, self.recipe, self.owned, self.dataset, network)
        row["checkpoint_digest"] = network_digest(network)
        row["structure"] = self.applicability.structure
        row["teacher_digest"] = self._teacher_digest()
        self.store.write_run(row)  # refuses another network than the recorded one
        save_network(self.folder / NETWORK, network)
        write_json(self.folder / CARD, self.card.model_dump())
        return network

    def _finished_student(self) -> nn.Module | None:
        """The network of a recorded student, which needs its teacher no longer; None where there is none."""
        is_done = self.store.has_run(self.id) and has_checkpoints(self.folder)
        return self.trained(only_load=True) if self.teacher is not None and is_done else None

    def _taken(self) -> nn.Module | None:
        """The network of another run that was trained in the same way, whose checkpoints now are this one's too.

        None where this run has checkpoints, where there is no such run, or where its checkpoints are no longer those of
        the network that it recorded.
        """
        if self.store.has_run(self.id) or has_checkpoints(self.folder):
            return None
        wanted = training_id(self.recipe.canonical(), self.dataset.digest, self.owned.card.numerics)
        structure = self.applicability.structure
        found = find_trained(self.store, self.folder.parent, self.id, wanted, structure)
        if found is None:
            return None
        copied = copy_checkpoints(found, self.folder)
        try:
            network = self.trained(only_load=True, folder=copied)
            is_recorded = network_digest(network) == found.digest
        except RunError:  # gone, unfinished or damaged
            is_recorded = False
        if not is_recorded:
            shutil.rmtree(copied)
            self.reporter.say(
                f"{self.recipe.name}: trained like run {found.run_id}, whose checkpoints no longer hold the network that "
                "it recorded; trained anew"
            )
            return None
        self.reporter.say(f"{self.recipe.name}: trained like run {found.run_id}; its network is taken")
        copy_cost(self.store, found, self.id)
        copy_teacher(found, self.folder)
        adopt(copied, self.folder)
        return network

    @property
    def card(self) -> NetworkCard:
        return NetworkCard.of(self.recipe, self.dataset)

    def _ready_teacher(self) -> Teacher | None:
        """The teacher's network, trained where it is missing; which one it was is kept beside the student's."""
        if self.teacher is None:
            return None
        name = self.recipe.method.settings["teacher"]
        self.reporter.say(f"{self.recipe.name}: learns from {name} ({self.teacher.id})")
        if isinstance(self.teacher, Run):
            self.teacher.refuse_submitted()
            self.teacher.check_network()
            network = self.teacher.train()
        else:
            network = self.teacher.network(self.plugins)
        teacher = ready(name, network, self.device)
        card = self.teacher.card.model_dump()
        keep_teacher(
            self.folder, {"teacher": name, "id": self.teacher.id, "digest": teacher.digest, "card": card}
        )
        return teacher

    def _teacher_digest(self) -> str | None:
        is_student = isinstance(self.plugins.settings(self.recipe), TeacherSettings)
        return teacher_digest(self.store, self.id, self.recipe.name, self.folder) if is_student else None

    def trained(
        self,
        only_load: bool = False,
        teacher: Teacher | None = None,
        folder: Path | None = None,
        reporter: Reporter | None = None,
    ) -> nn.Module:
        """The network in evaluation mode, from the plugin, which trains only what its checkpoints do not hold.

        They lie in the run's own folder unless another is named.
        """
        task = TrainTask(
            recipe=self.recipe,
            settings=self.plugins.settings(self.recipe),
            dataset=self.dataset,
            device=self.device,
            folder=folder or self.folder,
            build_network=self.build_network,
            reporter=reporter or self.reporter,
            only_load=only_load,
            teacher=teacher,
        )
        return self._ask_plugin("train", lambda: self.plugins.train(task)).eval()

    def certify(self, network: nn.Module) -> list[Certificates]:
        """Certificates of the whole test set, in order, with the time they took."""
        scratch = self._scratch_path(network_digest(network))
        timer = self._timer(certify_stage(*self._certificates[1:]), goes_on=scratch.is_file())
        found = self.certificates(network, timer)
        timer.record()
        return found

    @property
    def certified_split(self) -> Split:
        """The test images that the recipe has certified: all of them, unless it names a subset."""
        return self.dataset.test.every(self.recipe.smoothing.stride)

    def certificates(self, network: nn.Module, timer: Timer | None = None) -> list[Certificates]:
        """Certificates of the recipe's test images, in order, by the plugin's own certifier or the core's.

        A ``timer`` is kept whenever half-done work is saved.
        """
        self.reporter.stage("certify", len(self.certified_split), "image")
        before = network_digest(network)
        task = self.certify_task(network, timer=timer)
        found = self._ask_plugin("certify", lambda: self._collect(task))
        if network_digest(network) != before:
            raise RunError(
                f"{self.recipe.name}: the certifier {self.certifier.name} changed the network it was given; its "
                "certificates are not recorded"
            )
        return found

    def certify_task(
        self, network: nn.Module, first: int = 0, stop: int | None = None, timer: Timer | None = None
    ) -> CertifyTask:
        """What the certifier is asked: images ``first`` to ``stop`` of :attr:`certified_split`, by default all."""
        split, stride = self.certified_split, self.recipe.smoothing.stride
        part = split if stop is None else split.slice(first, stop)
        has_radius = self.recipe.threat.radius is not None
        is_all = len(part) == len(split)
        return CertifyTask(
            recipe=self.recipe,
            settings=self.plugins.settings(self.recipe),
            network=network,
            split=part.to(self.device),
            levels=self.dataset.info.levels,
            start=first * stride,
            radius=self.recipe.radius if has_radius else Fraction(0),
            cap=self.recipe.cap if has_radius else Fraction(0),
            device=self.device,
            stride=stride,
            run_id=self.id,
            reporter=self.reporter,
            scratch=(
                ScratchFile(self._scratch_path(network_digest(network)), timer.keep if timer else None)
                if is_all
                else NoScratch()
            ),
        )

    def _scratch_path(self, network: str) -> Path:
        """Named by all that makes half-done certificates worth going on with."""
        stage = certify_stage(self.certifier.name, digest_settings(self.certifier, self.recipe))
        return self.folder / f"{stage}-{network[:8]}.partial"

    def audit(self, network: nn.Module, attack: AnyAttack, of: CertificateSet | None = None) -> None:
        """Attack every correct image at the recipe's radius and every certificate at its own; rows are added.

        What is attacked is the deployed network, the one that was certified; ``of`` names other certificates of this
        run than those its recipe asks for. Statistical certificates have an audit of their own.
        """
        of = of or self._certificates
        rows = self.store.certificates(*of).to_pandas()
        if not can_be_audited(attack, rows):
            self.reporter.say(f"{self.recipe.name}: nothing to audit: no correct image has a certificate")
            return
        deployed = deployed_network(network)
        auditor = Auditor(self.recipe, self.dataset, deployed, self.device, self.reporter)
        timer = self._timer(audit_stage(*of[1:], attack.name, attack.settings_digest), goes_on=False)
        found = auditor.audit(attack, rows)
        timer.record()
        words = {"attack_summary": attack.summary, "attack_limit": found.limit or None}
        self.store.write_audits(*of, attack.name, attack.settings_digest, {**found.columns, **words})
        self._report(found, attack)

    def _report(self, found: Audit, attack: AnyAttack) -> None:
        counts = {outcome: found.count(outcome) for outcome in ("refuted", "refuted_in_float", "falsified")}
        shown = ", ".join(f"{count} {outcome.replace('_', ' ')}" for outcome, count in counts.items())
        self.reporter.say(f"{self.recipe.name}: attacked with {attack.name} ({attack.summary}): {shown}")
        if found.limit:
            self.reporter.say(f"{self.recipe.name}: no witness can be confirmed: {found.limit}")

    @property
    def _certificates(self) -> CertificateSet:
        """What names this run's certificates in the store."""
        return self.id, self.certifier.name, digest_settings(self.certifier, self.recipe)

    def _timer(self, stage: str, goes_on: bool) -> Timer:
        return Timer(self.store, self.id, stage, self.device, self.folder, goes_on)

    @property
    def is_certified(self) -> bool:
        return self.store.has_certificates(*self._certificates)

    @property
    def _has_network(self) -> bool:
        return (self.folder / NETWORK).is_file()

    def is_audited(self, attack: AnyAttack | None, of: CertificateSet | None = None) -> bool:
        return attack is None or self.store.has_audits(
            *(of or self._certificates), attack.name, attack.settings_digest
        )

    def _collect(self, task: CertifyTask) -> list[Certificates]:
        found: list[Certificates] = []
        for part in self.certifier.certify(task):
            found.append(part)
            self.reporter.advance(sum(len(p.index) for p in found), certified=certified_share(found))
        return complete(found, task)

    def build_network(self) -> nn.Module:
        seed = derive_seed(self.recipe.seed, "network")
        network = build_network(self.recipe.model, self.dataset.info, seed, self.plugins.models())
        return network.to(self.device)

    @cached_property
    def applicability(self) -> Applicability:
        """What bounds apply to the recipe's network, and a hash of how it is built."""
        with torch.device("meta"):
            network = build_network(self.recipe.model, self.dataset.info, 0, self.plugins.models())
        return applicability(network, self.dataset.info.shape)

    def check_network(self) -> None:
        """Refuse, before any training, what cannot be certified, or is not what this run was begun with.

        Raises:
            UsageError: the recipe's certifier does not apply to its network.
            RunError: the libraries that build the network now build another one.
        """
        found = self.applicability
        if reason := found.refusal(self.certifier.name, self.recipe.certify.guarantee):
            raise UsageError(
                f"{self.recipe.name}: certifier {self.certifier.name} does not apply to model {self.recipe.model}: {reason}"
            )
        path = self.folder / STRUCTURE
        if path.is_file() and path.read_text(encoding="utf-8") != found.structure:
            raise RunError(
                f"{self.recipe.name}: model {self.recipe.model} is built otherwise than when run {self.id} began; "
                "another version of torch, torchvision, timm or a plugin? Go back to it, or choose another --out"
            )
        write_atomically(path, found.structure.encode())

    def _ask_plugin(self, hook: str, call: Callable[[], T]) -> T:
        """Call into plugin code; what it raises is reported in one line, with the traceback in a file."""
        try:
            return call()
        except CertbenchError:
            raise
        except (Exception, SystemExit) as error:  # a plugin may raise anything, and the other runs must go on
            report = self.folder / "error.txt"
            with suppress(OSError):
                report.write_text(traceback.format_exc(), encoding="utf-8")
            line = " ".join(f"{type(error).__name__}: {error}".split())
            raise RunError(
                f"{self.recipe.name}: plugin {self.owned.plugin.distribution} failed in {hook}: {line} "
                f"(traceback in {report})"
            ) from error

    def outcome(self) -> RunOutcome:
        """What the store holds for this run and these settings."""
        return outcome(self.store, self._certificates, self.recipe, self.folder)


def make_writable(folder: Path) -> None:
    """
    Raises:
        RunError: the folder cannot be made or written to; found out before training, not after.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1, sort_keys=True).encode())
