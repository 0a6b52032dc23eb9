"""Recipes: everything that a conversion depends on, as frozen dataclasses read from TOML."""

import difflib
import tomllib
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gatefit.errors import RecipeError

RENAMED = {
    "gates.fill": "compensation",
    "finetune.features": "feature_weight",
    "finetune.keep": "min_open",
    "finetune.precision": "mixed_precision",
    "finetune.recalibrate": "bn_recalibration_images",
    "finetune.refit": "reconstruction_images",
    "finetune.renew": "gate_reinits",
}
"""Keys of earlier versions and what they are called now. They are read, with a note."""


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
    """[gates]: what is retrofitted and how it begins."""

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
    """[finetune]: the training that closes gates."""

    epochs: int = 10
    batch_size: int = 128
    """Global: over all processes and accumulation steps."""
    accumulate: int = 1
    """Optimiser steps are taken every `accumulate` forward passes; each sees batch_size / accumulate images."""
    lr: float = 0.01
    """Peak learning rate of the backbone."""
    drop_every: int = 0
    """Epochs after which the learning rates fall to a tenth, again and again, as in the paper; 0: a cosine to zero
    after a short warm-up."""
    gate_lr: float | None = None
    """Peak learning rate of the gates, which have no weight decay; 0: they stay as they began, but for the
    threshold. Not set: 0 from data, the paper's 1e-5 from the identity."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    l1: float | None = None
    """L1 coefficient on the saliences of an image; the paper's knob."""
    target: float | None = None
    """Share of the original's MACs to end at (sequential placement, gates included)."""
    penalty: Literal["macs", "plain"] = "macs"
    """"macs": each salience weighs as its unit's MACs (mean weight 1). "plain": all alike, as in the paper."""
    reconstruction_images: int = 4000
    """Training images on which the layers behind closed gates are refitted before training (see
    `gatefit.gating.reconstruct`); 0: none. Fewer are used where they do not fit into memory. Only without a ramp."""
    gate_reinits: int = 4
    """How often step gates that do not learn are set anew from data, in the first two thirds of the training: what
    their units do for a network changes as it learns to do without some (see `gatefit.gating.initialise`)."""
    ramp: float | None = None
    """Part of the training in which target or price go from open to their final value; 0: they begin there. Not
    set: 0 with an original to keep to, 0.2 without."""
    distillation: float = 0.9
    """Weight of distillation from the original network; the labels have the rest. 1 without labels."""
    temperature: float = 4.0
    feature_weight: float = 5.0
    """Weight of the distance to the original's block outputs (see `gatefit.training.objective`); 0: predictions
    alone teach."""
    augment: bool = True
    """Random crop (padding 1/8) and horizontal flip."""
    flip: bool = True
    min_open: float = 0.1
    """Guard against collapse: at least this share of a block's units stays open on average."""
    bn_recalibration_images: int = 10000
    """Training images (augmented as in training) for the final BN statistics with the hard gates; 0: none."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    compile: bool = False
    """Train compiled (torch.compile), the baseline too: 1.6 times as fast on CIFAR's ResNets, after half a minute;
    needs a compiler."""

    def __post_init__(self) -> None:
        _check(self.epochs >= 0, "finetune.epochs must be 0 or more")
        _check(self.batch_size > 0, "finetune.batch_size must be positive")
        _check(self.accumulate > 0, "finetune.accumulate must be positive")
        _check(self.lr > 0, "finetune.lr must be positive")
        _check(self.drop_every >= 0, "finetune.drop_every must be 0 or more")
        _check(self.gate_lr is None or self.gate_lr >= 0, "finetune.gate_lr must be 0 or more")
        _check(self.l1 is None or self.l1 >= 0, f"l1 must be 0 or more, not {self.l1}")
        _check(self.target is None or 0 < self.target < 1, f"target must lie between 0 and 1, not {self.target}")
        _check(self.l1 is None or self.target is None, "give l1 or target, not both: each sets how much is closed")
        _check(self.feature_weight >= 0, "finetune.feature_weight must be 0 or more")
        _check(0 <= self.distillation <= 1, "finetune.distillation must lie in [0, 1]")
        _check(self.ramp is None or 0 <= self.ramp <= 1, "finetune.ramp must lie in [0, 1]")
        _check(self.reconstruction_images >= 0, "finetune.reconstruction_images must be 0 or more")
        _check(self.gate_reinits >= 0, "finetune.gate_reinits must be 0 or more")
        _check(0 <= self.momentum < 1, "finetune.momentum must lie in [0, 1)")
        _check(self.weight_decay >= 0, "finetune.weight_decay must be 0 or more")
        _check(self.temperature > 0, "finetune.temperature must be positive")
        _check(self.bn_recalibration_images >= 0, "finetune.bn_recalibration_images must be 0 or more")
        _check(0 <= self.min_open < 1, "finetune.min_open must lie in [0, 1)")
        _check(self.penalty in ("macs", "plain"), f"finetune.penalty must be 'macs' or 'plain', not '{self.penalty}'")
        _check(
            self.mixed_precision in ("no", "fp16", "bf16"), "finetune.mixed_precision must be 'no', 'fp16' or 'bf16'"
        )


@dataclass(frozen=True)
class Recipe:
    """A whole conversion."""

    seed: int = 0
    model: ModelPart = field(default_factory=ModelPart)
    data: DataPart = field(default_factory=DataPart)
    gates: GatesPart = field(default_factory=GatesPart)
    baseline: BaselinePart = field(default_factory=BaselinePart)
    finetune: FinetunePart = field(default_factory=FinetunePart)

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
    recipe: Recipe = _from_table(Recipe, table, "")
    return replace(
        recipe,
        model=replace(recipe.model, name=_anchor(recipe.model.name, file), weights=_anchor(recipe.model.weights, file)),
        data=replace(recipe.data, name=_anchor(recipe.data.name, file)),
    )


def write_recipe(recipe: Recipe) -> str:
    """The complete recipe as TOML; keys that are not set (l1 or target) are left out."""
    lines = [f"seed = {recipe.seed}"]
    for part in fields(recipe):
        value = getattr(recipe, part.name)
        if is_dataclass(value):
            lines += ["", f"[{part.name}]"]
            for key in fields(value):
                setting = getattr(value, key.name)
                if setting is not None:
                    lines.append(f"{key.name} = {_literal(setting)}")
    return "\n".join(lines) + "\n"


def _anchor(path: str, file: Path) -> str:
    return str((file.parent / path).resolve()) if path.startswith(("./", "../")) else path


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)


def _from_table(cls: Any, table: dict[str, Any], where: str) -> Any:
    known = {f.name for f in fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in table.items():
        path = f"{where}.{key}" if where else key
        if path in RENAMED:
            old, key = path, RENAMED[path]
            path = f"{where}.{key}"
            if key in table:
                raise RecipeError(f"recipe keys '{old}' and '{path}' are the same setting; keep '{path}'")
            warnings.warn(f"recipe key '{old}' is now called '{path}'", FutureWarning, stacklevel=2)
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
    values = dict(_setting(text) for text in settings)
    table = _without_none(asdict(recipe))
    for path in values:
        where, _, key = path.rpartition(".")
        now = RENAMED.get(path, key)
        # The old key stays for the reader to say so.
        displaced = {now if "." in now or not where else f"{where}.{now}"} if path in RENAMED else set()
        if key in _RIVALS:
            displaced |= {f"{where}.{_RIVALS[key]}"} - values.keys()
        for other in displaced:
            _table_of(table, other).pop(other.rpartition(".")[2], None)
    for path, value in values.items():
        _table_of(table, path)[path.rpartition(".")[2]] = value
    changed: Recipe = _from_table(Recipe, table, "")
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


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}
