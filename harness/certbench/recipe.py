"""What to run, exactly: TOML in, a validated :class:`Recipe` out, and the hash that names its run.

Parsing only. The ``[method]`` table is checked by the method's own settings model, which the plugin brings
(:func:`certbench.plugins.resolve`); everything else is checked here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from certbench.errors import UsageError, nearest
from certbench.threat import parse_distance, parse_radius

PROTOCOLS = {
    "linf": "linf-1",
    "smoothing": "l2-fixed-1",
    "smoothing-two-sided": "l2-fixed-1",
    "smoothing-label": "l2-fixed-1-label",
    "smoothing-sequential": "l2-sequential-1",
    "smoothing-sequential-label": "l2-sequential-1-label",
}
"""The rules rows are made under, by norm for L-inf and by certifier for L2; rows of different ones never share a table.

``linf-1``: whole test set in published order, raw pixels in [0, 1], strict margins, certification in float64 in shards
of fixed size. ``l2-...``: the same images or a named subset, noise on raw pixels, batches of one padded shape; ``fixed``
takes all its draws, ``sequential`` stops by a rule; ``label`` tests the label itself in place of a class selected from
draws of its own, which answers another question.
"""

SEQUENTIAL = "smoothing-sequential"
"""The certifier of an L2 recipe that names none."""

CORE_NUMERICS = 1
"""Raised when a change of the core moves numbers; part of every run id."""

SOUND_CERTIFIERS = ("ibp",)
"""Certifiers that cover the round-off of the deployed network unless told otherwise; the others do when told to."""

RADIUS_TOLERANCE = {"ibp": 2.0**-20, "crown-ibp": 2.0**-10, "crown": 2.0**-10, "alpha-crown": 2.0**-10}
"""How far below the largest provable radius a certifier's radius may lie, as a share of the cap."""
VERDICT_ONLY = "@radius"
"""After a bound's name in a cascade: it decides at the recipe's radius, and leaves larger ones to the others."""


def cascade_parts(certifier: str) -> list[tuple[str, bool]]:
    """The bounds of a cascade such as ``ibp>crown@radius``, in order, and whether each one searches radii."""
    parts = [part.strip() for part in certifier.split(">")]
    return [(part.removesuffix(VERDICT_ONLY), not part.endswith(VERDICT_ONLY)) for part in parts]


Radius = Annotated[Fraction, BeforeValidator(parse_radius), PlainSerializer(str, return_type=str)]
Distance = Annotated[Fraction, BeforeValidator(parse_distance), PlainSerializer(str, return_type=str)]


class Strict(BaseModel):
    """Base of every settings model, the methods' included: unknown keys, NaN and infinity are errors.

    ``later`` names keys that were added when rows existed already: they are written down only where they differ from
    their defaults, so that the run ids of those rows stay what they are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _leave_out_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        for name in self.later:
            if getattr(self, name) == fields[name].default:
                written.pop(name, None)
        return written


class Threat(Strict):
    """The perturbations that must not change the prediction, in raw pixel units.

    An L-inf threat has a radius. An L2 threat has the standard deviation ``sigma`` of the Gaussian noise that smooths
    the network, and every image a certified radius of its own.
    """

    norm: Literal["linf", "l2"] = "linf"
    radius: Radius | None = None
    sigma: float | None = Field(default=None, gt=0)

    later: ClassVar[frozenset[str]] = frozenset({"sigma"})

    @model_validator(mode="after")
    def _radius_or_sigma(self) -> Threat:
        needed, other = ("radius", "sigma") if self.norm == "linf" else ("sigma", "radius")
        if getattr(self, needed) is None:
            raise ValueError(f'norm = "{self.norm}" needs {needed}')
        if getattr(self, other) is not None:
            raise ValueError(f'{other} says nothing to norm = "{self.norm}", which has {needed}')
        return self


Share = Annotated[float, Field(ge=0, le=1)]


class Augmentation(Strict):
    """Random changes of training images, in this order: flip, erase, crop. Fills are raw pixels in [0, 1].

    Erasing follows arXiv 1708.04896: a rectangle whose share of the image and whose height over width are drawn from
    the two ranges, the latter's logarithm uniformly.
    """

    flip: bool = False
    """Left to right, half of the images."""
    crop_padding: int = Field(default=0, ge=0)
    """Pixels added on each side before a crop back to the old size, at a uniform place."""
    crop_fill: Share | None = None
    """What they hold; by default the nearest pixel of the image."""
    erase: Share = 0.0
    """The share of images that lose a rectangle."""
    erase_area: tuple[Share, Share] = (0.02, 0.33)
    erase_aspect: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.3, 3.3)
    erase_fill: Share = 0.0
    resized_crop: tuple[Share, Share] | None = None
    """Only where images are decoded while training (ImageNet): the range of the share of the photograph that is cut out,
    with 3/4 to 4/3 of its height as width, and scaled to the network's size."""

    @field_validator("erase_area", "erase_aspect", "resized_crop")
    @classmethod
    def _ranges_rise(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and ends[0] > ends[1]:
            raise ValueError("a range is written from its lower to its upper end")
        return ends


class Train(Strict):
    """The training loop of :func:`certbench.training.fit`; a method with a loop of its own may ignore parts."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=5e-4, gt=0)
    milestones: tuple[int, ...] = ()
    """Epochs after which the learning rate is multiplied by ``decay``."""
    milestone_lag: int = Field(default=0, ge=0)
    """Epochs by which every milestone comes late: 1 in releases that step their scheduler with the epoch just
    finished, where epoch 32 is the first with the lower rate of milestone 30."""
    decay: float = Field(default=0.2, gt=0, le=1)
    gradient_clip: float = Field(default=10.0, ge=0)
    """Largest 2-norm of the whole gradient; 0 leaves it as it is."""
    augment: bool = True
    """The data set's published augmentation (none for digits and MNIST)."""
    augmentation: Augmentation | None = None
    """Another one in its place."""
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of SGD, without Nesterov's correction."""
    weight_decay: float = Field(default=0.0, ge=0)
    """The L2 term inside the optimiser, on every parameter."""
    schedule: Literal["milestones", "one-cycle", "cosine"] = "milestones"
    """``one-cycle``: linear in three phases, 30 % of the steps up from a 25th of the rate, 30 % down again, the rest
    further down. ``cosine``: half a wave from the rate down to 0. Both change it at each step."""
    final_division: float = Field(default=1e4, ge=1)
    """By how much the last rate of ``one-cycle`` is below its first."""

    later: ClassVar[frozenset[str]] = frozenset(
        {
            "augmentation",
            "milestone_lag",
            "optimizer",
            "momentum",
            "weight_decay",
            "schedule",
            "final_division",
        }
    )

    @field_validator("milestones")
    @classmethod
    def _milestones_rise(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if any(b <= a for a, b in itertools.pairwise((0, *milestones))):
            raise ValueError("milestones are epochs from 1, each later than the one before")
        return milestones

    @model_validator(mode="after")
    def _augmentation_is_wanted(self) -> Train:
        if self.augmentation is not None and not self.augment:
            raise ValueError(
                "augment = false and an augmentation contradict each other; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _final_division_needs_its_schedule(self) -> Train:
        if self.final_division != 1e4 and self.schedule != "one-cycle":
            raise ValueError(f'final_division says nothing to schedule = "{self.schedule}"; leave it out')
        return self

    @model_validator(mode="after")
    def _milestones_need_their_schedule(self) -> Train:
        if self.milestones and self.schedule != "milestones":
            raise ValueError(f'milestones say nothing to schedule = "{self.schedule}"; leave one of them out')
        return self


class Smoothing(Strict):
    """``[certify.smoothing]``: how many draws an L2 certificate takes, and when the sequential certifier stops."""

    n0: int = Field(default=100, ge=1)
    """Draws that select the class under test; none where the label is tested."""
    n: int = Field(default=100_000, ge=1)
    """Further draws per image: all of them (``smoothing``), or at most so many (``smoothing-sequential``)."""
    failure_probability: float = Field(default=0.001, gt=0, lt=0.5)
    """alpha: how often, at most, a certificate may be wrong, for each image on its own."""
    goal: Literal["radii", "tolerance", "budget"] = "radii"
    """When the sequential certifier stops: all ``radii`` are decided; the radius is within ``tolerance`` of what all
    ``n`` draws would give; or never before ``n``."""
    radii: tuple[Distance, ...] = tuple(Fraction(k, 4) for k in range(11))
    """Those that ``n`` draws could not certify are not waited for."""
    tolerance: float = Field(default=0.05, gt=0, lt=1)
    """As a share of the radius."""
    batch: int = Field(default=400, ge=100, multiple_of=100)
    """Noisy images per pass of the network."""
    exact_noise: bool = False
    """Noise on the grid of pixel values, drawn exactly: the guarantee does not rest on floating-point Gaussians."""
    compile: bool = False
    """Run the network through ``torch.compile``."""
    subset: str = Field(default="all", pattern=r"^(all|every-[1-9][0-9]{0,5})$")
    """The test images that are certified: all, or ``every-20`` for images 0, 20, 40 and so on."""

    @field_validator("radii")
    @classmethod
    def _radii_rise(cls, radii: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
        if not radii or any(b <= a for a, b in itertools.pairwise(radii)):
            raise ValueError("give at least one radius, each larger than the one before")
        return radii

    @property
    def stride(self) -> int:
        """1 for all images, 20 for ``every-20``."""
        return 1 if self.subset == "all" else int(self.subset.removeprefix("every-"))


class Certify(Strict):
    """How certificates are made; ``cap`` bounds the per-image radius search and defaults to the threat's radius."""

    certifier: str | None = Field(default=None, min_length=1)
    cap: Radius | None = None
    guarantee: Literal["float_sound", "real_arith"] | None = None
    """Whether bounds cover the round-off of the deployed network, or speak of real arithmetic; by default the former
    for ``SOUND_CERTIFIERS``, and where a deployment is named."""
    deploy: Literal["float32", "float64", "tf32", "bf16", "fp16"] = "float32"
    """The arithmetic that a float-sound certificate covers, or in which a smoothed network is run."""
    smoothing: Smoothing | None = None
    """For norm l2 alone."""

    later: ClassVar[frozenset[str]] = frozenset({"smoothing"})

    @model_validator(mode="after")
    def _deploy_needs_float_sound(self) -> Certify:
        if self.guarantee == "real_arith" and self.deploy != "float32":
            raise ValueError(f'deploy = "{self.deploy}" says nothing unless guarantee = "float_sound"')
        return self


class Reference(Strict):
    """Published figures for this very setting, in percent, shown beside the measured ones."""

    source: str
    clean_error: float | None = Field(default=None, ge=0, le=100)
    clean_error_spread: float | None = Field(default=None, ge=0)
    certified_error: float | None = Field(default=None, ge=0, le=100)
    certified_error_spread: float | None = Field(default=None, ge=0)


class Method(BaseModel):
    """The ``[method]`` table before its plugin has seen it: the name, and settings kept as they were written."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class Recipe(Strict):
    """One experiment: a method on a data set, a network and a threat, with every setting that moves a number."""

    name: str
    dataset: str
    model: str
    seed: int = Field(default=0, ge=0, lt=2**31)
    threat: Threat
    method: Method
    train: Train
    certify: Certify = Certify()
    reference: Reference | None = None

    @model_validator(mode="after")
    def _cap_not_below_radius(self) -> Recipe:
        cap, radius = self.certify.cap, self.threat.radius
        if cap is not None and radius is not None and cap < radius:
            raise ValueError(f"certify.cap = {cap} lies below threat.radius = {radius}")
        return self

    @model_validator(mode="after")
    def _certify_suits_the_norm(self) -> Recipe:
        idle = ("cap", "guarantee") if self.threat.norm == "l2" else ("smoothing",)
        for key in idle:
            if getattr(self.certify, key) is not None:
                raise ValueError(f'certify.{key} says nothing to norm = "{self.threat.norm}"; leave it out')
        return self

    @property
    def radius(self) -> Fraction:
        """
        Raises:
            UsageError: the norm is l2, where every image has a radius of its own.
        """
        if self.threat.radius is None:
            raise UsageError(
                f"{self.name}: norm l2 has no radius that is asked of all images, but a noise level"
            )
        return self.threat.radius

    @property
    def cap(self) -> Fraction:
        """The largest radius the search looks at; see :attr:`radius` for what it raises."""
        return self.certify.cap or self.radius

    @property
    def sigma(self) -> float:
        """
        Raises:
            UsageError: the norm is L-inf.
        """
        if self.threat.sigma is None:
            raise UsageError(f"{self.name}: smoothing needs threat.sigma, which only norm l2 has")
        return self.threat.sigma

    @property
    def smoothing(self) -> Smoothing:
        """The smoothed certifier's settings, by default where the recipe gives none."""
        return self.certify.smoothing or Smoothing()

    @property
    def protocol(self) -> str:
        """The rules under which this recipe's own certifier makes rows."""
        return protocol_of(self.threat.norm, self.certify.certifier or SEQUENTIAL, self.smoothing.subset)

    def with_seed(self, seed: int) -> Recipe:
        return validate({**self.canonical(), "seed": seed}, self.name)

    def canonical(self) -> dict[str, Any]:
        """Plain JSON values with every default filled in; radii as reduced fractions."""
        return self.model_dump(mode="json")

    def is_same(self, other: Recipe) -> bool:
        """Whether both compute the same, whatever they are called."""
        return _computed(self.canonical()) == _computed(other.canonical())

    def canonical_json(self) -> str:
        return json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"), allow_nan=False)


def protocol_of(norm: str, certifier: str, subset: str = "all") -> str:
    """The protocol of certificates by one certifier on one subset; rows of different protocols never share a table."""
    if norm == "linf":
        return PROTOCOLS[norm]
    rules = PROTOCOLS.get(certifier, f"l2-{certifier}-1")
    return rules if subset == "all" else f"{rules}-{subset}"


def stride_of(protocol: str) -> int:
    """20 for a protocol about every 20th image, 1 for one about all."""
    found = re.search(r"-every-([1-9][0-9]{0,5})$", protocol)
    return int(found.group(1)) if found else 1


def run_id(recipe: Recipe, data_digest: str, method_numerics: int) -> str:
    """Sixteen hexadecimal digits that name a run.

    Hashed: the resolved recipe with its seed, the data, the method's and the core's ``numerics`` and the protocol.
    Not hashed, because they do not change what is computed: the recipe's name and published figures, the device,
    the number of workers.
    """
    return identify(recipe.canonical(), data_digest, (CORE_NUMERICS, method_numerics), recipe.protocol)


def identify(content: Mapping[str, Any], data_digest: str, numerics: tuple[int, int], protocol: str) -> str:
    """The run id of a canonical recipe, from plain values: rows can be checked without the plugin that made them."""
    identity = {
        "recipe": _computed(content),
        "data": data_digest,
        "numerics": list(numerics),
        "protocol": protocol,
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _computed(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in ("name", "reference")}


def load_recipe(
    path: Path,
    name: str | None = None,
    overrides: Iterable[str] = (),
    settings: Mapping[str, type[BaseModel]] | None = None,
) -> Recipe:
    """Read a TOML recipe and apply ``key=value`` overrides. ``settings`` are the methods' models by name, for errors to
    tell where a key belongs.

    Raises:
        UsageError: unreadable file, broken TOML, unknown key or bad value; names file, key, value and nearest key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read recipe {path}: {error.strerror}") from None
    except ValueError as error:  # broken TOML, bytes that are no text, a path with a NUL
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    except RecursionError:
        raise UsageError(_too_deep(str(path))) from None
    return parse_recipe(content, name or path.stem, overrides, str(path), settings)


def parse_recipe(
    content: Mapping[str, Any],
    name: str,
    overrides: Iterable[str] = (),
    where: str | None = None,
    settings: Mapping[str, type[BaseModel]] | None = None,
) -> Recipe:
    """The recipe in an already parsed table; see :func:`load_recipe`."""
    if is_too_deep(content):
        raise UsageError(_too_deep(where or name))
    table: dict[str, Any] = json.loads(json.dumps(content, default=str))
    changes = list(overrides)
    for change in changes:
        _apply_override(table, change)
    if changes:  # a changed recipe says so in its name, and the published figures are not about it
        table.pop("reference", None)
    return validate({**table, "name": changed_name(name, changes)}, where or name, settings)


def changed_name(name: str, changes: Iterable[str]) -> str:
    """What a recipe is called once ``--set`` has changed it by these ``key=value``."""
    return " +".join([name, *changes])


def split_name(name: str) -> tuple[str, list[str]]:
    """A recipe's name without what ``--set`` changed, and these changes."""
    base, *changes = name.split(" +")
    return base, changes


def is_too_deep(content: Mapping[str, Any], most: int = 20) -> bool:
    """Whether tables and lists are nested deeper than any recipe needs.

    Found without recursion, whose limits differ between versions of Python.
    """
    level: list[Any] = [content]
    for _ in range(most):
        inner = (value for each in level for value in (each.values() if isinstance(each, Mapping) else each))
        level = [value for value in inner if isinstance(value, Mapping | list)]
    return bool(level)


def _too_deep(where: str) -> str:
    return f"{where} is nested too deeply for a recipe; tables need two levels, and a method's a few more"


def validate(
    table: Mapping[str, Any], where: str, settings: Mapping[str, type[BaseModel]] | None = None
) -> Recipe:
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        method = table.get("method")
        named = method.get("name") if isinstance(method, dict) else None
        own = [model for name, model in (settings or {}).items() if name == named]
        raise UsageError(explain(error, Recipe, where, own=own[0] if own else None)) from None


def _apply_override(table: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in a nested table; the value is read as TOML, or as a string where it is not TOML."""
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in keys):
        raise UsageError(f"--set takes key=value, for instance train.epochs=3; got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except RecursionError:
        raise UsageError(_too_deep(f"--set {keys[0]}")) from None
    if (
        keys[-1].endswith(("radius", "cap"))
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    ):
        value = text.strip()  # typed without quotes on a command line, and still exact
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set {override}: {key!r} is a value, not a table")
        table = inner
    table[keys[-1]] = value


def explain(
    error: ValidationError,
    model: type[BaseModel],
    where: str,
    prefix: str = "",
    own: type[BaseModel] | None = None,
    whole: type[BaseModel] | None = None,
) -> str:
    """One line for the first problem of a validation: file, key, value, what is wrong, and the key's place in another
    table, or else the nearest known key.

    The other tables are those of the ``model``, whose keys begin with ``prefix``, of the method's ``own`` settings, and of the
    ``whole`` that the model is a part of.
    """
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key = prefix + ".".join(path)
    if first["type"] == "extra_forbidden":
        places = [*(_places(path[-1], own, "method.") if own else []), *_places(path[-1], model, prefix)]
        places += _places(path[-1], whole) if whole else []
        hint = f"did you mean {' or '.join(map(repr, places))}?" if places else ""
        return f"{where}: unknown key {key!r}; {hint or nearest(path[-1], _known_keys(model, path[:-1]))}"
    if first["type"] == "missing":
        return f"{where}: key {key!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    value = first["input"]
    shown = f" = {json.dumps(value, default=str)}" if path and _is_plain(value) else ""
    return f"{where}: {key}{shown}: {message}" if path else f"{where}: {message}"


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | bool) or (isinstance(value, float) and not math.isnan(value))


def _places(key: str, model: type[BaseModel], prefix: str = "") -> list[str]:
    """Where in a model's tables a key of that name belongs, as dotted paths."""
    found = [prefix + key] if key in _known_keys(model, []) else []
    for name, inner in _tables(model).items():
        found += _places(key, inner, f"{prefix}{name}.")
    return found


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        model = _tables(model).get(part, model)
    return [name for name in model.model_fields if name != "name" or model is Method]


def _tables(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The models of its inner tables, by key."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not model:
                found.setdefault(name, kind)
    return found
