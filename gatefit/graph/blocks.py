"""Find the residual blocks of a traced network: pure matching, from graph to frozen dataclasses."""

import operator
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from gatefit.graph.macs import layer_name, node_macs
from gatefit.graph.trace import module_of, path_of, reads_size, shape_of
from gatefit.graph.tracer import WEIGHTED

_ADDS = {operator.add, torch.add, "add"}


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a branch."""

    name: str
    """Qualified name of its module, or of its node for a functional call."""
    node: str
    """The graph node that calls it in this branch."""
    macs: int
    """Multiply-accumulates per image when it runs whole."""
    scaled: bool = False
    """Whether its work shrinks in proportion to the open units of the block's channel gate."""
    first: bool = False
    """Whether it is the branch's first layer, which runs whole in the parallel placement."""


@dataclass(frozen=True)
class Slice:
    """Where a channel unit lives in a tensor: unit u owns [u * per_unit, (u + 1) * per_unit) on `axis`."""

    tensor: str
    axis: int
    per_unit: int


@dataclass(frozen=True)
class MaskPoint:
    """A node whose value the channel salience multiplies, on `axis`, each unit `per_unit` entries wide."""

    node: str
    axis: int
    per_unit: int
    hard: bool = False
    """Behind another mask the salience counts as 0 or 1, lest it be squared."""


@dataclass(frozen=True)
class Factor:
    """A value that `product` multiplies the gated channels by and that has an entry for each, from elsewhere."""

    node: str
    product: str
    axis: int
    per_unit: int


@dataclass(frozen=True)
class Consumer:
    """The one layer that reads the masked channels, behind which what they were predicted to be may be filled in."""

    name: str
    """Qualified name of the layer."""
    node: str
    axis: int
    """Channel axis of its output."""
    channels: int


@dataclass(frozen=True)
class ChannelUnits:
    """What the channel gate of one block controls."""

    target: str
    """Name of the layer whose output channels the gate opens and closes."""
    channels: int
    units: int
    """Number of saliences: the channels, or whole groups of them where a grouped convolution reads them."""
    masks: tuple[MaskPoint, ...]
    slices: tuple[Slice, ...]
    """Everything that a closed unit makes dead."""
    scaled: frozenset[str]
    """Names of the layers whose work shrinks with the open units."""
    consumer: Consumer | None
    """None where several layers read the channels, or not as they are masked."""
    opaque: bool
    """Whether something reads the channels that has to be given the closed ones too, as zeros."""
    factors: tuple[Factor, ...]


@dataclass(frozen=True)
class ResidualBlock:
    """One residual branch: x -> branch(x), added to x or to a short projection of it.

    Example: in y = x + conv2(relu(conv1(x))) the block has the entry x, the branch conv1, relu, conv2, the output
    conv2 and the addition y. Removing conv2 would kill all three nodes and nothing else, so the branch can be skipped.
    """

    name: str
    add: str
    entry: str
    output: str
    nodes: frozenset[str]
    """The branch: all nodes that are needed for nothing but its output."""
    features: int
    """Channels of the entry, on `entry_axis`: what the gates' shared pooling returns."""
    entry_axis: int
    layers: tuple[Layer, ...]
    """The branch's layers, less those of blocks nested in it."""
    channel_units: ChannelUnits | None
    parent: str | None = None
    """Name of the block in whose branch this one lies, if any."""
    no_channel_gate: str = ""
    """Why there is no channel gate; empty where there is one."""
    channel_limit: str = ""
    """Why closed channels save no work in what reads them; empty where they do."""
    has_shortcut: bool = True
    """False: a pair of layers that follow each other (`gatefit.graph.pairs`), which takes a channel gate alone. Its
    `output` is the second layer, and its `add` a node behind it."""

    @property
    def channels(self) -> int:
        """Count the channels that the channel gate controls; 0: no channel gate."""
        return self.channel_units.channels if self.channel_units else 0

    @property
    def units(self) -> int:
        """Count the saliences of the channel gate; 0: no channel gate."""
        return self.channel_units.units if self.channel_units else 0

    @property
    def macs(self) -> int:
        """Add up the MACs per image of the whole branch, all of which the block gate skips."""
        return sum(layer.macs for layer in self.layers)


@dataclass(frozen=True)
class Skipped:
    """An addition of two tensors that is not taken for a residual block, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class FoundBlocks:
    """What `find_blocks` returns."""

    blocks: tuple[ResidualBlock, ...]
    skipped: tuple[Skipped, ...]
    macs: int
    """MACs per image of the whole network, dense."""
    parts: tuple[str, ...] = ()
    """Names of the submodules that were traced; none: the network was traced as a whole."""

    @property
    def block_share(self) -> float:
        """Compute the share of the MACs that stands in residual branches."""
        return sum(b.macs for b in self.blocks if b.has_shortcut) / max(1, self.macs)

    @property
    def channel_share(self) -> float:
        """Compute the share of the MACs that shrinks with the open channels."""
        return sum(x.macs for b in self.blocks for x in b.layers if x.scaled) / max(1, self.macs)


def match_blocks(traced: fx.GraphModule) -> FoundBlocks:
    """Match every residual branch of a traced network whose nodes carry shapes.

    The branch of `add(a, b)` is the maximum fanout-free cone of b: all that dies if b is removed, which
    is exactly what can be skipped. Channel gates are not looked for here (see `gatefit.graph.channels`).
    """
    graph = traced.graph
    facts = _Facts(
        macs={node: node_macs(traced, node) for node in graph.nodes},
        live=frozenset(_dependants(graph)),
        depthwise=frozenset(node for node in graph.nodes if _is_depthwise(module_of(traced, node))),
    )
    blocks: list[ResidualBlock] = []
    skipped: list[Skipped] = []
    taken: set[str] = set()
    for node in graph.nodes:
        if not _is_tensor_add(node):
            continue
        found = _match(node, facts)
        if isinstance(found, str):
            skipped.append(Skipped(node.name, found))
            continue
        name = _unique_name(traced, node, found.cone, facts.macs, taken)
        taken.add(name)
        blocks.append(_describe(traced, name, node, found, facts.macs))
    return FoundBlocks(_nest(blocks), tuple(skipped), sum(facts.macs.values()))


@dataclass(frozen=True)
class _Facts:
    """What matching has to know of a graph's nodes."""

    macs: dict[fx.Node, int]
    """Per image."""
    live: frozenset[fx.Node]
    """Those whose value depends on the network's input."""
    depthwise: frozenset[fx.Node]
    """Convolutions that mix no channels."""


@dataclass(frozen=True)
class _Match:
    cone: tuple[fx.Node, ...]
    entry: fx.Node
    output: fx.Node


def _is_tensor_add(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in _ADDS
        and len(node.args) == 2
        and all(isinstance(a, fx.Node) and shape_of(a) is not None for a in node.args)
    )


def _is_depthwise(module: nn.Module | None) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1


def _dependants(graph: fx.Graph) -> set[fx.Node]:
    """Find the nodes whose tensor value depends on the network's input."""
    live: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (not reads_size(node) and any(i in live for i in node.all_input_nodes)):
            live.add(node)
    return live


def _cone(output: fx.Node, only_user: fx.Node) -> list[fx.Node]:
    """Find the maximum fanout-free cone of `output`, which `only_user` reads: topologically sorted."""
    if set(output.users) != {only_user}:
        return []
    cone = {output}
    frontier = [output]
    while frontier:
        for source in frontier.pop().all_input_nodes:
            if source not in cone and source.op != "placeholder" and all(u in cone for u in source.users):
                cone.add(source)
                frontier.append(source)
    return sorted(cone)


def _match(add: fx.Node, facts: _Facts) -> _Match | str:
    """Match the residual branch of one addition, or give the reason why there is none."""
    sides = [a for a in add.args if isinstance(a, fx.Node)]
    if len(set(sides)) < 2:
        return "both sides are the same tensor"
    if not all(s in facts.live for s in sides):
        return "one side does not depend on the input (a constant or a position embedding)"
    if shape_of(sides[0]) != shape_of(sides[1]):
        return f"the two sides differ in shape, {tuple(shape_of(sides[0]) or ())} and {tuple(shape_of(sides[1]) or ())}"
    cones = [_cone(side, add) for side in sides]
    weights = [sum(facts.macs[n] for n in cone) for cone in cones]
    order = sorted((0, 1), key=lambda i: weights[i], reverse=True)
    reasons = []
    for i in order:
        result = _match_side(sides[i], sides[1 - i], cones[i], facts)
        if isinstance(result, _Match):
            return result
        reasons.append(result)
    return reasons[0]


def _match_side(output: fx.Node, shortcut: fx.Node, cone: list[fx.Node], facts: _Facts) -> _Match | str:
    if not cone:
        return f"'{output.name}' is also used elsewhere, so it cannot be skipped"
    inside = set(cone)
    work = sum(facts.macs[n] for n in cone)
    if not work:
        return f"no convolution or linear layer would be saved by skipping '{output.name}'"
    read = {s for n in cone for s in n.all_input_nodes if s not in inside}
    entries = {s for s in read if s in facts.live}  # what is split into several tensors counts too
    if len(entries) != 1:
        names = ", ".join(sorted(e.name for e in entries))
        return f"the branch ending in '{output.name}' reads {len(entries)} tensors ({names}) instead of one"
    entry = entries.pop()
    entry_shape, out_shape = shape_of(entry), shape_of(output)
    if entry_shape is None or out_shape is None or entry_shape[0] != out_shape[0] or len(entry_shape) < 2:
        return f"'{entry.name}' is not one tensor per image (its batch axis is folded with another)"
    path = _shortest_path(entry, shortcut, facts)
    if path is None:
        return f"the other side, '{shortcut.name}', does not start at '{entry.name}', the input of the branch"
    layers, projection = path
    if layers > 1:
        return f"the way from '{entry.name}' to '{shortcut.name}' has {layers} layers: no shortcut"
    if projection > work:
        return f"the projection to '{shortcut.name}' is heavier than the branch ending in '{output.name}'"
    if shortcut is not entry and _depth(cone, facts.macs) < 2:
        return f"'{output.name}' and '{shortcut.name}' are two layers side by side, not a branch and its shortcut"
    return _Match(tuple(cone), entry, output)


def _shortest_path(entry: fx.Node, end: fx.Node, facts: _Facts) -> tuple[int, int] | None:
    """Return (layers that mix channels, MACs) on the way from entry to end that has the fewest; None: no way."""
    best: dict[fx.Node, tuple[int, int]] = {end: (0, 0)}
    frontier = [end]
    while frontier:
        node = frontier.pop()
        if node is entry:
            continue
        layers, work = best[node]
        mixes = facts.macs[node] > 0 and node not in facts.depthwise
        step = (layers + mixes, work + facts.macs[node])
        if step[0] > 2:
            continue
        for source in node.all_input_nodes:
            if source in facts.live and (source not in best or step < best[source]):
                best[source] = step
                frontier.append(source)
    return best.get(entry)


def _depth(cone: list[fx.Node] | tuple[fx.Node, ...], macs: dict[fx.Node, int]) -> int:
    """Count the layers on the longest path through a cone."""
    depth: dict[fx.Node, int] = {}
    for node in cone:
        depth[node] = (macs[node] > 0) + max((depth.get(s, 0) for s in node.all_input_nodes), default=0)
    return max(depth.values())


def _unique_name(
    traced: fx.GraphModule, add: fx.Node, cone: tuple[fx.Node, ...], macs: dict[fx.Node, int], taken: set[str]
) -> str:
    """Name a block by the module in whose forward it adds; if that adds more than once, add the branch's sub-module."""
    module_path = path_of(add)
    if module_path and module_path not in taken and _adds_at(traced, module_path) == 1:
        return module_path
    first = next(n for n in cone if macs[n])
    inner = str(first.target) if first.op == "call_module" else path_of(first)
    rest = (
        inner[len(module_path) + 1 :]
        if module_path and inner.startswith(module_path + ".")
        else inner
        if not module_path
        else ""
    )
    candidate = ".".join(p for p in (module_path, rest.split(".")[0]) if p) or add.name
    name, number = candidate, 2
    while name in taken:
        name, number = f"{candidate}_{number}", number + 1
    return name


def _adds_at(traced: fx.GraphModule, module_path: str) -> int:
    return sum(_is_tensor_add(n) and path_of(n) == module_path for n in traced.graph.nodes)


def _describe(
    traced: fx.GraphModule, name: str, add: fx.Node, match: _Match, macs: dict[fx.Node, int]
) -> ResidualBlock:
    weighted = [n for n in match.cone if macs[n]]
    axis = _channel_axis(traced, match.entry, set(match.cone))
    shape = shape_of(match.entry)
    assert shape is not None
    return ResidualBlock(
        name=name,
        add=add.name,
        entry=match.entry.name,
        output=match.output.name,
        nodes=frozenset(n.name for n in match.cone),
        features=shape[axis],
        entry_axis=axis,
        layers=tuple(Layer(layer_name(n), n.name, macs[n], first=n is weighted[0]) for n in weighted),
        channel_units=None,
    )


def _channel_axis(traced: fx.GraphModule, entry: fx.Node, cone: set[fx.Node]) -> int:
    """Find the axis of the channels of the entry: as the first layer that reads it takes them.

    Layers behind a change of shape, such as a division into windows, count where none stands before: by the number
    of channels that they take.
    """
    shape = shape_of(entry)
    assert shape is not None
    alike, reshaped, seen = [entry], list[fx.Node](), {entry}
    while alike or reshaped:
        behind = not alike
        for user in (reshaped if behind else alike).pop(0).users:
            if user not in cone or user in seen:
                continue
            module = module_of(traced, user)
            if isinstance(module, nn.Linear | nn.LayerNorm):
                taken = module.in_features if isinstance(module, nn.Linear) else module.normalized_shape[-1]
                return len(shape) - 1 if not behind or shape[-1] == taken != shape[1] else 1
            if isinstance(module, WEIGHTED) and not behind:
                return 1
            seen.add(user)
            (reshaped if behind or shape_of(user) != shape else alike).append(user)
    return 1 if len(shape) > 3 else len(shape) - 1


def _nest(blocks: list[ResidualBlock]) -> tuple[ResidualBlock, ...]:
    """Give each nested block its parent, and each layer to the innermost block that has it."""
    nested = []
    for block in blocks:
        around = [b for b in blocks if block.add in b.nodes]
        parent = min(around, key=lambda b: len(b.nodes)).name if around else None
        inner = {layer.node for b in blocks if b.add in block.nodes for layer in b.layers}
        layers = tuple(layer for layer in block.layers if layer.node not in inner)
        nested.append(replace(block, parent=parent, layers=layers))
    return tuple(nested)
