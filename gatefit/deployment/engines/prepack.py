"""Convolutions with weights packed ahead for oneDNN, the activation and the addition behind them in the same call.

At batch 1 a plain convolution spends more on packing its weights than on the work itself, at every call. The
operators used here are what PyTorch's own compiler calls; where they are missing, or on another device than the CPU,
plain calls give the same.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatefit.deployment.region import SHORTCUT
from gatefit.graph.activations import PLAIN, activation_of
from gatefit.graph.trace import module_of


class PackedConv(nn.Module):
    """A convolution, what is added to it, and its activation.

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

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """activation(conv(x) + added), (B, C, H, W)."""
        conv = self.conv
        if self.packed is None:
            self.packed = _packed(conv, x)
        if self.packed is conv.weight or x.device.type != "cpu":
            value = conv(x)
            result: Tensor = self.plain(value if added is None else value + added)
            return result
        sizes = (conv.padding, conv.stride, conv.dilation, conv.groups)
        run = torch.ops.mkldnn._convolution_pointwise
        if added is None:
            result = run(x, self.packed, conv.bias, *sizes, self.activation, self.scalars, "")
        else:
            unary = None if self.activation == "none" else self.activation
            result = run.binary(x, added, self.packed, conv.bias, *sizes, "add", 1.0, unary, self.scalars, "")
        return result

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights can be neither copied nor pickled; they are made anew.
        return {**self.__dict__, "packed": None}


def _packed(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The weights packed for inputs like x; as they are where that cannot be done."""
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
    """Let `make(convolution, activation)` run every convolution it wants, and what stands right behind; in place.

    What it makes is called with the input, and where a branch is added to its shortcut there, the shortcut; of other
    additions the shapes may differ.
    """
    calls = [n.target for n in network.graph.nodes if n.op == "call_module"]
    for node in list(network.graph.nodes):
        conv = module_of(network, node)
        if type(conv) is not nn.Conv2d or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            continue
        last, added = node, None
        if (user := _only_user(node)) is not None and user.target in (torch.add, operator.add):
            others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
            if len(others) == 1 and others[0].op == "placeholder" and others[0].target == SHORTCUT:
                last, added = user, others[0]
        activation = "none"
        if (user := _only_user(last)) is not None and (name := activation_of(network, user)) is not None:
            last, activation = user, name
        made = make(conv, activation)
        if made is None:
            continue
        target = str(node.target) if calls.count(node.target) == 1 else f"{node.target}_{node.name}"
        network.add_submodule(target, made)
        with network.graph.inserting_before(last):
            run = network.graph.call_module(target, node.args if added is None else (*node.args, added))
        last.replace_all_uses_with(run)
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
