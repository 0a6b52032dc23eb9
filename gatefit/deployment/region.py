"""Extract a block of a gated network as a variant that runs: its branch, shrunk to some channels, and the addition."""

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatefit.errors import DeployError
from gatefit.gating.gates import Gate
from gatefit.graph.activations import activation_of
from gatefit.graph.blocks import ChannelUnits
from gatefit.graph.edit import extract_subgraph
from gatefit.graph.ops import add_compensation, harden, scale
from gatefit.graph.trace import module_of

SHORTCUT = "shortcut"
INPUTS = ("entry", SHORTCUT, "whole", "channel", "closed_predictions")
"""What a variant is given: the block's input, what its branch is added to, both saliences, and what closed units were
predicted to be."""


@dataclass(frozen=True)
class Prefix:
    """What of a branch runs whole beside the gates in the parallel placement.

    That is its first layer, what that one needs, and what shapes its result channel by channel.
    """

    nodes: frozenset[fx.Node]
    output: fx.Node
    """The only one of them that the rest of the branch reads."""
    axis: int | None
    """Of its result, on which units have `per_unit` entries each; None: none of them is a unit's."""
    per_unit: int


@dataclass(frozen=True)
class Region:
    """Where a branch stands in a gated graph, or a pair of layers without a shortcut.

    The last node of a pair stands for the addition and for the branch's side of it, and its entry for the shortcut,
    which nothing reads.
    """

    gate: fx.Node
    entry: fx.Node
    add: fx.Node
    output: fx.Node
    """The branch's side of the addition."""
    shortcut: fx.Node
    """The other side."""
    relu: fx.Node | None
    """The ReLU that is all that reads the sum, if there is one."""
    nodes: frozenset[fx.Node]
    """All nodes that only the branch needs: its own, and those that apply the saliences."""
    prefix: Prefix | None
    """None: the rest of the branch reads something else too."""


def region_of(gated: fx.GraphModule, gate: Gate) -> Region:
    """Find the branch of a gate's block.

    Raises:
        DeployError: it cannot be cut out, and why.
    """
    nodes = {n.name: n for n in gated.graph.nodes}
    call = next(n for n in gated.graph.nodes if module_of(gated, n) is gate)
    region_nodes = {nodes[name] for name in gate.of.nodes if name in nodes}
    for node in gated.graph.nodes:
        if node.target in (scale, add_compensation) and node.args[0] in region_nodes:
            region_nodes.add(node)
    region_nodes |= {n for n in gated.graph.nodes if n.target is harden and set(n.users) <= region_nodes}
    if gate.of.has_shortcut:
        add = nodes[gate.of.add]
        output, shortcut = sorted(add.all_input_nodes, key=lambda n: n not in region_nodes)
    else:
        output, shortcut = max(region_nodes), call.all_input_nodes[0]
        region_nodes.remove(output)
        add = output
    if any(isinstance(module_of(gated, n), Gate) for n in region_nodes):
        raise DeployError("other blocks are nested in its branch")
    given = {call, call.args[0], *call.users}
    inside = region_nodes if gate.of.has_shortcut else region_nodes | {output}
    outside = {s for n in inside for s in n.all_input_nodes if s not in region_nodes and s not in given}
    if outside or shortcut in region_nodes:
        raise DeployError(f"its branch reads {', '.join(sorted(n.name for n in outside))} besides its input")
    assert isinstance(call.args[0], fx.Node)
    relu, whole = _relu_behind(gated, add), frozenset(region_nodes)
    return Region(call, call.args[0], add, output, shortcut, relu, whole, _prefix(gated, gate, call.args[0], whole))


def region_or_none(gated: fx.GraphModule, gate: Gate) -> Region | None:
    """Cut out the region as `region_of` does; return None where the branch cannot be cut out."""
    try:
        return region_of(gated, gate)
    except DeployError:
        return None


def _prefix(gated: fx.GraphModule, gate: Gate, entry: fx.Node, region_nodes: frozenset[fx.Node]) -> Prefix | None:
    first = next((layer for layer in gate.of.layers if layer.first), None)
    last = next((n for n in region_nodes if first is not None and n.name == first.node), None)
    if last is None:
        return None
    nodes: set[fx.Node] = set()
    needed = [last]
    while needed:
        nodes.add(node := needed.pop())
        needed += [n for n in node.all_input_nodes if n in region_nodes and n not in nodes]
    while len(last.users) == 1 and _shapes_channels(gated, user := next(iter(last.users))):
        nodes.add(last := user)
    outside = {n for node in region_nodes - nodes for n in node.all_input_nodes}
    batches = {n.meta["shape"][0] for n in (entry, last) if "shape" in n.meta}  # windows lie side by side in a batch
    if outside & ((nodes - {last}) | {entry}) or len(batches) > 1:
        return None
    assert first is not None
    if gate.channel is None or gate.of.channel_units is None or not first.scaled:
        return Prefix(frozenset(nodes), last, None, 1)
    rows = [p for p in gate.of.channel_units.slices if p.tensor == f"{first.name}.weight" and p.axis == 0]
    axis = 1 if operator.attrgetter(f"{first.name}.weight")(gated).dim() > 2 else -1  # of images; of tokens
    return Prefix(frozenset(nodes), last, axis, rows[0].per_unit) if rows else None


def _shapes_channels(gated: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether it is a batch norm or an activation."""
    return isinstance(module_of(gated, node), nn.modules.batchnorm._BatchNorm) or activation_of(gated, node) is not None


def _relu_behind(gated: fx.GraphModule, add: fx.Node) -> fx.Node | None:
    user = next(iter(add.users)) if len(add.users) == 1 else None
    return user if user is not None and activation_of(gated, user) == "relu" else None


def extract(
    gated: fx.GraphModule,
    gate: Gate,
    region: Region,
    keep: Tensor | None = None,
    block_mask: bool = True,
    channel_mask: bool = True,
    parallel: bool = False,
) -> fx.GraphModule:
    """Extract the block as a network of its own, with the units `keep` alone in its branch (int64 indices; None: all).

    In the parallel placement it is given, instead of the block's input, what `extract_prefix` made of it.

    Without `block_mask` or `channel_mask` it is for images whose saliences are all 1 for what is left of the branch.
    It takes `INPUTS` (None for what the gate does not have) and returns the sum, behind its ReLU if `region` has one.
    Its weights are copies.

    Raises:
        DeployError: it cannot be shrunk, and why.
    """
    graph = fx.Graph()
    entry, shortcut, whole, channel, closed_predictions = (graph.placeholder(name) for name in INPUTS)
    if gate.compensation is not None:
        closed_predictions = graph.call_module("compensation", (closed_predictions,))
    if keep is not None:
        channel = graph.call_function(torch.index_select, (channel, 1, graph.get_attr("keep")))
    prefix = region.prefix if parallel else None
    copied: dict[fx.Node, fx.Node] = {region.entry: entry}
    if prefix is not None:
        copied[prefix.output] = entry
        if keep is not None and prefix.axis is not None:
            units = graph.get_attr("keep_prefix")
            copied[prefix.output] = graph.call_function(torch.index_select, (entry, prefix.axis, units))
    region_nodes = region.nodes - (prefix.nodes if prefix is not None else frozenset())
    saliences = {user: int(user.args[1]) for user in region.gate.users}  # type: ignore[arg-type]
    for user, part in saliences.items():
        copied[user] = (whole, channel, closed_predictions)[part]
    is_pair = region.output is region.add
    for node in gated.graph.nodes:
        if node in region_nodes or (is_pair and node is region.output):
            whole_block = node.target is scale and saliences.get(node.all_input_nodes[1]) == 0
            if node.target is scale and not (block_mask if whole_block else channel_mask):
                copied[node] = copied[node.all_input_nodes[0]]
                continue
            copied[node] = graph.node_copy(node, copied.__getitem__)
            if keep is not None:
                _choose_factors(graph, copied, gate, node)
    total = copied[region.output]
    if not is_pair:
        total = graph.call_function(torch.add, (total, shortcut))
    graph.output(total if region.relu is None else graph.call_function(F.relu, (total,)))
    read = [str(n.target) for n in region_nodes | {region.output} if n.op in ("call_module", "get_attr")]
    pieces: dict[str, Any] = {target: copy.deepcopy(operator.attrgetter(target)(gated)) for target in read}
    if gate.compensation is not None:
        pieces["compensation"] = copy.deepcopy(gate.compensation)
    if keep is not None:
        assert gate.of.channel_units is not None
        pieces["keep"] = keep
        if prefix is not None:
            pieces["keep_prefix"] = _entries(keep, prefix.per_unit)
        pieces |= {f"keep_{f.node}": _entries(keep, f.per_unit) for f in gate.of.channel_units.factors}
    variant = fx.GraphModule(pieces, graph)
    if keep is not None:
        assert gate.of.channel_units is not None
        _shrink(variant, gate.of.channel_units, keep, set(read))
    variant.graph.eliminate_dead_code()
    variant.recompile()
    return variant.eval()


def extract_prefix(gated: fx.GraphModule, region: Region) -> fx.GraphModule:
    """Extract what runs whole in the parallel placement, from the block's input; its weights are copies."""
    prefix = region.prefix
    assert prefix is not None
    nodes = [node for node in gated.graph.nodes if node in prefix.nodes]
    return copy.deepcopy(extract_subgraph(gated, nodes, {region.entry: "entry"}, prefix.output)).eval()


def _choose_factors(graph: fx.Graph, copied: dict[fx.Node, fx.Node], gate: Gate, node: fx.Node) -> None:
    """Take the kept entries of `node`, just copied, where a variant multiplies the channels by it."""
    assert gate.of.channel_units is not None
    factor = next((f for f in gate.of.channel_units.factors if f.node == node.name), None)
    if factor is not None:
        if {u.name for u in node.users} != {factor.product}:
            raise DeployError(f"'{node.name}' is read by more than the product with its channels")
        chosen = graph.get_attr(f"keep_{factor.node}")
        copied[node] = graph.call_function(torch.index_select, (copied[node], factor.axis, chosen))


def _entries(keep: Tensor, per_unit: int) -> Tensor:
    """List the entries that units own: (units * per_unit,)."""
    return (keep[:, None] * per_unit + torch.arange(per_unit)).flatten()


@torch.no_grad()
def _shrink(root: nn.Module, units: ChannelUnits, keep: Tensor, present: set[str]) -> None:
    """Index every tensor that has a place for each unit, and tell its module; of those that are `present` in it."""
    if units.opaque:
        raise DeployError("something in it has to be given closed channels too, as zeros")
    for piece in units.slices:
        path, _, name = piece.tensor.rpartition(".")
        if not any(piece.tensor == p or piece.tensor.startswith(f"{p}.") for p in present):
            continue
        module = root.get_submodule(path)
        tensor = getattr(module, name)
        if path == units.target and getattr(module, "groups", 1) > 1:
            raise DeployError("its gated layer is grouped, so closed units would need another input")
        small = tensor.index_select(piece.axis, _entries(keep, piece.per_unit).to(tensor.device))
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, nn.Parameter(small, tensor.requires_grad))
        else:
            setattr(module, name, small)
        _tell(module, name, piece.axis, tensor, small)


def _tell(module: nn.Module, name: str, axis: int, before: Tensor, after: Tensor) -> None:
    """Set the attributes that say how wide a module is."""
    size = after.shape[axis]
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = size
    elif isinstance(module, nn.Linear) and name == "weight":
        module.out_features, module.in_features = after.shape
    elif isinstance(module, nn.Conv2d) and name == "weight":
        if module.groups == 1:
            module.out_channels, module.in_channels = after.shape[:2]
        elif axis == 0:
            groups, rest = divmod(module.groups * size, before.shape[0])
            if rest:
                raise DeployError(f"its {module.groups} groups cannot be divided among the channels that are kept")
            module.groups, module.out_channels, module.in_channels = groups, size, groups * after.shape[1]
