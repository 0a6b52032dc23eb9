"""`gatefit report`."""

from pathlib import Path
from typing import Annotated

import typer

from gatefit.commands.cli.session import Data, Device, SkipCorrupt, TrustCode, choose_device, say_input, session


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDERS",
            help="Folders that gatefit convert wrote. The report is the first one's; others are compared.",
        ),
    ],
    data: Data = "",
    block: Annotated[
        str, typer.Option(help="The block whose channels are shown. Default: the one that varies most.")
    ] = "",
    device: Device = "",
    skip_corrupt: SkipCorrupt = False,
    trust_code: TrustCode = False,
) -> None:
    """Write a page with pictures, report.html, into a folder.

    With several folders the page goes into the first, and compares its figures with the others'.
    """
    with session(f"report {folders[0]}") as stdout:
        choose_device(device)
        from rich.console import Console

        from gatefit.commands.opened import report_folders

        say_input(folders[0])
        page = report_folders(folders, data, skip_corrupt, block, trust_code)
        Console(file=stdout, markup=False).print(f"written: {page}", soft_wrap=True)
