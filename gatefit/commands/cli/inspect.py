"""`gatefit inspect`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gatefit.commands.cli.session import ImageSize, Json, Mean, Std, numbers, print_json, session
from gatefit.errors import ConversionError
from gatefit.formats import model_title

if TYPE_CHECKING:
    from gatefit.graph.blocks import FoundBlocks


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name in timm or torchvision, or file.py:function.")],
    image_size: ImageSize = 0,
    mean: Mean = "",
    std: Std = "",
    as_json: Json = False,
) -> None:
    """Show which blocks of a network can be gated.

    A block is an addition of a branch to a shortcut. Its gate can close the branch whole or single channels in it. The
    reason stands beside each addition that cannot be gated. A network without a block is shown as pairs of layers:
    gates can close the channels between the two.
    """
    with session(f"inspect {model_title(model)}") as stdout:
        import torch
        from rich.console import Console

        from gatefit.commands.display import show_blocks
        from gatefit.gating.insert import find_blocks, no_block_message
        from gatefit.inputs.models import build, parse_reference
        from gatefit.inputs.spec import StatedInput, network_input

        stated = StatedInput(image_size, numbers("--mean", mean), numbers("--std", std))
        network = build(parse_reference(model))
        taken = network_input(network, stated)
        typer.echo(str(taken), err=True)
        found = find_blocks(network, torch.zeros(2, *taken.spec.shape))
        if as_json:
            print_json(stdout, {"model": model, **_plain(found)})
        else:
            show_blocks(Console(file=stdout, markup=False), model, found)
        if not found.blocks:
            raise ConversionError(no_block_message(model, found))


def _plain(found: "FoundBlocks") -> dict[str, Any]:
    """Turn what matching found into values that JSON knows."""
    blocks = [
        {
            "name": b.name,
            "macs": b.macs,
            "channels": b.channels,
            "units": b.units,
            "target": b.channel_units.target if b.channel_units else None,
            "no_channel_gate": b.no_channel_gate,
            "channel_limit": b.channel_limit,
            "layers": [asdict(layer) for layer in b.layers],
        }
        for b in found.blocks
    ]
    return {"macs": found.macs, "parts": found.parts, "blocks": blocks, "skipped": [asdict(s) for s in found.skipped]}
