"""Blocks that run just what an image opens, mask by mask: the kernels read the open channels of weights where they lie.

No codebook stands between a mask and its cost, so gates that give each image a mask of its own save what they close.
Images are run one by one, laid out (C, H, W).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatefit.deployment.dynamic import Saliences, reads_saliences
from gatefit.deployment.engines.prepack import replace_convs
from gatefit.deployment.kernels.native import Kernels, kernels, threads
from gatefit.deployment.plan import BlockPlan
from gatefit.deployment.region import Region, extract
from gatefit.errors import DeployError
from gatefit.gating.gates import Gate
from gatefit.graph.activations import PLAIN
from gatefit.graph.fold import fold_in_place

_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d)
_POOLING_CALLS = {F.max_pool2d, F.avg_pool2d, F.adaptive_max_pool2d}
OPEN = "open"
"""The input of a gathered variant besides `gatefit.deployment.region.INPUTS`: the open units, (n,) int64."""
UNBOUNDED = (-math.inf, math.inf)
"""Bounds of a result without activation."""
_BOUNDS = {"none": UNBOUNDED, "relu": (0.0, math.inf), "hardtanh": (0.0, 6.0)}
"""Lowest and highest value of the activations that the kernels know."""


class GatheredConv(nn.Module):
    """A convolution of single images with some of its output and input channels, a sum behind it, and its activation.

    Args:
        conv: not grouped or depthwise; not dilated, square, padded with zeros.
        activation: a key of `gatefit.graph.activations.PLAIN`.
    """

    all_oc: Tensor
    all_ic: Tensor

    def __init__(self, conv: nn.Conv2d, activation: str = "none") -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().contiguous(), requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach(), requires_grad=False)
        self.stride, self.padding = int(conv.stride[0]), int(conv.padding[0])
        self.depthwise = conv.groups > 1
        self.bounds = _BOUNDS.get(activation, UNBOUNDED)
        self.after = nn.Identity() if activation in _BOUNDS else PLAIN[activation]()
        self.register_buffer("all_oc", torch.arange(conv.out_channels), persistent=False)
        self.register_buffer("all_ic", torch.arange(conv.in_channels), persistent=False)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, oc: Tensor | None = None, ic: Tensor | None = None
    ) -> Tensor:
        """Compute activation(conv(x) + residual) for some channels.

        Args:
            x: (B, n_in, H, W) float32, the open input channels alone.
            residual: (B, n_out, OH, OW) float32; None: nothing is added.
            oc: the output channels to compute, (n_out,) int64; None: all.
            ic: the weight's input channels that x holds, ascending, (n_in,) int64; None: all. A depthwise convolution
                reads the channels `oc`.

        Returns:
            (B, n_out, OH, OW) float32.

        Raises:
            DeployError: there are no kernels, or not for x.
        """
        run = need_kernels(x)
        oc = self.all_oc if oc is None else oc
        ic = self.all_ic if ic is None else ic
        kernel = self.weight.shape[2]
        height, width = ((s + 2 * self.padding - kernel) // self.stride + 1 for s in x.shape[2:])
        x = x.contiguous()
        result = x.new_empty(len(x), len(oc), height, width)
        geometry = (kernel, self.stride, self.padding)
        if self.depthwise:
            bounds = self.bounds if residual is None else UNBOUNDED
            addresses = _addresses(x, self.weight, self.bias, oc, result)
            run.depthwise(*addresses, *x.shape, *geometry, *bounds, threads())
            result = result if residual is None else (result + residual).clamp(*self.bounds)
        else:
            residual = None if residual is None else residual.contiguous()
            addresses = _addresses(x, self.weight, self.bias, oc, ic, residual, result)
            counts = (len(oc), self.weight.shape[1])
            run.conv(*addresses, *x.shape, *counts, *geometry, *self.bounds, threads())
        activated: Tensor = self.after(result)
        return activated

    def _apply(self, fn: Any, recurse: bool = True) -> "GatheredConv":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight.data = self.weight.data.contiguous()  # whatever layout was asked for: the kernels read this one
        return self


def need_kernels(x: Tensor) -> Kernels:
    """Return the kernels.

    Raises:
        DeployError: there are none on this machine, or they cannot run x.
    """
    run = kernels()
    if run is None:
        raise DeployError("this deployment needs a C++ compiler (g++ or clang++); deploy anew on this machine")
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise DeployError(f"this deployment takes float32 on the CPU, not {x.dtype} on {x.device}; deploy anew there")
    return run


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def _gathered(conv: nn.Conv2d, activation: str) -> GatheredConv | None:
    """Make a `GatheredConv` of a convolution that the kernels know; None for another one."""
    square = all(len(set(s)) == 1 for s in (conv.kernel_size, conv.stride, conv.padding))
    plain = set(conv.dilation) == {1} and conv.weight.dtype == torch.float32
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return GatheredConv(conv, activation) if square and plain and (conv.groups == 1 or depthwise) else None


class ChannelsLastPool(nn.MaxPool2d):
    """Max pooling with the channels innermost, where PyTorch is several times faster than on planes."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool (B, C, H, W) whose planes lie together, and return such planes."""
        pooled: Tensor = super().forward(x.contiguous(memory_format=torch.channels_last))
        return pooled.contiguous()


def with_gathered_convs(network: fx.GraphModule) -> fx.GraphModule:
    """Replace a network's convolutions by `GatheredConv` where it can run them, its max pooling by `ChannelsLastPool`.

    In place.
    """
    for name, pool in list(network.named_modules()):
        if type(pool) is nn.MaxPool2d and not pool.return_indices:
            sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
            network.set_submodule(name, ChannelsLastPool(*sizes, ceil_mode=pool.ceil_mode))
    return replace_convs(network, _gathered)


def _pool(function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Pool images (B, C, H, W) of which C may be 0: PyTorch pools no empty tensors."""
    if x.shape[1]:
        return function(x, *args, **kwargs)
    return function(x.new_zeros(len(x), 1, *x.shape[2:]), *args, **kwargs)[:, :0]


class _Pool(nn.Module):
    """A pooling of as many channels as are open."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return _pool(self.pool, x)


def _pool_without_channels(variant: fx.GraphModule) -> None:
    """Let the poolings of a gathered variant take images of which no unit is open; in place."""
    for name, module in list(variant.named_modules()):
        if isinstance(module, _POOLS):
            variant.set_submodule(name, _Pool(module))
    for node in variant.graph.nodes:
        if node.target in _POOLING_CALLS:
            node.args, node.target = (node.target, *node.args), _pool


class GatheredBlock(nn.Module):
    """A block that runs just the open units of its branch: (input, shortcut) -> shortcut + branch.

    Raises:
        DeployError: its branch holds a layer that cannot run on some units alone.
    """

    def __init__(self, gated: fx.GraphModule, gate: Gate, region: Region, plan: BlockPlan) -> None:
        super().__init__()
        self.saliences = Saliences(gate, replace(plan, skip=True, codebook=None))
        self.variant = gathered_variant(gated, gate, region)
        self.bare = not reads_saliences(self.variant)
        self.after = nn.ReLU() if region.relu is not None else nn.Identity()

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Add the branch of x, (B, C, H, W), to the shortcut, and apply what comes right behind."""
        logits = self.saliences.logits(x)
        opened = logits > 0
        saliences: tuple[Tensor | None, ...] = (None, None, None) if self.bare else self.saliences.given(logits)
        skip = self.saliences.skip
        results = []
        for i in range(len(x)):
            one = slice(i, i + 1)
            if skip and not opened[i, 0]:
                results.append(self.after(shortcut[one]))
                continue
            units = opened[i, 1:] if self.saliences.gate.block is not None else opened[i]
            parts = [None if t is None else t[one] for t in saliences]
            results.append(self.variant(x[one], shortcut[one], *parts, units.nonzero()[:, 0]))
        return results[0] if len(results) == 1 else torch.cat(results)


def gathered_variant(gated: fx.GraphModule, gate: Gate, region: Region) -> fx.GraphModule:
    """Cut out the block with all its units, as a graph that runs those that its input `OPEN` names.

    Raises:
        DeployError: it cannot run on some units alone.
    """
    hard = gate.form == "step"
    variant = fold_in_place(extract(gated, gate, region, None, not hard, not hard))
    with_gathered_convs(variant)
    _pool_without_channels(variant)
    graph = variant.graph
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        open_units = graph.placeholder(OPEN)
        channel = next(n for n in graph.nodes if n.target == "channel")
        if channel.users:
            chosen = graph.call_function(torch.index_select, (channel, 1, open_units))
            channel.replace_all_uses_with(chosen, delete_user_cb=lambda user: user is not chosen)
    open_channels: dict[str, dict[str, Any]] = {}
    units = gate.of.channel_units if gate.channel is not None else None
    if units is not None and (units.opaque or units.factors):
        raise DeployError("its channels meet others on their way")
    for piece in units.slices if units is not None else ():
        path = piece.tensor.rpartition(".")[0]
        module = dict(variant.named_modules()).get(path)
        if module is None:  # a batch norm, folded
            continue
        if not isinstance(module, GatheredConv) or piece.per_unit != 1:
            raise DeployError(f"'{path}' cannot be run by parts")
        open_channels.setdefault(path, {})["oc" if piece.axis == 0 else "ic"] = open_units
    for node in graph.nodes:
        if node.op == "call_module" and node.target in open_channels:
            node.kwargs = open_channels[str(node.target)]
    graph.lint()
    variant.recompile()
    return variant
