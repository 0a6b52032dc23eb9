"""Multiply-accumulates (MACs) of single nodes of a traced network."""

from math import prod

import torch
import torch.nn.functional as F
from torch import fx, nn

from gatefit.graph.trace import module_of, shape_of

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)


def node_macs(traced: fx.GraphModule, node: fx.Node) -> int:
    """Count the MACs per image of one node: those of a convolution or linear layer, 0 for all else.

    Functional calls of either count too; products of two activations, as in attention, do not.
    """
    module = module_of(traced, node)
    shape = shape_of(node)
    if shape is None or not shape:
        return 0
    rows = _rows_per_image(traced, shape[0])
    per_image = rows * prod(shape[1:])
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        source = shape_of(node.args[0])
        return rows * prod(source[1:]) * prod(module.weight.shape[1:]) if source else 0
    if isinstance(module, nn.modules.conv._ConvNd):
        return per_image * prod(module.weight.shape[1:])
    if isinstance(module, nn.Linear):
        return per_image * module.in_features
    if node.op == "call_function" and node.target in _CONVOLUTIONS:
        weight = shape_of(_weight_of(node))
        return per_image * prod(weight[1:]) if weight else 0
    if node.op == "call_function" and node.target is F.linear:
        weight = shape_of(_weight_of(node))
        return per_image * weight[1] if weight else 0
    return 0


def _rows_per_image(traced: fx.GraphModule, rows: int) -> int:
    """Count the rows of a batch that belong to one image: more than one where windows are folded with the batch."""
    batch = next((s[0] for n in traced.graph.find_nodes(op="placeholder") if (s := shape_of(n))), rows)
    return rows // batch if batch and rows % batch == 0 else 1


def _weight_of(call: fx.Node) -> object:
    """Give the second argument of F.linear or F.conv, by position or by name."""
    return call.args[1] if len(call.args) > 1 else call.kwargs.get("weight")


def layer_name(node: fx.Node) -> str:
    """Give the qualified module name of a layer, or the node's name for a functional call."""
    return str(node.target) if node.op == "call_module" else node.name
