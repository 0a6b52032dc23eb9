"""`gatefit bench`."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gatefit.commands.cli.session import Json, print_json, session
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
    threads: Annotated[int, typer.Option(help="CPU threads. 0: as many as torch takes.")] = 0,
    rounds: Annotated[int, typer.Option(help="Rounds. Each runs every engine once.")] = 60,
    as_json: Json = False,
) -> None:
    """Time a network with gates beside the original's fastest forms.

    The network is deployed anew for each batch size, in PyTorch and in ONNX Runtime. What `gatefit deploy` chose is
    not read. All forms run in turns.
    """
    with session(f"bench {model_title(network)}") as stdout:
        sizes = [int(b) if re.fullmatch(r"\s*[0-9]{1,9}\s*", b) else 0 for b in batch.split(",")]
        if not all(sizes):
            raise GatefitError(f"--batch must be sizes with commas between, such as 1,8, not '{batch}'")
        from rich.console import Console

        from gatefit.commands.bench import run_bench
        from gatefit.commands.display import TrainingBar, show_bench
        from gatefit.commands.report.result import BENCH
        from gatefit.files import write_json

        with TrainingBar(Console(stderr=True, markup=False)) as bar:
            timings, rows = run_bench(network, data, sizes, what_if, threads, rounds, bar)
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
