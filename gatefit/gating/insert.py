"""Retrofit: rewrite a traced network so that every block runs under its gates."""

import operator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from gatefit.errors import ConversionError, RecipeError
from gatefit.gating.gates import PREFIX, Gate, GateForm
from gatefit.gating.verify import verify
from gatefit.graph.blocks import FoundBlocks, ResidualBlock, match_blocks
from gatefit.graph.channels import with_channel_units
from gatefit.graph.ops import add_compensation, harden, scale
from gatefit.graph.trace import trace
from gatefit.inputs.models import input_spec, recognise

GateKinds = Literal["lc", "l", "c"]


def find_blocks(model: nn.Module, example: Tensor | None = None) -> FoundBlocks:
    """Find every residual block of a network and what its gates would control.

    Args:
        model: a network that torch.fx can trace; untouched.
        example: an input (B, C, H, W). By default of the size that the network's own
            `pretrained_cfg` (timm) names, else (2, 3, 224, 224).

    Returns:
        FoundBlocks: `.blocks`, `.skipped` (each addition refused, with the reason), `.macs` (dense, per image).

    Raises:
        ConversionError: the network cannot be traced or does not take the example.
    """
    return _find(model, default_example(model) if example is None else example)[1]


def retrofit(
    model: nn.Module,
    example: Tensor | None = None,
    gates: GateKinds = "lc",
    form: GateForm = "relu1",
    compensation: bool = False,
) -> fx.GraphModule:
    """Return a copy of a network with a block gate and a channel gate retrofitted on each residual block.

    The copy computes the same function until the gates are trained. It keeps the original state-dict keys;
    what is new stands under `gatefit.`. `model` stays as it is. The conversion is checked before it is returned
    (see `gatefit.gating.verify`); what was checked stands in `.meta["verification"]`.

    Args:
        model: the trained network; weights, mode and hooks are left untouched.
        example: see `find_blocks`; the result takes other batch and image sizes too.
        gates: "lc" (both), "l" (block gates alone) or "c" (channel gates alone).
        form: form of the saliences, see `gatefit.gating.gates.GateForm`.
        compensation: let closed channels leave behind what they were predicted to be, see `gatefit.gating.gates.Gate`.

    Raises:
        ConversionError: no block can be gated (the additions that were looked at are named), the network cannot
            be traced, or the conversion failed its check.
        RecipeError: `gates` or `form` is none of the above.

    Source: arXiv 2007.15151, joint form: both gates in parallel to the block on one shared pooling.
    """
    example = default_example(model) if example is None else example
    gated = rewrite(model, example, gates, form, compensation)
    gated.meta["reference"] = recognise(model)
    gated.meta["verification"] = verify(model, gated, _random_like(model, example))
    return gated


def rewrite(
    model: nn.Module, example: Tensor, gates: GateKinds = "lc", form: GateForm = "relu1", compensation: bool = False
) -> fx.GraphModule:
    """`retrofit` without the check: for a network whose conversion was checked before."""
    if gates not in ("lc", "l", "c"):
        raise RecipeError(f"gates must be 'lc', 'l' or 'c', not {gates!r}")
    if form not in ("relu1", "step"):
        raise RecipeError(f"form must be 'relu1' or 'step', not {form!r}")
    traced, found = _find(model, example)
    chosen = [b for b in found.blocks if "l" in gates or b.units]
    if not chosen:
        raise ConversionError(no_block_message(type(model).__name__, found))
    nodes = {node.name: node for node in traced.graph.nodes}
    traced.add_module(PREFIX, nn.Module())
    saliences = [_insert_gate(traced, nodes, block, Gate(block, gates, form, compensation)) for block in chosen]
    for block, parts in zip(chosen, saliences, strict=True):
        _insert_scales(traced.graph, nodes, block, *parts)
    traced.graph.lint()
    traced.recompile()
    traced.meta["gates"] = gates
    traced.meta["compensation"] = compensation
    traced.meta["input"] = replace(input_spec(model), shape=_image_shape(example))
    return traced


def no_block_message(model: str, found: FoundBlocks) -> str:
    """One line that says why a network cannot be gated."""
    if not found.skipped:
        return f"{model} has no residual block to gate: there is not one addition of two tensors in it"
    shown = "; ".join(f"{s.node}: {s.reason}" for s in found.skipped[:3])
    more = f"; and {len(found.skipped) - 3} more" if len(found.skipped) > 3 else ""
    return f"{model} has no residual block to gate; {len(found.skipped)} additions were refused ({shown}{more})"


def default_example(model: nn.Module, batch: int = 2) -> Tensor:
    """An example without data, (batch, *input size of the network), see `gatefit.inputs.models.input_spec`."""
    return torch.zeros(batch, *input_spec(model).shape, device="meta")


def _image_shape(example: Tensor) -> tuple[int, int, int]:
    if example.dim() != 4:
        raise ConversionError(f"the example must be a batch of images (B, C, H, W), not {tuple(example.shape)}")
    channels, height, width = example.shape[1:]
    return channels, height, width


def _random_like(model: nn.Module, example: Tensor) -> Tensor:
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, *example.shape[1:], generator=generator)
    return image.to(parameter.device, parameter.dtype)


def _find(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, FoundBlocks]:
    if next(model.parameters(), None) is None:
        raise ConversionError(f"{type(model).__name__} has no parameters; pass a trained network")
    if hasattr(model, PREFIX):
        raise ConversionError(f"the network has a part named '{PREFIX}' already; is it converted?")
    traced = trace(model, example)
    return traced, with_channel_units(traced, match_blocks(traced))


def _insert_gate(
    traced: fx.GraphModule, nodes: dict[str, fx.Node], block: ResidualBlock, gate: Gate
) -> tuple[fx.Node | None, fx.Node | None, fx.Node | None]:
    """Put a block's gate right behind the block's entry; return what it gives (block, channel, fill)."""
    entry = nodes[block.entry]
    parameter = next(traced.parameters())
    holder = traced.get_submodule(PREFIX)
    name = block.name.replace(".", "_")
    while hasattr(holder, name):
        name += "_"
    holder.add_module(name, gate.to(parameter.device, parameter.dtype).train(traced.training))
    with traced.graph.inserting_after(entry):
        given = traced.graph.call_module(f"{PREFIX}.{name}", (entry,))
    parts = []
    for i, fc in enumerate((gate.block, gate.channel, gate.compensation)):
        with traced.graph.inserting_after(given):
            parts.append(None if fc is None else traced.graph.call_function(operator.getitem, (given, i)))
    return parts[0], parts[1], parts[2]


def _insert_scales(
    graph: fx.Graph,
    nodes: dict[str, fx.Node],
    block: ResidualBlock,
    whole: fx.Node | None,
    channel: fx.Node | None,
    compensation: fx.Node | None,
) -> None:
    """Multiply by the saliences: the channels at their masks, the whole branch before the add; and fill."""
    if compensation is not None and block.channel_units is not None and block.channel_units.consumer is not None:
        reader = nodes[block.channel_units.consumer.node]
        with graph.inserting_after(reader):
            compensated = graph.call_function(
                add_compensation, (reader, compensation, block.channel_units.consumer.axis)
            )
        reader.replace_all_uses_with(compensated, delete_user_cb=lambda user: user is not compensated)
    for mask in block.channel_units.masks if channel is not None and block.channel_units is not None else ():
        masked = nodes[mask.node]
        with graph.inserting_after(masked):
            salience = graph.call_function(harden, (channel,)) if mask.hard else channel
        with graph.inserting_after(salience if mask.hard else masked):
            scaled = graph.call_function(scale, (masked, salience, mask.axis, mask.per_unit))
        masked.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)  # noqa: B023
    if whole is not None:
        add = nodes[block.add]
        current = nodes[block.output]
        if current not in add.all_input_nodes:  # the branch ends in the layer that is filled
            current = next(u for u in current.users if u.target is add_compensation)
        with graph.inserting_before(add):
            scaled = graph.call_function(scale, (current, whole, 1))
        add.replace_input_with(current, scaled)
