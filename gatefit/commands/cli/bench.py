"""`gatefit bench`."""

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gatefit.commands.cli.session import (
    LARGEST_BATCH,
    ImageSize,
    Json,
    Mean,
    Std,
    TrustCode,
    numbers,
    print_json,
    session,
)
from gatefit.errors import GatefitError
from gatefit.formats import model_title


def bench(
    network: Annotated[
        str, typer.Argument(metavar="NETWORK", help="A folder that gatefit convert wrote, or with --what-if a model.")
    ],
    data: Annotated[str, typer.Option(help="Images to run. Default: those of the conversion.")] = "",
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between.")] = "1,8",
    what_if: Annotated[
        float | None, typer.Option(help="Share of the MACs that random gates leave. 1: gates that close nothing.")
    ] = None,
    image_size: ImageSize = 0,
    mean: Mean = "",
    std: Std = "",
    threads: Annotated[int, typer.Option(help="CPU threads. 0: as many as torch takes.")] = 0,
    rounds: Annotated[int, typer.Option(help="Rounds. Each runs every engine once.")] = 60,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Time a network with gates beside the original's fastest forms.

    The network is deployed anew for each batch size, in PyTorch and in ONNX Runtime. What `gatefit deploy` chose is
    not read. All forms run in turns.
    """
    with session(f"bench {model_title(network)}") as stdout:
        sizes = _sizes(batch)
        from rich.console import Console

        from gatefit.commands.bench import run_bench
        from gatefit.commands.display import show_bench
        from gatefit.commands.report.result import BENCH
        from gatefit.files import write_json
        from gatefit.inputs.spec import StatedInput

        stated = StatedInput(image_size, numbers("--mean", mean), numbers("--std", std))
        say = functools.partial(typer.echo, err=True)
        timings, rows = run_bench(network, data, sizes, what_if, threads, rounds, stated, say, trust_code)
        measured = {"rows": [asdict(r) for r in rows], "engines": [asdict(t) for t in timings]}
        if as_json:
            print_json(stdout, measured)
        else:
            show_bench(Console(file=stdout, markup=False), timings, rows)
        if Path(network).is_dir():  # for the report
            try:
                write_json(Path(network) / BENCH, measured)
            except GatefitError as error:
                Console(stderr=True, markup=False).print(f"note: not kept for the report: {error}", soft_wrap=True)


def _sizes(text: str) -> list[int]:
    """Read the values of --batch."""
    sizes = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not 1 <= min(sizes) <= max(sizes) <= LARGEST_BATCH:
        raise GatefitError(f"--batch must be sizes from 1 to {LARGEST_BATCH} with commas between, not '{text}'")
    return sizes
