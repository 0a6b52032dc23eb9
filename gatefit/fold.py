"""Batch norm folded into the convolution before it: a dense network's fastest plain form for inference."""

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gatefit.graph import module_of, trace


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example: Tensor | None = None) -> fx.GraphModule:
    """Return a copy of `model` in eval mode, each batch norm that follows a convolution folded into it.

    Outputs are the same up to rounding. Batch norms behind anything else stay.

    Args:
        model: any network that can be traced; untouched.
        example: input (B, C, H, W) whose shape some networks need to be traced.

    Raises:
        ConversionError: the network cannot be traced.
    """
    traced = trace(model, example).eval()
    calls = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    for node in list(traced.graph.nodes):
        norm = module_of(traced, node)
        if not isinstance(norm, nn.BatchNorm2d) or type(norm) not in (nn.BatchNorm2d, BatchNormAct2d):
            continue
        source = node.all_input_nodes[0]
        conv = module_of(traced, source)
        if (
            not isinstance(conv, nn.Conv2d)
            or type(conv) not in (nn.Conv2d, Conv2dSame)
            or len(source.users) > 1
            or norm.running_var is None
        ):
            continue
        if calls.count(source.target) > 1 or calls.count(node.target) > 1:
            continue
        traced.set_submodule(str(source.target), fuse_conv_bn_eval(conv, norm))
        if isinstance(norm, BatchNormAct2d):
            traced.set_submodule(str(node.target), norm.act)  # its dropout does nothing in eval mode
        else:
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced
