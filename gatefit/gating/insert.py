"""Retrofit: rewrite a traced network so that every block runs under its gates."""

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from gatefit.errors import ConversionError, RecipeError, UntraceableError
from gatefit.gating.gates import PREFIX, Gate, GateForm, GateResult, forget_outputs
from gatefit.gating.info import GatedInfo, GateKinds, set_info
from gatefit.gating.verify import verify
from gatefit.graph.accept import unwrap
from gatefit.graph.blocks import FoundBlocks, ResidualBlock
from gatefit.graph.edit import insert_behind
from gatefit.graph.example import Example, first_tensor, random_like
from gatefit.graph.ops import add_compensation, harden, scale
from gatefit.graph.pairs import find_gatable
from gatefit.graph.partial import TracedPart, blocks_of, count_calls, put_part, trace_parts
from gatefit.graph.trace import trace
from gatefit.inputs.models import input_spec, recognise
from gatefit.renamed import renamed_argument


def find_blocks(model: nn.Module, example: Example | None = None) -> FoundBlocks:
    """Find every residual block of a network and what its gates would control.

    Args:
        model: a network that torch.fx can trace, or that holds submodules which it can trace; untouched.
            `nn.DataParallel` and `torch.compile` are looked into.
        example: an input, such as images (B, C, H, W); a tuple of several inputs, or a dictionary by their names. By
            default images of the size that the network's own `pretrained_cfg` (timm) names, else (2, 3, 224, 224).

    Returns:
        FoundBlocks: `.blocks`, `.skipped` (each addition refused, with the reason), `.macs` (dense, per image).

    Raises:
        ConversionError: the network cannot be traced or does not take the example.
    """
    model = unwrap(model)
    return _analyse(model, default_example(model) if example is None else example)[1]


@renamed_argument("fill", "compensation")
def retrofit(
    model: nn.Module,
    example: Example | None = None,
    gates: GateKinds = "lc",
    form: GateForm = "relu1",
    compensation: bool = False,
) -> nn.Module:
    """Return a copy of a network with a block gate and a channel gate retrofitted on each residual block.

    The copy computes the same function until the gates are trained. It keeps the original state-dict keys;
    what is new stands under `gatefit.`. `model` stays as it is. The conversion is checked before it is returned
    (see `gatefit.gating.verify`); what was checked stands in `gatefit.gating.info.info_of(gated).verification`.

    The defaults are the paper's form, which trains in any loop. `gatefit convert` makes another, gates="c",
    form="step", compensation=True: its gates are set from data, which kept more accuracy at equal MACs.

    Args:
        model: the trained network; weights, mode and hooks are left untouched. The copy is of the network inside
            `nn.DataParallel` or `torch.compile`.
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
    model = unwrap(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConversionError("the network is on the meta device and has no weights; load them before gating it")
    example = default_example(model) if example is None else example
    gated = rewrite(model, example, gates, form, compensation)
    set_info(gated, reference=recognise(model), verification=verify(model, gated, random_like(model, example)))
    return gated


def rewrite(
    model: nn.Module, example: Example, gates: GateKinds = "lc", form: GateForm = "relu1", compensation: bool = False
) -> nn.Module:
    """Retrofit without the check: for a network whose conversion was checked before."""
    if gates not in ("lc", "l", "c"):
        raise RecipeError(f"gates must be 'lc', 'l' or 'c', not {gates!r}")
    if form not in ("relu1", "step"):
        raise RecipeError(f"form must be 'relu1' or 'step', not {form!r}")
    traced, found = _analyse(model, example)
    chosen = [b for b in found.blocks if ("l" in gates and b.has_shortcut) or b.units]
    pairs = [b for b in found.blocks if not b.has_shortcut]
    if "l" in gates and len(pairs) == len(found.blocks) > 0:
        raise ConversionError(
            f"{type(model).__name__} has no residual block, so no block gate can skip anything; channel gates fit its "
            f"{len(pairs)} pairs of layers: gates 'c' (--gates c)"
        )
    if not chosen:
        raise ConversionError(no_block_message(type(model).__name__, found))
    fresh = {block.name: Gate(block, gates, form, compensation) for block in chosen}
    if isinstance(traced, fx.GraphModule):
        _insert_gates(traced, list(fresh.values()))
        gated: nn.Module = traced
    else:
        gated = copy.deepcopy(model)
        for part in traced:
            inside = [fresh[block.name] for block in part.found.blocks if block.name in fresh]
            if inside:
                _insert_gates(part.traced, inside)
                put_part(gated, part)
        gated.register_forward_pre_hook(forget_outputs)
        count_calls(gated)
    spec = replace(input_spec(model), shape=tuple(first_tensor(example).shape[1:]))
    set_info(gated, GatedInfo(gates, form, compensation, spec))
    return gated


def no_block_message(model: str, found: FoundBlocks) -> str:
    """Say in one line why a network cannot be gated."""
    if found.blocks:
        shown = "; ".join(f"{b.name}: {b.no_channel_gate}" for b in found.blocks[:3])
        more = f"; and {len(found.blocks) - 3} more" if len(found.blocks) > 3 else ""
        blocks = f"{len(found.blocks)} residual blocks ({shown}{more})"
        return f"{model} has no channels to gate in its {blocks}; gates='l' gates whole blocks"
    if not found.skipped:
        return (
            f"{model} has no residual block to gate: there is not one addition of two tensors in it, and no pair of "
            "layers whose channels can be followed from one to the other"
        )
    shown = "; ".join(f"{s.node}: {s.reason}" for s in found.skipped[:3])
    more = f"; and {len(found.skipped) - 3} more" if len(found.skipped) > 3 else ""
    return f"{model} has no residual block to gate; {len(found.skipped)} additions were refused ({shown}{more})"


def default_example(model: nn.Module, batch: int = 2) -> Tensor:
    """Make an example without data, (batch, *input size of the network), see `gatefit.inputs.models.input_spec`."""
    return torch.zeros(batch, *input_spec(model).shape, device="meta")


def _analyse(model: nn.Module, example: Example) -> tuple[fx.GraphModule | list[TracedPart], FoundBlocks]:
    """Trace a network, or where that fails the largest parts of it, and find the blocks."""
    if next(model.parameters(), None) is None:
        raise ConversionError(f"{type(model).__name__} has no parameters; pass a trained network")
    if any(name == PREFIX or name.endswith(f".{PREFIX}") for name, _ in model.named_modules()):
        raise ConversionError(f"the network has a part named '{PREFIX}' already; is it converted?")
    try:
        traced = trace(model, example)
        return traced, find_gatable(traced)
    except UntraceableError as error:
        if not isinstance(example, Tensor):
            raise  # parts are found by running batches of other sizes, which one tensor alone is enough to make
        parts = _parts(model, example, error)
        images = random_like(model, example)
    assert isinstance(images, Tensor)
    return parts, blocks_of(parts, model, images)


def _parts(model: nn.Module, example: Tensor, reason: UntraceableError) -> list[TracedPart]:
    """Trace the parts of a network that cannot be traced as a whole for that reason."""
    if any(p.is_meta for p in model.parameters()):
        raise reason  # to see what its parts are given it would have to run
    try:
        parts = trace_parts(model, example)
    except ConversionError as error:
        raise reason if "does not take" in str(reason) else ConversionError(f"{reason}; {error}") from error
    if not parts:
        raise ConversionError(f"{reason}; nor has any part of it that can be traced a residual block") from reason
    return parts


@dataclass(frozen=True)
class _GateNodes:
    """The nodes of what a gate gives; None: it has no such part. See `gatefit.gating.gates.GateResult`."""

    block: fx.Node | None
    channel: fx.Node | None
    compensation: fx.Node | None


def _insert_gates(traced: fx.GraphModule, gates: Sequence[Gate]) -> None:
    """Rewrite a traced network so that its blocks run under their gates."""
    nodes = {node.name: node for node in traced.graph.nodes}
    traced.add_module(PREFIX, nn.Module())
    inserted = [_insert_gate(traced, nodes, gate.of, gate) for gate in gates]
    for gate, parts in zip(gates, inserted, strict=True):
        _insert_compensation(traced.graph, nodes, gate.of, parts.compensation)
        _insert_masks(traced.graph, nodes, gate.of, parts.channel)
        _insert_skip(traced.graph, nodes, gate.of, parts.block)
    traced.graph.lint()
    traced.recompile()


def _insert_gate(traced: fx.GraphModule, nodes: dict[str, fx.Node], block: ResidualBlock, gate: Gate) -> _GateNodes:
    """Put a block's gate right behind the block's entry."""
    entry = nodes[block.entry]
    parameter = next(traced.parameters())
    holder = traced.get_submodule(PREFIX)
    name = block.name.replace(".", "_")
    while hasattr(holder, name):
        name += "_"
    holder.add_module(name, gate.to(parameter.device, parameter.dtype).train(traced.training))
    with traced.graph.inserting_after(entry):
        result = traced.graph.call_module(f"{PREFIX}.{name}", (entry,))
    parts: dict[str, fx.Node | None] = {}
    for index, part in enumerate(GateResult._fields):
        with traced.graph.inserting_after(result):
            there = getattr(gate, part) is not None
            parts[part] = traced.graph.call_function(operator.getitem, (result, index)) if there else None
    return _GateNodes(**parts)


def _insert_compensation(
    graph: fx.Graph, nodes: dict[str, fx.Node], block: ResidualBlock, compensation: fx.Node | None
) -> None:
    """Add the compensation to the output of the layer that reads the channels."""
    consumer = block.channel_units.consumer if block.channel_units is not None else None
    if compensation is None or consumer is None:
        return
    reader = nodes[consumer.node]
    insert_behind(graph, reader, add_compensation, (compensation, consumer.axis))


def _insert_masks(graph: fx.Graph, nodes: dict[str, fx.Node], block: ResidualBlock, channel: fx.Node | None) -> None:
    """Multiply the channels by their saliences, at each place that masks them."""
    for mask in block.channel_units.masks if channel is not None and block.channel_units is not None else ():
        masked = nodes[mask.node]
        salience, behind = channel, masked
        if mask.hard:
            with graph.inserting_after(masked):
                salience = behind = graph.call_function(harden, (channel,))
        insert_behind(graph, masked, scale, (salience, mask.axis, mask.per_unit), behind)


def _insert_skip(graph: fx.Graph, nodes: dict[str, fx.Node], block: ResidualBlock, salience: fx.Node | None) -> None:
    """Multiply the whole branch by the block's salience, right before the addition."""
    if salience is None:
        return
    add, output = nodes[block.add], nodes[block.output]
    if output not in add.all_input_nodes:  # the branch ends in the layer that is compensated
        output = next(u for u in output.users if u.target is add_compensation)
    with graph.inserting_before(add):
        scaled = graph.call_function(scale, (output, salience, 1))
    add.replace_input_with(output, scaled)
