"""Recipes: everything that a conversion depends on, as frozen dataclasses read from TOML."""

import ast
import difflib
import inspect
import itertools
import textwrap
import tomllib
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tomlkit

from gatefit.errors import RecipeError

RECIPE = "recipe.toml"
"""Name of the recipe in the folder of a run."""
RENAMED = {
    "gates.fill": "gates.compensation",
    "finetune.distillation": "distillation.weight",
    "finetune.features": "distillation.feature_weight",
    "finetune.gate_lr": "closing.gate_lr",
    "finetune.keep": "closing.min_open",
    "finetune.l1": "closing.l1",
    "finetune.penalty": "closing.penalty",
    "finetune.precision": "finetune.mixed_precision",
    "finetune.ramp": "closing.ramp",
    "finetune.recalibrate": "closing.bn_recalibration_images",
    "finetune.refit": "closing.reconstruction_images",
    "finetune.renew": "closing.gate_reinits",
    "finetune.target": "closing.target",
    "finetune.temperature": "distillation.temperature",
}
"""Keys of gatefit 0.1, and what they are called now. They are read, with a note."""


@dataclass(frozen=True)
class ModelPart:
    """[model]: the network and where its weights come from."""

    name: str = ""
    """timm or torchvision name, "timm/NAME", "torchvision/NAME" or "file.py:function"."""
    pretrained: bool = False
    weights: str = ""
    """A .safetensors or torch state-dict file."""
    image_size: int = 0
    """Side of the square input; 0: the network's own."""

    def __post_init__(self) -> None:
        _check(self.image_size >= 0, f"image_size must be 0 or more, not {self.image_size}")


@dataclass(frozen=True)
class DataPart:
    """[data]: the images."""

    name: str = ""
    """Image folder, tar, "digits", or a name that timm's create_dataset takes. Empty: Imagenette."""
    corrupt: Literal["refuse", "skip"] = "refuse"
    """What to do with an image that cannot be read."""
    limit: int = 0
    """Use only the first images of each split, after a seeded shuffle (of a stream: as it comes); 0: all."""

    def __post_init__(self) -> None:
        _check(self.limit >= 0, f"data.limit must be 0 or more, not {self.limit}")


@dataclass(frozen=True)
class GatesPart:
    """[gates]: what is retrofitted and how it begins.

    The defaults keep more accuracy at equal MACs than the paper's form, which `gatefit.retrofit(model)` gives alone.
    """

    kinds: Literal["lc", "l", "c"] = "c"
    form: Literal["relu1", "step"] = "step"
    """"relu1": the paper's ReLU-1. "step": 0/1 gates, trained straight-through."""
    compensation: bool = True
    """Let closed channels leave behind what they were predicted to be; false: the paper's."""
    start: Literal["data", "identity"] = "data"
    """"data": least squares on what each unit does for the loss. "identity": weight 0, bias 1."""


@dataclass(frozen=True)
class BaselinePart:
    """[baseline]: training of the dense network before it is converted; 0 epochs: none."""

    epochs: int = 0
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        _check(self.epochs >= 0, "baseline.epochs must be 0 or more")
        _check(self.batch_size > 0, "baseline.batch_size must be positive")
        _check(self.lr > 0, "baseline.lr must be positive")
        _check(self.weight_decay >= 0, "baseline.weight_decay must be 0 or more")


@dataclass(frozen=True)
class FinetunePart:
    """[finetune]: the training loop of the gated network."""

    epochs: int = 10
    batch_size: int = 128
    """Images for each optimiser step, over all processes and accumulation steps."""
    accumulate: int = 1
    """Forward passes for each optimiser step; each pass sees batch_size / accumulate images."""
    lr: float = 0.01
    """Peak learning rate of the backbone."""
    drop_every: int = 0
    """Epochs after which the learning rates drop to a tenth, again and again, as in the paper. 0: the rates follow a
    cosine to zero, after a short warm-up."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True
    """Crop images at random (with a padding of 1/8 of their size) and flip them."""
    flip: bool = True
    """Flip images from left to right at random; needs augment."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    compile: bool = False
    """Train compiled (torch.compile), the baseline too: 1.6 times as fast on CIFAR's ResNets, after half a minute.
    Needs a C++ compiler."""

    def __post_init__(self) -> None:
        _check(self.epochs >= 0, "finetune.epochs must be 0 or more")
        _check(self.batch_size > 0, "finetune.batch_size must be positive")
        _check(self.accumulate > 0, "finetune.accumulate must be positive")
        _check(self.lr > 0, "finetune.lr must be positive")
        _check(self.drop_every >= 0, "finetune.drop_every must be 0 or more")
        _check(0 <= self.momentum < 1, "finetune.momentum must lie in [0, 1)")
        _check(self.weight_decay >= 0, "finetune.weight_decay must be 0 or more")
        _check(
            self.mixed_precision in ("no", "fp16", "bf16"), "finetune.mixed_precision must be 'no', 'fp16' or 'bf16'"
        )


@dataclass(frozen=True)
class DistillationPart:
    """[distillation]: how the original network teaches the gated one."""

    weight: float = 0.9
    """Weight of the original's predictions in the loss; the labels have the rest. Without labels it is 1."""
    temperature: float = 4.0
    """Temperature that softens both predictions."""
    feature_weight: float = 5.0
    """Weight of the distance to the outputs of the original's blocks (see `gatefit.training.objective`). 0:
    predictions alone teach."""

    def __post_init__(self) -> None:
        _check(0 <= self.weight <= 1, "distillation.weight must lie in [0, 1]")
        _check(self.temperature > 0, "distillation.temperature must be positive")
        _check(self.feature_weight >= 0, "distillation.feature_weight must be 0 or more")


@dataclass(frozen=True)
class ClosingPart:
    """[closing]: how far gates close, and how. Give target or l1."""

    target: float | None = None
    """Share of the original's MACs to end at (sequential placement, gates included)."""
    l1: float | None = None
    """L1 coefficient on the saliences of an image: the price of an open unit, the paper's knob."""
    penalty: Literal["macs", "plain"] = "macs"
    """"macs": each salience weighs as its unit's MACs, with a mean weight of 1. "plain": all weigh alike, as in the
    paper."""
    gate_lr: float | None = None
    """Peak learning rate of the gates, which have no weight decay. 0: only their threshold moves. Not set: 0 for
    gates from data, the paper's 1e-5 for gates that start as the identity."""
    ramp: float | None = None
    """Part of the training in which target or price go from open to their final value; 0: they begin there. Not
    set: 0 with an original to learn from, 0.2 without."""
    min_open: float = 0.1
    """Share of a block's units that stays open on average, at least: a guard against collapse."""
    reconstruction_images: int = 4000
    """Training images for the reconstruction: before the training, the layers behind closed gates move to the least
    squares fit of the original's outputs (see `gatefit.gating.reconstruct`). 0: none. Fewer are used where memory is
    short. Only without a ramp."""
    gate_reinits: int = 4
    """How often gates from data are initialised again in the first two thirds of the training, for the network as it
    is by then (see `gatefit.gating.initialise`). Only for step gates that do not learn."""
    bn_recalibration_images: int = 10000
    """Training images, augmented as in training, for the final batch norm statistics with the hard gates. 0: none."""

    def __post_init__(self) -> None:
        _check(self.l1 is None or self.l1 >= 0, f"l1 must be 0 or more, not {self.l1}")
        _check(self.target is None or 0 < self.target < 1, f"target must lie between 0 and 1, not {self.target}")
        _check(self.l1 is None or self.target is None, "give l1 or target, not both: each sets how much is closed")
        _check(self.penalty in ("macs", "plain"), f"closing.penalty must be 'macs' or 'plain', not '{self.penalty}'")
        _check(self.gate_lr is None or self.gate_lr >= 0, "closing.gate_lr must be 0 or more")
        _check(self.ramp is None or 0 <= self.ramp <= 1, "closing.ramp must lie in [0, 1]")
        _check(0 <= self.min_open < 1, "closing.min_open must lie in [0, 1)")
        _check(self.reconstruction_images >= 0, "closing.reconstruction_images must be 0 or more")
        _check(self.gate_reinits >= 0, "closing.gate_reinits must be 0 or more")
        _check(self.bn_recalibration_images >= 0, "closing.bn_recalibration_images must be 0 or more")


@dataclass(frozen=True)
class Recipe:
    """A whole conversion."""

    seed: int = 0
    model: ModelPart = field(default_factory=ModelPart)
    data: DataPart = field(default_factory=DataPart)
    gates: GatesPart = field(default_factory=GatesPart)
    baseline: BaselinePart = field(default_factory=BaselinePart)
    finetune: FinetunePart = field(default_factory=FinetunePart)
    distillation: DistillationPart = field(default_factory=DistillationPart)
    closing: ClosingPart = field(default_factory=ClosingPart)

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**31, f"seed must lie between 0 and 2^31, not {self.seed}")


def read_recipe(file: Path) -> Recipe:
    """Read a recipe; paths in it that start with "./" or "../" are relative to it.

    Raises:
        RecipeError: no such file, not TOML, an unknown key (nearest offered), a wrong type or value.
    """
    try:
        table = tomllib.loads(file.read_text())
    except OSError as error:
        raise RecipeError(f"the recipe '{file}' cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} is not valid TOML: {error}") from error
    recipe = recipe_from(table)
    return replace(
        recipe,
        model=replace(recipe.model, name=_anchor(recipe.model.name, file), weights=_anchor(recipe.model.weights, file)),
        data=replace(recipe.data, name=_anchor(recipe.data.name, file)),
    )


def recipe_from(table: dict[str, Any]) -> Recipe:
    """Turn the tables of a recipe, as TOML gives them, into a recipe.

    Raises:
        RecipeError: an unknown key (the nearest is offered), a wrong type or value.
    """
    recipe: Recipe = _from_table(Recipe, _with_new_keys(table), "")
    return recipe


def write_recipe(recipe: Recipe) -> str:
    """Write the complete recipe as TOML, its keys explained; keys that are not set (l1 or target) are left out."""
    document = tomlkit.document()
    document.add("seed", tomlkit.item(recipe.seed))
    for part in fields(recipe):
        value = getattr(recipe, part.name)
        if not is_dataclass(value):
            continue
        table, meanings = tomlkit.table(), field_docstrings(type(value))
        for key in fields(value):
            setting = getattr(value, key.name)
            if setting is None:
                continue
            for line in textwrap.wrap(meanings.get(key.name, ""), 110):
                table.add(tomlkit.comment(line))
            table.add(key.name, tomlkit.item(setting))
        document.add(tomlkit.nl())
        document.add(part.name, table)
    return tomlkit.dumps(document)


def field_docstrings(cls: type) -> dict[str, str]:
    """Read the string that stands below each field of a dataclass: the meaning of each setting."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field_, below in itertools.pairwise(body.body):
        documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if documented and isinstance(field_, ast.AnnAssign) and isinstance(field_.target, ast.Name):
            found[field_.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return found


def _with_new_keys(table: dict[str, Any]) -> dict[str, Any]:
    """Move settings with the keys of gatefit 0.1 to their new keys, with one note."""
    notes: list[str] = []
    moved = {k: dict(v) if isinstance(v, dict) else v for k, v in table.items()}
    for old, new in RENAMED.items():
        (old_part, old_key), (part, key) = old.split("."), new.split(".")
        given = moved.get(old_part)
        if not isinstance(given, dict) or old_key not in given:
            continue
        into = moved.setdefault(part, {})
        if isinstance(into, dict):
            if key in into:
                raise RecipeError(f"recipe keys '{old}' and '{new}' are the same setting; keep '{new}'")
            into[key] = given.pop(old_key)
            notes.append(f"'{old}' is now called '{new}'")
    if notes:
        warnings.warn(f"recipe key{'s' * (len(notes) > 1)} {', '.join(notes)}", FutureWarning, stacklevel=3)
    return moved


def _anchor(path: str, file: Path) -> str:
    return str((file.parent / path).resolve()) if path.startswith(("./", "../")) else path


def _from_table(cls: Any, table: dict[str, Any], where: str) -> Any:
    known = {f.name for f in fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in table.items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(known))}"
            raise RecipeError(f"unknown recipe key '{path}'; {hint}")
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise RecipeError(f"recipe key '{path}' must be a table, [{path}]")
            values[key] = _from_table(hints[key], value, path)
        else:
            values[key] = _typed(hints[key], value, path)
    return cls(**values)


def _typed(hint: Any, value: Any, path: str) -> Any:
    if typing.get_origin(hint) is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise RecipeError(f"recipe key '{path}' must be one of {', '.join(map(repr, allowed))}, not {value!r}")
        return value
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) not in options:
        names = " or ".join(t.__name__ for t in options if t is not type(None))
        raise RecipeError(f"recipe key '{path}' must be {names}, not {value!r}")
    return value


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise RecipeError(message)


def with_settings(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Change single settings of a recipe, each written as KEY=VALUE, such as "finetune.lr=0.02".

    A value is written as in TOML; what is not TOML is taken as a string, so "gates.kinds=lc" needs no quotes. Of l1 and
    target, the one that is set replaces the other.

    Raises:
        RecipeError: a setting without "=", or an unknown key, a wrong type or value as in a file.
    """
    given: dict[str, Any] = {}
    for path, value in map(_setting, settings):
        _table_of(given, path)[path.rpartition(".")[2]] = value
    given = _with_new_keys(given)
    table = _without_none(asdict(recipe))
    closing = given.get("closing")
    if isinstance(closing, dict):
        for key, rival in _RIVALS.items():
            if key in closing:
                table["closing"].pop(rival, None)
    changed: Recipe = _from_table(Recipe, _merged(table, given), "")
    return changed


_RIVALS = {"l1": "target", "target": "l1"}


def _setting(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"a setting is written KEY=VALUE, such as finetune.lr=0.02, not '{text}'")
    try:
        read = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return path.strip(), value.strip()
    return path.strip(), read["value"] if len(read) == 1 else value


def _table_of(table: dict[str, Any], path: str) -> dict[str, Any]:
    """Find the table that a dotted key stands in; make it where there is none, for the reader to refuse."""
    for name in path.split(".")[:-1]:
        if not isinstance(table.get(name), dict):
            table[name] = {}
        table = table[name]
    return table


def _merged(table: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Put the values of `given` over those of `table`, table by table."""
    both = {k: _merged(table[k], v) for k, v in given.items() if isinstance(v, dict) and isinstance(table.get(k), dict)}
    return {**table, **given, **both}


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}
