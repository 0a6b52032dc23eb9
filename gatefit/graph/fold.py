"""Batch norm folded into the convolution before it: a network's fastest plain form for inference."""

from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, DropPath
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import StochasticDepth

from gatefit.graph.ops import add_compensation
from gatefit.graph.trace import call_counts, module_of, trace

IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath, StochasticDepth)
"""Modules that give back what they are given, in eval mode."""


def fold_batch_norms(model: nn.Module, example: Tensor | None = None) -> fx.GraphModule:
    """Return a copy of `model` in eval mode, each batch norm that follows a convolution folded into it.

    Outputs are the same up to rounding. Batch norms behind anything else stay; what is idle in eval mode goes.

    Args:
        model: any network that can be traced; untouched.
        example: input (B, C, H, W) whose shape some networks need to be traced.

    Raises:
        ConversionError: the network cannot be traced.
    """
    return fold_in_place(trace(model, example).eval())


@torch.no_grad()
def fold_in_place(traced: fx.GraphModule) -> fx.GraphModule:
    """Fold as `fold_batch_norms` does, for a graph in eval mode; a compensation in between is scaled like its rows."""
    calls = call_counts(traced)

    def once(node: fx.Node) -> bool:
        return len(node.users) == 1 and calls[str(node.target)] == 1

    for node in list(traced.graph.nodes):
        norm = _exactly(module_of(traced, node), (nn.BatchNorm2d, BatchNormAct2d))
        if norm is None or norm.running_var is None or calls[str(node.target)] > 1:
            continue
        before = node.all_input_nodes[0]
        source, compensated = before, None
        if before.target is add_compensation:
            source, compensated = before.all_input_nodes
        conv = _exactly(module_of(traced, source), (nn.Conv2d, Conv2dSame))
        compensation = None if compensated is None else _exactly(module_of(traced, compensated), (nn.Linear,))
        if conv is None or not once(source):
            continue
        if compensated is not None:
            if compensation is None or not once(compensated) or len(before.users) > 1:
                continue
            compensation.weight.mul_((norm.weight * (norm.running_var + norm.eps).rsqrt())[:, None])
        traced.set_submodule(str(source.target), fuse_conv_bn_eval(conv, norm))
        if isinstance(norm, BatchNormAct2d):
            traced.set_submodule(str(node.target), norm.act)  # its dropout does nothing in eval mode
        else:
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    for node in list(traced.graph.nodes):
        if type(module_of(traced, node)) in IDLE:
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _exactly(module: nn.Module | None, types: tuple[type[nn.Module], ...]) -> Any:
    """Give the module if it is of one of `types`, not of a subclass, which may compute something else."""
    return module if type(module) in types else None
