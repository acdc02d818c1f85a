"""Finding plugins, checking what they claim, and sending a task only to the plugin that owns its method."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy
from pydantic import ValidationError

from certbench import hookspecs
from certbench.contract import Certificates, CertifyTask, MethodCard, SuitsRecipe, TrainTask
from certbench.data.catalog import DATASETS, DatasetInfo, dataset_info
from certbench.errors import CertbenchError, PluginError, RunError, UsageError, nearest
from certbench.recipe import SOUND_CERTIFIERS, Recipe, explain, load_recipe

if TYPE_CHECKING:
    import torch

    from certbench.models import Builder

GROUP = "certbench"
T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """One entry point: where it comes from, and the error that kept it from loading, if any."""

    name: str
    distribution: str
    version: str
    error: str | None = None


@dataclass(frozen=True)
class Owned:
    """A method's card with the plugin that brought it."""

    card: MethodCard
    plugin: Loaded


CORE = Loaded("core", "certbench", "")
"""Stands for the core where names are claimed."""


class Plugins:
    """The plugins of one process. ``loaded`` lists every entry point in sorted order, failed ones included."""

    def __init__(self, points: Iterable[EntryPoint]) -> None:
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        if os.environ.get("CERTBENCH_TRACE") == "1":
            self._manager.add_hookcall_monitoring(_trace_before, _trace_after)
        self.loaded = [self._load(point) for point in sorted(points, key=lambda p: (p.name, p.value))]

    def _load(self, point: EntryPoint) -> Loaded:
        distribution = point.dist.name if point.dist else "unknown distribution"
        version = point.dist.version if point.dist else ""
        try:
            module = point.load()
            self._manager.register(module, name=f"{distribution}:{point.name}")
        except (Exception, SystemExit) as error:  # a plugin may raise anything on import; the others go on
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            return Loaded(point.name, distribution, version, line)
        return Loaded(point.name, distribution, version)

    def methods(self) -> dict[str, Owned]:
        """Every registered method by name.

        Raises:
            PluginError: two plugins claim one name, or a plugin fails to name its methods.
        """
        found = self._collect("register_methods", "method", lambda cards: _by_name(cards, MethodCard))
        return {name: Owned(card, plugin) for name, (card, plugin) in found.items()}

    def datasets(self) -> dict[str, DatasetInfo]:
        """Every data set by name, the built-in ones included.

        Raises:
            PluginError: two claim one name, or a plugin fails to describe its data sets.
        """
        found = self._collect(
            "register_datasets", "data set", lambda infos: _by_name(infos, DatasetInfo), DATASETS
        )
        return {name: info for name, (info, _) in found.items()}

    def dataset(self, name: str) -> DatasetInfo:
        """
        Raises:
            UsageError: no data set has this name; names the nearest.
        """
        return dataset_info(name, self.datasets())

    def models(self) -> dict[str, Builder]:
        """Every network's builder by name, the core's included; imports torch.

        Raises:
            PluginError: two claim one name, or a plugin fails to name its networks.
        """
        from certbench.models import MODELS

        found = self._collect("register_models", "model", dict, MODELS)
        return {name: builder for name, (builder, _) in found.items()}

    def _collect(
        self,
        hook: str,
        kind: str,
        named: Callable[[Any], Mapping[str, T]],
        core: Mapping[str, T] | None = None,
    ) -> dict[str, tuple[T, Loaded]]:
        """What the core and every loaded plugin register by a hook, with its owner, by name."""
        owned = {name: (entry, CORE) for name, entry in (core or {}).items()}
        for plugin in self.loaded:
            if plugin.error is not None:
                continue
            for name, entry in self._ask(hook, plugin, named).items():
                other = owned.setdefault(name, (entry, plugin))[1]
                if other is not plugin:
                    raise PluginError(
                        f"{kind} {name!r} is claimed by two distributions, {other.distribution} and "
                        f"{plugin.distribution}; uninstall one of them"
                    )
        return owned

    def _ask(self, hook: str, plugin: Loaded, named: Callable[[Any], Mapping[str, T]]) -> dict[str, T]:
        try:
            answers = self._caller(hook, plugin)()
            return {name: entry for answer in answers for name, entry in named(answer).items()}
        except PluginError as error:
            raise PluginError(f"plugin {plugin.distribution}: {hook} must return {error}") from None
        except (
            Exception,
            SystemExit,
        ) as error:  # whatever a plugin raises is its own fault, reported in one line
            raise PluginError(
                f"plugin {plugin.distribution} failed in {hook}: {type(error).__name__}: {error}; "
                "uninstall or repair it"
            ) from error

    def owner(self, method: str) -> Owned:
        """The card and plugin of a method.

        Raises:
            UsageError: no loaded plugin has it; names plugins that failed to load, since one of them may.
        """
        methods = self.methods()
        if method in methods:
            return methods[method]
        failed = [f"{p.distribution} ({p.error})" for p in self.loaded if p.error]
        hint = f"; plugins that failed to load: {', '.join(failed)}" if failed else ""
        raise UsageError(f"unknown method {method!r}; {nearest(method, methods)}{hint}")

    def train(self, task: TrainTask) -> torch.nn.Module:
        """Have the owner of the task's method train it."""
        owned = self.owner(task.recipe.method.name)
        network = self._caller("train", owned.plugin)(task=task)
        if network is None:
            raise RunError(f"plugin {owned.plugin.distribution} has no train hook for {owned.card.name!r}")
        return network  # type: ignore[no-any-return]  # pluggy's callers are untyped

    def has_certifier(self, method: str) -> bool:
        """Whether the owner of a method brings a certifier of its own."""
        return bool(self._caller("certify", self.owner(method).plugin).get_hookimpls())

    def certify(self, task: CertifyTask) -> Iterable[Certificates]:
        """The certificates of the owner's own certifier."""
        owned = self.owner(task.recipe.method.name)
        return self._caller("certify", owned.plugin)(task=task)  # type: ignore[no-any-return]  # as above

    def _caller(self, hook: str, owner: Loaded) -> pluggy.HookCaller:
        own = f"{owner.distribution}:{owner.name}"
        others = [module for name, module in self._manager.list_name_plugin() if name != own]
        return self._manager.subset_hook_caller(hook, others)

    # Recipes and settings ------------------------------------------------------------------------------------------

    def recipes(self) -> dict[str, Path]:
        """The recipes that plugins ship, by full name such as ``fast-ibp/digits-linf-0.1``."""
        found = {}
        for method, owned in sorted(self.methods().items()):
            if owned.card.recipes is None:
                continue
            folder = Path(str(owned.card.recipes))
            for path in sorted(folder.glob("*.toml")):
                found[f"{method}/{path.name.removesuffix('.toml')}"] = path
        return found

    def find_recipe(self, name: str, overrides: Iterable[str] = ()) -> Recipe:
        """A recipe by name or by path, with every setting filled in and checked, the method's own included.

        Raises:
            UsageError: no such recipe or file, unknown key or bad value, or settings that do not suit each other.
        """
        path = Path(name)
        if path.suffix == ".toml":
            return self._checked(self._resolved(path, None, tuple(overrides), where=name))
        known = self.recipes()
        if name not in known:
            raise UsageError(
                f"unknown recipe {name!r}; {nearest(name, known)} (a recipe file ends in .toml; "
                "`certbench list recipes` shows the installed ones)"
            )
        return self._checked(self._resolved(known[name], name, tuple(overrides), where=str(known[name])))

    def _resolved(self, path: Path, name: str | None, overrides: Sequence[str], where: str) -> Recipe:
        """The recipe with what is changed; one that is what it was before keeps its name and published figures."""
        settings = {method: owned.card.settings for method, owned in self.methods().items()}
        found = self.resolve(load_recipe(path, name, overrides, settings), where)
        if overrides:
            try:
                unchanged = self.resolve(load_recipe(path, name), where)
            except UsageError:  # it cannot do without
                return found
            if found.is_same(unchanged):
                return unchanged
        return found

    def resolve(self, recipe: Recipe, where: str | None = None) -> Recipe:
        """The recipe with the method's defaults filled in; see :meth:`settings`."""
        settings = self.settings(recipe, where).model_dump(mode="json")
        content = recipe.canonical()
        content["method"] = {"name": recipe.method.name, **settings}
        certifier = recipe.certify.certifier or self.owner(recipe.method.name).card.certifier
        content["certify"]["certifier"] = certifier
        if recipe.threat.norm == "l2":
            content["certify"]["smoothing"] = recipe.smoothing.model_dump(mode="json")
        elif recipe.certify.guarantee is None:
            sound = certifier in SOUND_CERTIFIERS or recipe.certify.deploy != "float32"
            content["certify"]["guarantee"] = "float_sound" if sound else "real_arith"
        return Recipe.model_validate(content)

    def _checked(self, recipe: Recipe) -> Recipe:
        """The recipe, if the method's own check has nothing against it."""
        settings = self.settings(recipe)
        if isinstance(settings, SuitsRecipe):
            try:
                settings.check_recipe(recipe)
            except CertbenchError:
                raise
            except Exception as error:
                owner = self.owner(recipe.method.name).plugin.distribution
                raise PluginError(
                    f"{owner}: check_recipe of {recipe.method.name} failed: {type(error).__name__}: {error}"
                ) from error
        return recipe

    def settings(self, recipe: Recipe, where: str | None = None) -> Any:
        """The ``[method]`` table as the method's own validated model."""
        model = self.owner(recipe.method.name).card.settings
        try:
            return model.model_validate(recipe.method.settings)
        except ValidationError as error:
            raise UsageError(explain(error, model, where or recipe.name, "method.", whole=Recipe)) from None


def _by_name(entries: Iterable[Any], kind: type[Any]) -> dict[str, Any]:
    """
    Raises:
        PluginError: an entry is of another kind; the text completes a sentence.
    """
    found = {}
    for entry in entries:
        if not isinstance(entry, kind):
            raise PluginError(f"{kind.__name__} objects, not {type(entry).__name__}")
        found[entry.name] = entry
    return found


@cache
def installed() -> Plugins:
    """The plugins installed in this environment, found once per process."""
    return Plugins(entry_points(group=GROUP))


def _trace_before(hook_name: str, methods: Sequence[pluggy.HookImpl], kwargs: Mapping[str, Any]) -> None:
    sys.stderr.write(f"certbench: call {hook_name}({', '.join(kwargs)})\n")


def _trace_after(
    outcome: pluggy.Result[Any], hook_name: str, methods: Sequence[pluggy.HookImpl], kwargs: Mapping[str, Any]
) -> None:
    names = ", ".join(m.plugin_name for m in methods) or "no plugin"
    result = "raised" if outcome.exception else type(outcome.get_result()).__name__
    sys.stderr.write(f"certbench: done {hook_name} by {names} -> {result}\n")
