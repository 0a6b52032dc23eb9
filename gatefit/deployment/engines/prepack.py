"""Convolutions whose weights are packed ahead for oneDNN, with the sum and the activation behind them in the same call.

At batch 1 a plain convolution spends more time on packing its weights, at every call, than on the work itself. The
operators used here are the ones that PyTorch's own compiler calls. Where they are missing, and on other devices than
the CPU, plain calls give the same.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatefit.deployment.region import SHORTCUT
from gatefit.graph.activations import PLAIN, activation_of
from gatefit.graph.trace import call_counts, module_of


class PackedConv(nn.Module):
    """A convolution, a sum behind it, and its activation.

    Args:
        conv: padded with zeros, by numbers.
        activation: a key of `PLAIN`.
    """

    def __init__(self, conv: nn.Conv2d, activation: str = "none") -> None:
        super().__init__()
        self.conv = conv
        self.activation, self.scalars = activation, [0.0, 6.0] if activation == "hardtanh" else []
        self.plain = PLAIN[activation]()
        self.packed: Tensor | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute activation(conv(x) + residual) for x (B, C, H, W); a residual of None is not added."""
        conv = self.conv
        if self.packed is None:
            self.packed = _packed(conv, x)
        if self.packed is conv.weight or x.device.type != "cpu":
            value = conv(x)
            result: Tensor = self.plain(value if residual is None else value + residual)
            return result
        sizes = (conv.padding, conv.stride, conv.dilation, conv.groups)
        run = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            result = run(x, self.packed, conv.bias, *sizes, self.activation, self.scalars, "")
        else:
            unary = None if self.activation == "none" else self.activation
            result = run.binary(x, residual, self.packed, conv.bias, *sizes, "add", 1.0, unary, self.scalars, "")
        return result

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights can be neither copied nor pickled; they are made anew.
        return {**self.__dict__, "packed": None}


def _packed(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Pack the weights for inputs like x; return them as they are where that cannot be done."""
    weight = conv.weight.detach()
    if x.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.enabled:
        return conv.weight
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(), conv.padding, conv.stride, conv.dilation, conv.groups, list(x.shape)
        )
    except (AttributeError, RuntimeError):  # a PyTorch without these operators
        return conv.weight
    return packed


def prepack(network: fx.GraphModule) -> fx.GraphModule:
    """Pack every convolution of a network in eval mode, in place; its first call does the work."""
    return replace_convs(network, PackedConv)


def replace_convs(network: fx.GraphModule, make: Callable[[nn.Conv2d, str], nn.Module | None]) -> fx.GraphModule:
    """Replace convolutions, and the sum and activation right behind them, by what `make` makes of them; in place.

    Only the sum of a branch and its block's shortcut is taken over: the operands of other sums may differ in shape.
    Example: in a branch, conv -> + shortcut -> ReLU becomes one module that is called with (x, shortcut).

    Args:
        make: from a convolution and the name of its activation (a key of `PLAIN`) to a module that is called with
            (x,) or (x, shortcut); None leaves the convolution alone.
    """
    calls = call_counts(network)
    for node in list(network.graph.nodes):
        conv = module_of(network, node)
        if type(conv) is not nn.Conv2d or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            continue
        last, residual = node, None
        if (user := _only_user(node)) is not None and user.target in (torch.add, operator.add):
            others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
            if len(others) == 1 and others[0].op == "placeholder" and others[0].target == SHORTCUT:
                last, residual = user, others[0]
        activation = "none"
        if (user := _only_user(last)) is not None and (name := activation_of(network, user)) is not None:
            last, activation = user, name
        made = make(conv, activation)
        if made is None:
            continue
        target = str(node.target) if calls[str(node.target)] == 1 else f"{node.target}_{node.name}"
        network.add_submodule(target, made)
        with network.graph.inserting_before(last):
            run = network.graph.call_module(target, node.args if residual is None else (*node.args, residual))
        last.replace_all_uses_with(run)
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
