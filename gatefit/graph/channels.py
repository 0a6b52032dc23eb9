"""Where a block's channel salience has to multiply, and what a closed channel makes removable.

Zero salience has to make a channel dead in everything that reads it. So the walk starts at a layer's
output, follows the channel through all that treats channels one by one, and stops at the layers that mix
them (the consumers). The mask stands at the earliest point after which zero stays zero up to every consumer;
where there is no such point, a mask stands before every consumer that zero does not reach otherwise.
"""

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import fx, nn

from gatefit.graph.blocks import ChannelUnits, Consumer, Factor, FoundBlocks, MaskPoint, ResidualBlock, Slice
from gatefit.graph.macs import layer_name
from gatefit.graph.trace import call_counts, module_of, reads_size, shape_of
from gatefit.graph.tracer import WEIGHTED

_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_ZERO_KEEPING = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Tanh,
    nn.Softsign, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Identity, nn.modules.dropout._DropoutNd,
)  # fmt: skip
_ZERO_LOSING = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid)
_POOLS = (
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
_ZERO_KEEPING_CALLS = {
    F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.leaky_relu, F.elu, F.mish, F.tanh, torch.relu, torch.tanh,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, "relu", "contiguous", "tanh",
}  # fmt: skip
_ZERO_LOSING_CALLS = {F.sigmoid, F.hardsigmoid, F.softplus, torch.sigmoid, "sigmoid"}
_PRODUCTS = {operator.mul, torch.mul, "mul"}


class NoChannelGate(Exception):
    """Why the walk from one layer ended."""


@dataclass
class _Walk:
    """What the walk has found so far: aligned nodes with (axis, entries per channel of the target)."""

    traced: fx.GraphModule
    calls: Counter[str]
    """See `gatefit.graph.trace.call_counts`."""
    cone: set[str]
    channels: int
    units: int
    aligned: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    keeps_zero: dict[tuple[fx.Node, fx.Node], bool] = field(default_factory=dict)
    consumers: set[tuple[fx.Node, fx.Node]] = field(default_factory=set)
    opaque: set[tuple[fx.Node, fx.Node]] = field(default_factory=set)
    """The consumers that are not understood: they are given zeros, and nothing of theirs is saved."""
    lenient: bool = False
    """Whether opaque consumers are allowed."""
    slices: list[tuple[str, int, int]] = field(default_factory=list)
    """(tensor, axis, size on that axis)."""
    scaled: set[str] = field(default_factory=set)


def with_channel_units(traced: fx.GraphModule, found: FoundBlocks) -> FoundBlocks:
    """Return `found` with the channel units of every block that can take a channel gate."""
    calls = call_counts(traced)
    return replace(found, blocks=tuple(_with_units(traced, calls, block) for block in found.blocks))


def _with_units(traced: fx.GraphModule, calls: Counter[str], block: ResidualBlock) -> ResidualBlock:
    """Try each layer as the gated one. Return the block with the first that saves half the MACs of the best candidate.

    If the channels of a convolution cannot be traced to all readers, save only its own output rows.

    Example: in conv1 (3x3, 16 to 32 channels) -> relu -> conv2 (3x3, 32 to 16 channels), closing a channel of conv1
    also saves a column of conv2. So conv1 is the gated layer, with 32 units. Their mask stands behind the ReLU, which
    keeps 0 at 0, and conv2 is their consumer.
    """
    macs = {layer.name: layer.macs for layer in block.layers}
    reasons: list[str] = []
    found: list[tuple[int, ChannelUnits, str]] = []
    entry = next(n for n in traced.graph.nodes if n.name == block.entry)
    behind = {block.entry}  # what is computed from weights alone is the same for all images
    for node in traced.graph.nodes:
        if node.name in block.nodes and any(s.name in behind for s in node.all_input_nodes):
            behind.add(node.name)
    for node in (n for n in traced.graph.nodes if n.name in block.nodes & behind and layer_name(n) in macs):
        module = module_of(traced, node)
        if not isinstance(module, WEIGHTED):
            continue
        limit = ""
        for lenient in (False, True) if isinstance(module, nn.modules.conv._ConvNd) else (False,):
            try:
                units = units_from(traced, calls, block.nodes, entry, node, module, lenient)
            except NoChannelGate as stop:
                if not lenient:
                    limit = str(stop)
                    reasons.append(f"{layer_name(node)}: {stop}")
                continue
            saved = sum(macs.get(name, 0) for name in units.scaled)  # those of a nested block count there
            found.append((saved, units, limit))
            break
    if not found:
        return replace(block, no_channel_gate="; ".join(reasons) or "no convolution or linear layer of its own")
    most = max(saved for saved, _, _ in found)
    units, limit = next((units, limit) for saved, units, limit in found if 2 * saved >= most)
    layers = tuple(replace(layer, scaled=layer.name in units.scaled) for layer in block.layers)
    return replace(block, channel_units=units, layers=layers, channel_limit=limit)


def units_from(
    traced: fx.GraphModule,
    calls: Counter[str],
    cone: frozenset[str],
    entry: fx.Node,
    start: fx.Node,
    module: nn.Module,
    lenient: bool,
) -> ChannelUnits:
    """Trace the outputs of layer `start` to all their readers as channel units.

    Args:
        traced: the network.
        calls: how often each layer's weights are used, see `call_counts`.
        cone: names of the nodes among which all readers have to be.
        entry: what the gate reads: its batch is that of the images.
        start: calls the layer.
        module: the layer.
        lenient: whether readers that are not understood may be given zeros.

    Raises:
        NoChannelGate: the channels cannot be followed, and why.
    """
    _check_called_once(calls, start)
    _check_plain(module)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        raise NoChannelGate("transposed convolution")
    axis, channels = _output_channels(start, module)
    _check_batch(start, entry)
    walk = _Walk(traced, calls, set(cone), channels, channels, lenient=lenient)
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        walk.units = gcd(channels, module.groups)
    _claim_rows(walk, start, module, channels)
    walk.aligned[start] = (axis, 1)
    walk.scaled.add(layer_name(start))
    frontier = [start]
    while frontier:
        node = frontier.pop(0)
        for user in node.users:
            if reads_size(user):
                continue
            if user.name not in walk.cone:
                raise NoChannelGate("its channels are the branch's own output")
            if _step(walk, node, user) and user not in frontier:
                frontier.append(user)
    if not walk.consumers:
        raise NoChannelGate("nothing reads its channels")
    if not walk.units > 1:
        raise NoChannelGate("only one unit")
    masks = sorted(_mask_nodes(walk, start))
    again = _behind(walk, masks)
    widths = {node: walk.aligned[node] for node in masks}
    return ChannelUnits(
        target=layer_name(start),
        channels=channels,
        units=walk.units,
        masks=tuple(
            MaskPoint(n.name, axis, wide * channels // walk.units, hard=n in again)
            for n, (axis, wide) in widths.items()
        ),
        slices=tuple(Slice(tensor, axis, size // walk.units) for tensor, axis, size in walk.slices),
        scaled=frozenset(walk.scaled),
        consumer=_only_consumer(walk, set(masks)),
        opaque=any(
            pair in walk.opaque or not isinstance(module_of(traced, pair[1]), WEIGHTED) for pair in walk.consumers
        ),
        factors=tuple(_factors(walk)),
    )


def _check_called_once(calls: Counter[str], node: fx.Node) -> None:
    if calls[str(node.target)] > 1:
        raise NoChannelGate(f"the weights of '{node.target}' are used more than once")


def _check_batch(node: fx.Node, before: fx.Node) -> None:
    """Refuse channels that are not those of one image, such as those of a window: gates decide for each image."""
    shape, expected = shape_of(node), shape_of(before)
    if shape is None or expected is None or shape[0] != expected[0]:
        raise NoChannelGate(f"the batch axis of '{node.name}' is folded with another, as of windows")


def _check_plain(module: nn.Module) -> None:
    if "weight" not in module._parameters:
        raise NoChannelGate("its weight is computed (weight or spectral normalisation)")


def _check_columns(node: fx.Node, module: nn.Module) -> None:
    if isinstance(module, _STANDARDISED):
        raise NoChannelGate(f"the weights of '{node.name}' are standardised over all that it reads")


def _output_channels(node: fx.Node, module: nn.Module) -> tuple[int, int]:
    shape = shape_of(node)
    if shape is None:
        raise NoChannelGate("its output shape is unknown")
    axis = len(shape) - 1 if isinstance(module, nn.Linear) else 1
    return axis, shape[axis]


def _step(walk: _Walk, node: fx.Node, user: fx.Node) -> bool:
    """Go from an aligned node to one reader of it; whether to walk on from there."""
    before = (walk.units, list(walk.slices), set(walk.scaled))
    try:
        return _follow(walk, node, user)
    except NoChannelGate:
        if not walk.lenient or user in walk.aligned:
            raise
        walk.units, walk.slices, walk.scaled = before
        walk.consumers.add((node, user))
        walk.opaque.add((node, user))
        return False


def _follow(walk: _Walk, node: fx.Node, user: fx.Node) -> bool:
    """Step as `_step` does, without tolerance."""
    axis, wide = walk.aligned[node]
    module = module_of(walk.traced, user)
    keeps: bool | None
    if module is not None and next(module.parameters(), None) is not None:
        _check_called_once(walk.calls, user)
    if isinstance(module, WEIGHTED):
        _check_plain(module)
        _check_columns(user, module)
        passed = _through_layer(walk, node, user, module)
        if passed is None:
            walk.consumers.add((node, user))
            return False
        keeps, wide = passed
    elif isinstance(module, _BATCH_NORM):
        _claim_norm(walk, user, module, axis)
        keeps = False
    elif isinstance(module, GlobalResponseNorm):
        walk.consumers.add((node, user))  # it adds up all channels, so it has to be given zeros
        walk.slices += [(f"{user.target}.{name}", 0, walk.channels * wide) for name in ("weight", "bias")]
        keeps = False
    elif isinstance(module, _POOLS):
        keeps = True
    elif module is not None:
        keeps = _keeps_zero(module)
    elif user.target in _PRODUCTS or user.target in _ZERO_KEEPING_CALLS:
        keeps = True
    elif user.target in _ZERO_LOSING_CALLS:
        keeps = False
    elif user.target in ("mean", torch.mean) and _spatial_mean(user):
        keeps = True
    else:
        keeps = None
    if keeps is None:
        what = type(module).__name__ if module is not None else getattr(user.target, "__name__", user.target)
        raise NoChannelGate(f"its channels reach '{user.name}' ({what}), which may mix them")
    shape, before = shape_of(user), shape_of(node)
    if shape is None or before is None or len(shape) != len(before) or shape[axis] != walk.channels * wide:
        raise NoChannelGate(f"'{user.name}' moves its channels")
    _check_batch(user, node)
    walk.keeps_zero[node, user] = keeps
    fresh = user not in walk.aligned
    if not fresh and walk.aligned[user] != (axis, wide):
        raise NoChannelGate(f"'{user.name}' joins channels of different kinds")
    walk.aligned[user] = (axis, wide)
    return fresh


def _through_layer(walk: _Walk, node: fx.Node, user: fx.Node, module: nn.Module) -> tuple[bool, int] | None:
    """Return None: the layer mixes channels and consumes them. Else (keeps zero, width) of a grouped convolution."""
    axis, wide = walk.aligned[node]
    size = walk.channels * wide
    walk.scaled.add(layer_name(user))
    if isinstance(module, nn.Linear):
        if axis != len(shape_of(node) or ()) - 1:
            raise NoChannelGate(f"'{user.name}' mixes positions, not channels")
        walk.slices.append((f"{user.target}.weight", 1, size))
        return None
    assert isinstance(module, nn.modules.conv._ConvNd)
    if axis != 1 or isinstance(module, nn.modules.conv._ConvTransposeNd):
        raise NoChannelGate(f"'{user.name}' does not read its channels on axis 1")
    if module.groups == 1:
        walk.slices.append((f"{user.target}.weight", 1, size))
        return None
    if module.out_channels % walk.channels:
        raise NoChannelGate(f"'{user.name}' has groups that do not fit its channels")
    walk.units = gcd(walk.units, module.groups)
    _claim_rows(walk, user, module, module.out_channels)
    return module.bias is None, module.out_channels // walk.channels


def _claim_rows(walk: _Walk, node: fx.Node, module: nn.Module, size: int) -> None:
    walk.slices.append((f"{node.target}.weight", 0, size))
    if module.bias is not None:
        walk.slices.append((f"{node.target}.bias", 0, size))


def _claim_norm(walk: _Walk, node: fx.Node, module: nn.Module, axis: int) -> None:
    if axis != 1:
        raise NoChannelGate(f"'{node.name}' normalises another axis")
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, name, None)
        if tensor is not None:
            walk.slices.append((f"{node.target}.{name}", 0, tensor.shape[0]))


def _keeps_zero(module: nn.Module) -> bool | None:
    """Tell whether a module that works element by element maps 0 to 0; None if it may not be one."""
    if isinstance(module, _ZERO_LOSING):
        return False
    if isinstance(module, _ZERO_KEEPING):
        return True
    if type(module).__name__ in ("DropPath", "StochasticDepth"):
        return True
    if type(module).__module__.startswith("timm.layers.activations") and not list(module.parameters()):
        return bool(module(torch.zeros(1)) == 0)
    return None


def _spatial_mean(node: fx.Node) -> bool:
    """Tell whether a mean is over all positions of (B, C, ...), and keeps its axes."""
    shape = shape_of(node)
    dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    keepdim = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    if not keepdim or shape is None or not isinstance(dims, int | tuple | list):
        return False
    axes = sorted(d % len(shape) for d in ([dims] if isinstance(dims, int) else dims))
    return axes == list(range(2, len(shape)))


def _only_consumer(walk: _Walk, masked: set[fx.Node]) -> Consumer | None:
    if len(walk.consumers) != 1 or len(masked) != 1:
        return None
    ((source, user),) = walk.consumers
    module = module_of(walk.traced, user)
    if source not in masked or not isinstance(module, WEIGHTED) or (source, user) in walk.opaque:
        return None
    axis, channels = _output_channels(user, module)
    return Consumer(layer_name(user), user.name, axis, channels)


def _factors(walk: _Walk) -> Iterator[Factor]:
    """Find what the channels are multiplied by, such as the weights of a squeeze-and-excitation."""
    for node, (axis, wide) in sorted(walk.aligned.items()):
        for source in node.all_input_nodes if node.target in _PRODUCTS else ():
            shape = shape_of(source)
            if source not in walk.aligned and shape is not None and len(shape) > axis and shape[axis] > 1:
                yield Factor(source.name, node.name, axis, wide * walk.channels // walk.units)


def _mask_nodes(walk: _Walk, start: fx.Node) -> list[fx.Node]:
    """Find the nodes after which zero stays zero on every path to a consumer, moved behind activations."""
    safe: dict[fx.Node, bool] = {}
    for node in sorted(walk.aligned, reverse=True):
        safe[node] = all(
            walk.keeps_zero[node, user] and safe[user] for user in node.users if (node, user) in walk.keeps_zero
        )
    masks: list[fx.Node] = []
    frontier = [start]
    while frontier:
        node = frontier.pop(0)
        if safe[node]:
            while len(node.users) == 1 and (node, next(iter(node.users))) in walk.keeps_zero:
                node = next(iter(node.users))
            masks.append(node)
            continue
        if any((node, user) in walk.consumers for user in node.users):
            return _masks_at_readers(walk)
        frontier.extend(u for u in node.users if (node, u) in walk.keeps_zero and u not in masks + frontier)
    return masks if len(masks) == 1 else _masks_at_readers(walk)


def _masks_at_readers(walk: _Walk) -> list[fx.Node]:
    """Put a mask before every consumer that zero does not reach from an earlier mask."""
    masks: list[fx.Node] = []
    zero: set[fx.Node] = set()
    for node in sorted(walk.aligned):
        if any(walk.keeps_zero.get((source, node)) and source in zero for source in node.all_input_nodes):
            zero.add(node)
        elif any((node, user) in walk.consumers for user in node.users):
            masks.append(node)
            zero.add(node)
    return masks


def _behind(walk: _Walk, masks: list[fx.Node]) -> set[fx.Node]:
    """Find the aligned nodes that an earlier mask has scaled already."""
    behind: set[fx.Node] = set()
    for node in sorted(walk.aligned):
        if any((s, node) in walk.keeps_zero and (s in behind or s in masks) for s in node.all_input_nodes):
            behind.add(node)
    return behind
