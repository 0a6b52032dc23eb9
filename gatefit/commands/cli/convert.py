"""`gatefit convert`."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gatefit.commands.cli.session import SkipCorrupt, choose_device, is_main, print_json, session
from gatefit.errors import RecipeError
from gatefit.formats import model_title
from gatefit.progress import Progress
from gatefit.recipe import Recipe, read_recipe, with_settings

LOGS = "logs"
"""Folder in the output folder, for trackers that write files."""


class Gates(StrEnum):
    """Which gates to retrofit."""

    lc = "lc"
    l = "l"  # noqa: E741
    c = "c"


def convert(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Name in timm or torchvision, or file.py:function.")
    ] = "",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Fetch the weights through timm.")] = False,
    weights: Annotated[str, typer.Option(help="A .safetensors file or a torch state dict.")] = "",
    data: Annotated[str, typer.Option(help="An image folder, a tar file, 'digits', or a name that timm knows.")] = "",
    l1: Annotated[float | None, typer.Option(help="Weight of a penalty on open gates, instead of --target.")] = None,
    target: Annotated[
        float | None, typer.Option(help="Share of the original's MACs (multiply-accumulates) to end at, such as 0.5.")
    ] = None,
    gates: Annotated[
        Gates | None, typer.Option(help="Gates of blocks (l), of channels (c), or both (lc). Default: c.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the fine-tune.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML recipe. Options override it.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any setting of a recipe, such as finetune.lr=0.02. Overrides the recipe and the other options. "
            "Repeatable.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder. Default: runs/NAME.")] = None,
    log_with: Annotated[
        list[str] | None,
        typer.Option(metavar="TRACKER", help="Log the training to tensorboard, wandb or another tracker. Repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in --out.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = "",
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    skip_corrupt: SkipCorrupt = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Insert gates into a trained network and train them.

    Each image then skips the blocks and channels that it does not need. Without --data the images are Imagenette, which
    is downloaded.

    --set overrides the other options, and they override the recipe.
    """
    name = (recipe.stem if recipe else model.replace("/", "-").replace(".py:", "-")) or "model"
    folder = out or Path("runs") / name
    last: list[Progress] = []

    def position() -> str:
        return _epoch(last[-1], chosen) if last else ""

    with session(f"convert {model_title(model) or name}", folder, position) as stdout:
        if l1 is not None and target is not None:
            raise RecipeError("give --l1 or --target, not both: each sets how much is closed")
        chosen = read_recipe(recipe) if recipe else Recipe()
        chosen = replace(
            chosen,
            seed=chosen.seed if seed is None else seed,
            model=_override(
                chosen.model,
                name=_absolute(model) or None,
                pretrained=pretrained or None,
                weights=_absolute(weights) or None,
            ),
            data=_override(chosen.data, name=_absolute(data) or None, corrupt="skip" if skip_corrupt else None),
            gates=_override(chosen.gates, kinds=gates.value if gates else None),
            finetune=_override(chosen.finetune, epochs=epochs),
            closing=_override(
                chosen.closing if l1 is None and target is None else replace(chosen.closing, l1=None, target=None),
                l1=l1,
                target=target,
            ),
        )
        chosen = _with_settings(chosen, settings or [])
        choose_device(device)
        from rich.console import Console

        from gatefit.commands.convert import convert as run
        from gatefit.commands.display import TrainingBar, show_report
        from gatefit.commands.trackers import check_trackers, tracking

        trackers = log_with or []
        check_trackers(trackers)
        messages = Console(stderr=True, quiet=not is_main(), markup=False)
        with TrainingBar(messages) as bar, tracking(trackers, chosen, folder / LOGS) as track:

            def on_progress(progress: Progress) -> None:
                bar(progress)
                track(progress)
                if progress.loss is not None:
                    last[:] = [progress]

            done = run(chosen, folder, resume=resume, on_progress=on_progress)
        if not is_main():
            return
        if as_json:
            print_json(stdout, done.report)
        else:
            console = Console(file=stdout, markup=False)
            show_report(console, done.report)
            console.print(f"written: {folder}; look at {folder / 'report.html'}", soft_wrap=True)


def _epoch(progress: Progress, recipe: Recipe) -> str:
    """Tell the epoch under way of a training."""
    epochs = recipe.baseline.epochs if progress.stage == "baseline" else recipe.finetune.epochs
    return f"{progress.stage}, epoch {min(epochs, progress.step * epochs // progress.steps + 1)} of {epochs}"


def _with_settings(recipe: Recipe, settings: list[str]) -> Recipe:
    """Apply --set; paths that it names become absolute, as those of the other options."""
    changed = with_settings(recipe, settings)

    def path(before: str, after: str) -> str:
        return after if after == before else _absolute(after)

    return replace(
        changed,
        model=replace(
            changed.model,
            name=path(recipe.model.name, changed.model.name),
            weights=path(recipe.model.weights, changed.model.weights),
        ),
        data=replace(changed.data, name=path(recipe.data.name, changed.data.name)),
    )


def _absolute(value: str) -> str:
    """Make a path that exists absolute, so that the written recipe holds anywhere; leave names as they are."""
    path, colon, function = value.rpartition(".py:")
    if colon:
        return f"{Path(path + '.py').absolute()}:{function}"
    return str(Path(value).expanduser().absolute()) if value and Path(value).expanduser().exists() else value


def _override(part: Any, **values: Any) -> Any:
    return replace(part, **{k: v for k, v in values.items() if v is not None})
