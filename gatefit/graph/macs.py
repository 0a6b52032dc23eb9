"""Multiply-accumulates (MACs) of single nodes of a traced network."""

from math import prod

import torch
from torch import fx, nn

from gatefit.graph.trace import module_of, shape_of


def node_macs(traced: fx.GraphModule, node: fx.Node) -> int:
    """Count the MACs per image of one node: those of a convolution or linear layer, 0 for all else.

    Functional calls of either count too; products of two activations, as in attention, do not.
    """
    module = module_of(traced, node)
    shape = shape_of(node)
    if shape is None or not shape:
        return 0
    if module is not None:
        return module_macs(module, shape_of(node.args[0]) if node.args else None, shape)
    per_image = prod(shape[1:])
    if node.op == "call_function" and node.target in (nn.functional.conv1d, nn.functional.conv2d, torch.conv2d):
        weight = shape_of(_weight_of(node))
        return per_image * prod(weight[1:]) if weight else 0
    if node.op == "call_function" and node.target is nn.functional.linear:
        weight = shape_of(_weight_of(node))
        return per_image * weight[1] if weight else 0
    return 0


def module_macs(module: nn.Module, source: torch.Size | None, shape: torch.Size) -> int:
    """Count the MACs per image of a module that turns a tensor of shape `source` into one of `shape`."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return prod(source[1:]) * prod(module.weight.shape[1:]) if source else 0
    if isinstance(module, nn.modules.conv._ConvNd):
        return prod(shape[1:]) * prod(module.weight.shape[1:])
    if isinstance(module, nn.Linear):
        return prod(shape[1:]) * module.in_features
    return 0


def _weight_of(call: fx.Node) -> object:
    """Give the second argument of F.linear or F.conv, by position or by name."""
    return call.args[1] if len(call.args) > 1 else call.kwargs.get("weight")


def layer_name(node: fx.Node) -> str:
    """Give the qualified module name of a layer, or the node's name for a functional call."""
    return str(node.target) if node.op == "call_module" else node.name
