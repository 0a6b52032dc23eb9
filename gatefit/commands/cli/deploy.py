"""`gatefit deploy`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gatefit.commands.cli.session import Folder, SkipCorrupt, session


class Backends(StrEnum):
    """What runs a deployed network."""

    torch = "torch"
    onnx = "onnx"


class Placements(StrEnum):
    """When a gate runs."""

    sequential = "sequential"
    parallel = "parallel"


def deploy(
    folder: Folder,
    data: Annotated[str, typer.Option(help="Images to choose masks by. Default: those of the conversion.")] = "",
    backend: Annotated[Backends, typer.Option(help="A PyTorch module, or one ONNX file.")] = Backends.torch,
    masks: Annotated[
        int, typer.Option(help="Largest number of masks of a block. A mask is a set of channels that run together.")
    ] = 4,
    prune_unused: Annotated[
        bool,
        typer.Option(
            "--prune-unused", help="Remove channels that none of the images opens. Answers to others may change."
        ),
    ] = False,
    harvest: Annotated[bool, typer.Option("--harvest", hidden=True)] = False,
    batch: Annotated[int, typer.Option(help="Images at once to tune for.")] = 1,
    placement: Annotated[
        Placements, typer.Option(help="Run a gate before its block, or in parallel with the block's first layer.")
    ] = Placements.sequential,
    out: Annotated[Path | None, typer.Option(help="The ONNX file. Default: FOLDER/model.onnx.")] = None,
    skip_corrupt: SkipCorrupt = False,
) -> None:
    """Make a converted network fast: only what an image needs runs.

    Outputs stay the same but for rounding, unless --prune-unused removes channels. It is written into the folder.
    """
    with session(f"deploy {folder}") as stdout:
        if harvest:
            typer.echo("note: --harvest is now called --prune-unused", err=True)
        from rich.console import Console

        from gatefit.commands.deploy import FILE, deploy_folder
        from gatefit.commands.display import TrainingBar, show_deployment
        from gatefit.commands.opened import open_folder

        opened = open_folder(folder, data, skip_corrupt)
        prune = prune_unused or harvest
        with TrainingBar(Console(stderr=True, markup=False)) as bar:
            deployment = deploy_folder(folder, opened, backend.value, masks, prune, batch, out, placement.value, bar)
        console = Console(file=stdout, markup=False)
        show_deployment(console, deployment)
        console.print(f"written: {folder / FILE}", soft_wrap=True)
