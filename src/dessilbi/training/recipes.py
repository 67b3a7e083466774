# SPDX-License-Identifier: Apache-2.0
"""Recipes: experiments as data. A TOML file, checked field by field, with values set on top."""

import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dessilbi.files.storage import told_by
from dessilbi.path import settling
from dessilbi.training.growth_table import GrowRecipe
from dessilbi.training.values import (
    Density,
    Momentum,
    NonNegative,
    Points,
    Positive,
    PositivePoints,
    Threshold,
    ascending,
    assign,
    rules,
)

SUFFIX = ".toml"
LARGEST = 1 << 20  # bytes of a TOML file
DEFAULT_NU = 100.0  # DessiLBI's own
AUTO_R = 10.0
RAMP = ((0.0, 0.0), (0.3, 1.0))  # scheduling.RAMP; this file is read before torch is loaded


class RecipeError(ValueError):
    """A recipe does not exist or holds a value that is not allowed."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class OptimizerRecipe(_Part):
    """Options of DessiLBI, or of wrap around AdamW; see their docstrings.

    ``R`` = T/nu may be given instead of ``nu``: T is kappa times the sum of the learning rate over
    the whole schedule, so that ``nu`` follows the number of epochs. ``nu = "auto"`` is R = 10, or
    the R that is given, with 1/nu ramped up over the first 30 % of the path unless ``moving`` says
    otherwise. With ``base = "adamw"`` AdamW moves the weights, with ``lr`` and ``weight_decay``;
    momentum, dampening and nesterov do not apply. ``lam_filter`` is the ``lam`` of whole filters,
    which have larger norms than single weights, and of units; without it theirs is ``lam``. A rule
    of the structure goes before both. ``fused``: as in DessiLBI and wrap; true builds the fused
    kernel if it is not there.
    """

    base: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.1
    kappa: Positive = 1.0
    nu: Positive | None = None
    R: Positive | None = None
    lam: Threshold = 1.0
    lam_filter: Threshold | None = None
    momentum: Momentum = 0.9
    dampening: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    weight_decay: NonNegative = 0.0
    nesterov: bool = False
    block_scale: Literal["unit", "sqrt"] = "unit"
    fused: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _nu_or_ratio(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("nu") == "auto":
            values = {k: v for k, v in values.items() if k != "nu"} | {"R": values.get("R", AUTO_R)}
        given = [name for name in ("nu", "R") if values.get(name) is not None]
        if len(given) == 2:
            raise ValueError("give nu or R = T/nu, not both")
        return values if given else values | {"nu": DEFAULT_NU}

    @property
    def path_lr(self) -> float:
        """The step of path time at the full learning rate."""
        return self.lr if self.base == "sgd" else self.lr / self.kappa


class ScheduleRecipe(_Part):
    """Learning rate over the run.

    "constant"; "step": times ``gamma`` at each of ``milestones`` (epochs); "cosine" to 0; "hold":
    linear warm-up over ``warmup`` of the steps, constant until ``hold``, then cosine to 0.
    """

    kind: Literal["constant", "step", "cosine", "hold"] = "constant"
    milestones: Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(ascending)] = ()
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    hold: Annotated[float, Field(gt=0, lt=1)] = 0.75


class MovingRecipe(_Part):
    """Factors that move with the run: (progress, factor) points, joined by straight lines.

    Progress is the share of the path time that is over. ``coupling`` is the factor of 1/nu:
    ``[[0, 0], [0.3, 1]]`` ramps it up, ``[[0.1, 0], [0.1, 1]]`` switches it on after a warm-up.
    """

    coupling: Points = ()
    lam: PositivePoints = ()
    kappa: PositivePoints = ()


class MaskedTraining(_Part):
    """SGD on the living weights of a ticket; dead ones stay zero."""

    momentum: Momentum = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0


class FinetuneRecipe(MaskedTraining):
    """Masked training that goes on from the trained weights."""

    epochs: Annotated[int, Field(ge=0)] = 2
    lr: Positive = 0.02
    schedule: ScheduleRecipe = ScheduleRecipe(kind="cosine")


class RetrainRecipe(MaskedTraining):
    """Masked training that starts again from the initialisation of the run."""

    epochs: Annotated[int, Field(ge=1)]
    lr: Positive
    schedule: ScheduleRecipe = ScheduleRecipe()


class StopRecipe(_Part):
    """When a search has found its ticket; see :func:`~dessilbi.path.settling.settled`.

    ``window``: recorded points; ``tolerance``: how far the support may move over it; ``gain``: how
    much the ticket's validation accuracy may rise over it, as a fraction; ``gap``: how far it may
    lie below that of W.
    """

    window: Annotated[int, Field(ge=1)] = settling.WINDOW
    tolerance: Annotated[float, Field(ge=0, le=1)] = settling.TOLERANCE
    gain: Annotated[float, Field(ge=0, le=1)] = settling.GAIN
    gap: Annotated[float, Field(ge=0, le=1)] = settling.GAP


class Recipe(_Part):
    """One experiment, complete: the same recipe and machine give the same numbers.

    What is trained:
        ``model``: a name of ours, or "torchvision:NAME" or "timm:NAME". ``data``: a data set.
        ``normalise``: shift and scale pixels by the set's mean and deviation; else they are in
        [0, 1]. ``augment``: crop and flip training images at random, where the data set does.
        ``validation``: training samples kept apart for every choice. ``image_size``: pixels of a
        side, for folders of images. ``length``: characters of a sample, for texts.
    How:
        ``batch_size``: samples of one step, over all processes; ``accumulate`` cuts them into so
        many pieces that pass one after the other. ``clip_norm``: the largest norm of the gradient.
        ``order_seed``: of the order of samples, by default ``seed``.
        ``structure``: glob of parameter names -> structure or table of group options, see
        param_groups. ``coupled``: filters that meet in a sum live or die together. ``grow``: start
        narrow and widen what the support asks for; ``epochs`` are those after the last growth.
        ``moving``: schedules of 1/nu, lambda and kappa.
        ``on_nan``: what is done where loss or gradient is not finite: the run stops, or the step
        is passed over.
    How much is to be left:
        ``density``: the wanted share of kept elements, or one for each glob of names; lambda is
        found, and ``lam`` says ratios only. ``calibrate``: "track" or "late", ``freeze``: share of
        the path time after which "track" leaves lambda alone, ``floor``: share of the density that
        every layer keeps, or "none": layers may die. See DensityControl.
    What is kept:
        ``points``: of the path, about; ``judged``: how many of them are judged for accuracy, by
        default what a tenth of the training's cost allows. ``checkpoint_every``: epochs, also
        fractions of one; ``keep_checkpoints``: the latest so many, and the best beside them.
        ``rewind_at``: epochs after which the weights are kept to rewind tickets to. ``stop``: end
        the search when its ticket has been found.
    With what:
        ``precision`` of the forward pass, ``compile`` the model, ``workers`` that decode images.
    """

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    summary: str = ""
    source: str = ""
    model: str
    data: str
    normalise: bool = True
    augment: bool = True
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    length: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    epochs: Annotated[int, Field(ge=1, le=1_000_000)]
    batch_size: Annotated[int, Field(ge=1)]
    accumulate: Annotated[int, Field(ge=1)] = 1
    clip_norm: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    order_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    validation: Annotated[int, Field(ge=1)]
    points: Annotated[int, Field(ge=1)] = 100
    judged: Annotated[int, Field(ge=1)] | None = None
    checkpoint_every: Positive = 1.0
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    on_nan: Literal["stop", "skip"] = "stop"
    rewind_at: Positive = 1.0
    stop: StopRecipe | None = None
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    compile: bool = False
    workers: Annotated[int, Field(ge=0)] = 2
    coupled: bool = False
    density: Density | dict[str, Density] | None = None
    calibrate: Literal["track", "late"] = "track"
    freeze: Annotated[float, Field(ge=0.1, lt=1)] | None = None
    floor: Annotated[float, Field(ge=0, le=1)] | Literal["none"] = 0.05
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    moving: MovingRecipe = MovingRecipe()
    grow: GrowRecipe | None = None
    finetune: FinetuneRecipe = FinetuneRecipe()
    retrain: RetrainRecipe | None = None
    structure: Annotated[dict[str, Any], BeforeValidator(rules)] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _ramped_if_auto(cls, values: Any) -> Any:
        options, moving = values.get("optimizer"), values.get("moving", {})
        asked = isinstance(options, dict) and options.get("nu") == "auto"
        if asked and isinstance(moving, dict) and "coupling" not in moving:
            return values | {"moving": moving | {"coupling": RAMP}}
        return values

    @field_validator("freeze")
    @classmethod
    def _only_tracking(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("calibrate") == "late":
            raise ValueError('it is for calibrate="track"; a late lambda is chosen once')
        return value

    @field_validator("calibrate", "freeze")
    @classmethod
    def _for_a_density(cls, value: Any, info: ValidationInfo) -> Any:
        if value not in ("track", None) and info.data.get("density") is None:
            raise ValueError("it says how lambda is found for a density: give density, too")
        return value

    @field_validator("grow")
    @classmethod
    def _alone(cls, value: GrowRecipe | None, info: ValidationInfo) -> GrowRecipe | None:
        moving = info.data.get("moving")
        moves = moving is not None and any(moving.model_dump().values())
        if value is not None and (moves or info.data.get("density") is not None):
            raise ValueError("it does not go with density or moving, which need a known end")
        if value is not None and info.data.get("stop") is not None:
            raise ValueError("it does not go with stop: a network that grows has its own end")
        return value

    @field_validator("moving")
    @classmethod
    def _one_writer(cls, value: MovingRecipe, info: ValidationInfo) -> MovingRecipe:
        if value.lam and info.data.get("density") is not None:
            raise ValueError("lam cannot follow a schedule and a density: leave one of them out")
        return value

    @property
    def seed_of_order(self) -> int:
        """What decides the order of samples."""
        return self.seed if self.order_seed is None else self.order_seed

    @property
    def longest(self) -> int:
        """Epochs of the longest run that this recipe allows."""
        return self.epochs + (self.grow.every * self.grow.max_rounds if self.grow else 0)

    @field_validator("accumulate")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        batch_size = info.data.get("batch_size", value)
        if batch_size % value:
            raise ValueError(f"batch_size={batch_size} must be a multiple of it")
        return value


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("dessilbi") / "recipes"
    files = (entry.name for entry in folder.iterdir())
    return sorted(name.removesuffix(SUFFIX) for name in files if name.endswith(SUFFIX))


def load_recipe(name: str, assignments: Sequence[str] = ()) -> Recipe:
    """Return a recipe by name, or from a TOML file of one's own, with values set on top.

    Args:
        name: One of :func:`recipe_names`, or a path that ends in ``.toml``.
        assignments: "key=value" texts; keys may be dotted, values are TOML or plain words.

    Raises:
        RecipeError: Unknown recipe, unknown key, or a value out of range (field, value, allowed).

    >>> load_recipe("digits-lenet", ["optimizer.nu=50"]).optimizer.nu
    50.0
    """
    return validate_recipe(assigned(_read(name), assignments), origin=name)


def assigned(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Set "key=value" texts on top of plain values, in place, and return them.

    Raises:
        RecipeError: A text is not of that form.
    """
    for assignment in assignments:
        try:
            assign(values, assignment)
        except ValueError as error:
            raise RecipeError(str(error)) from None
    return values


def validate_recipe(values: dict[str, Any], *, origin: str) -> Recipe:
    """Check a recipe given as plain values.

    Raises:
        RecipeError: One sentence naming field, value and what is allowed.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        # Of several kinds that a field may have, the one that was read furthest was meant.
        alike = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
        first = max(alike, key=lambda e: len(e["loc"]))
        # Where several kinds of values are allowed, pydantic names the kind as if it were a field.
        kinds = re.compile(r"constrained-|dict\[|literal\[")
        field = told_by(".".join(p for p in map(str, first["loc"]) if not kinds.match(p)))
        if first["type"] == "extra_forbidden":
            raise RecipeError(
                f"recipe {origin}: {field} is not a field; {_fields_of(field)}"
            ) from None
        if first["type"] == "missing":
            raise RecipeError(f"recipe {origin}: {field} is missing; {_fields_of(field)}") from None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("dict_type", "model_type"):
            message = "it is a table; `dessilbi recipes show` prints one to write into a file"
        message = message[:1].lower() + message[1:]
        given = told_by(repr(first["input"]))
        raise RecipeError(f"recipe {origin}: {field}={given} is not allowed: {message}") from None


def _fields_of(field: str) -> str:
    part: type[BaseModel] = Recipe
    where = "a recipe"
    for step in field.split(".")[:-1]:
        known = part.model_fields.get(step)  # the keys of a table may have dots of their own
        annotation = known.annotation if known else None
        inner = next((t for t in (annotation, *get_args(annotation)) if _is_part(t)), None)
        if inner is None:
            break
        part, where = inner, step
    return f"{where} has {', '.join(part.model_fields)}"


def _is_part(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _read(name: str) -> dict[str, Any]:
    if name.endswith(SUFFIX):
        path = Path(name)
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {name}; name one that exists")
        if path.stat().st_size > LARGEST:
            raise RecipeError(f"{name} has more than {LARGEST >> 20} MiB: it is no recipe")
        return _parse(path.read_text(encoding="utf-8", errors="replace"), name)
    if name not in recipe_names():
        known = ", ".join(recipe_names())
        if name and Path(name).exists():
            raise RecipeError(f"{name} is no recipe: name a file that ends in {SUFFIX}, or {known}")
        raise RecipeError(f"there is no recipe {name!r}; choose one of {known}, or a .toml file")
    return _parse((resources.files("dessilbi") / "recipes" / (name + SUFFIX)).read_text(), name)


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"recipe {origin} is not TOML: {told_by(str(error))}") from None
