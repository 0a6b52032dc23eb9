"""Activations that a convolution can be run with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from gatefit.graph.trace import module_of

PLAIN = {"none": nn.Identity, "relu": nn.ReLU, "hardtanh": nn.ReLU6, "swish": nn.SiLU, "hardswish": nn.Hardswish}
"""Activations that are run with a convolution, by oneDNN's name ("hardtanh" has the bounds 0 and 6)."""
_NAMES: dict[Any, str] = {kind: name for name, kind in PLAIN.items() if name != "none"} | {
    F.relu: "relu",
    torch.relu: "relu",
    "relu": "relu",
    F.relu6: "hardtanh",
    F.silu: "swish",
    F.hardswish: "hardswish",
}


def activation_of(network: fx.GraphModule, node: fx.Node) -> str | None:
    """Give the key of `PLAIN` for an activation, None for another node."""
    module = module_of(network, node)
    return _NAMES.get(node.target if module is None else type(module))
