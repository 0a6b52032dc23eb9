"""Folders that `gatefit convert` wrote: opened, evaluated, reported."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import fx, nn

from gatefit.commands.figures import figures
from gatefit.commands.report.result import read_result
from gatefit.errors import DataError, RecipeError
from gatefit.folder import read_config
from gatefit.formats import data_title, model_title
from gatefit.gating.checkpoint import load
from gatefit.gating.gates import gates_of
from gatefit.gating.info import info_of
from gatefit.gating.original import load_original, read_spec
from gatefit.inputs.data import Splits, read_data
from gatefit.inputs.spec import FOLDER, NetworkInput
from gatefit.recipe import RECIPE, Recipe, read_recipe
from gatefit.training.evaluate import Evaluation, evaluate


@dataclass(frozen=True)
class Opened:
    """A folder that `convert` wrote."""

    name: str
    """Of the model."""
    gated: fx.GraphModule
    original: nn.Module | None
    data: Splits
    trained: bool
    """Whether the original had learnt anything; without weights or a baseline it had not."""

    @property
    def teacher(self) -> nn.Module | None:
        """Give the original, if there is anything to compare with it."""
        return self.original if self.trained else None


def input_of(folder: Path) -> NetworkInput:
    """Read what the network of a folder takes.

    Raises:
        GatefitError: the folder cannot be read.
    """
    return NetworkInput(read_spec(read_config(folder), folder), FOLDER, FOLDER, FOLDER)


def open_folder(folder: Path, data: str = "", skip_corrupt: bool = False, trust_code: bool = False) -> Opened:
    """Read a folder that `convert` wrote, with its own data or others.

    Args:
        folder: see `docs/folder.md`.
        data: other images than its own.
        skip_corrupt: whether images that cannot be read are left out.
        trust_code: see `gatefit.load`.

    Raises:
        GatefitError: the folder or the data cannot be read.
    """
    gated = load(folder, trust_code=trust_code)
    recipe = read_recipe(folder / RECIPE) if (folder / RECIPE).is_file() else Recipe()
    if not data and not (folder / RECIPE).is_file():
        raise DataError(f"{folder} does not say what data it was made with; pass --data")
    corrupt = "skip" if skip_corrupt else recipe.data.corrupt
    limit = 0 if data else recipe.data.limit
    splits = read_data(data or recipe.data.name, info_of(gated).input, corrupt, recipe.seed, limit)
    trained = recipe.model.starts_trained or recipe.baseline.epochs > 0
    reference = info_of(gated).reference
    return Opened(
        model_title(reference.name) if reference else "", gated, load_original(folder, trust_code), splits, trained
    )


def evaluate_folder(
    folder: Path, data: str = "", skip_corrupt: bool = False, trust_code: bool = False
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate a folder that `convert` wrote, on its own data or others.

    Raises:
        GatefitError: the folder or the data cannot be read.
    """
    opened = open_folder(folder, data, skip_corrupt, trust_code)
    opened.gated.to(Accelerator().device)
    evaluation = evaluate(opened.gated, opened.data, opened.teacher)
    return evaluation, {"model": opened.name, **figures(evaluation)}


def report_folders(
    folders: list[Path], data: str = "", skip_corrupt: bool = False, block: str = "", trust_code: bool = False
) -> Path:
    """Write the page of the first folder, compared with the others; see `gatefit.commands.report.write.write_report`.

    Raises:
        GatefitError: a folder or the data cannot be read, or there is no such block.
    """
    # matplotlib takes half a second: it is imported only where something is drawn
    from gatefit.commands.report.write import write_report

    result, *others = (read_result(folder) for folder in folders)
    opened = open_folder(folders[0], data, skip_corrupt, trust_code)
    known = [name for name, gate in gates_of(opened.gated).items() if gate.channel is not None]
    if block and block not in known:
        raise RecipeError(f"no block '{block}' with a channel gate; there are {', '.join(known) or 'none'}")
    opened.gated.to(Accelerator().device)
    evaluation = evaluate(opened.gated, opened.data, opened.teacher)
    if data:
        result = replace(result, report={**result.report, **figures(evaluation), "data": data_title(data)})
    return write_report(folders[0], result, others, evaluation, opened.data.test, block)
