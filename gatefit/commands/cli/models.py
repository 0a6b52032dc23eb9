"""`gatefit models`."""

from dataclasses import asdict
from typing import Annotated

import typer

from gatefit.commands.cli.session import Json, print_json, session


def models(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="Part of a name, or a shell pattern such as 'resnet*d'.")
    ] = "",
    as_json: Json = False,
) -> None:
    """List which networks of timm and torchvision can be gated.

    Each line also tells how much of the network's MACs (multiply-accumulates) gates reach.
    """
    with session("models") as stdout:
        from rich.console import Console
        from rich.progress import track

        from gatefit.commands.coverage import cover
        from gatefit.commands.display import show_coverage
        from gatefit.inputs.models import names_like

        names = names_like(pattern)
        messages = Console(stderr=True)
        found = [cover(n) for n in track(names, "matching", console=messages, transient=True)]
        if as_json:
            print_json(stdout, [asdict(c) for c in found])
        else:
            show_coverage(Console(file=stdout, markup=False), found)
