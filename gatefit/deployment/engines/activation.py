"""Activations as the kernels know them, and the nodes of a graph that are one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from gatefit.deployment.kernels.abi import CLAMP, ELU, GELU, GELU_TANH, HARDSWISH, LEAKY_RELU, SILU
from gatefit.graph.trace import module_of


@dataclass(frozen=True)
class KernelActivation:
    """An activation of `abi.h`."""

    kind: int = CLAMP
    parameter: float = 0.0
    lowest: float = -math.inf
    highest: float = math.inf

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value of CLAMP."""
        return self.lowest, self.highest

    def fields(self) -> dict[str, float]:
        """Give the fields of a `StepStruct` or `BlockStruct`."""
        bounds = {"lowest": self.lowest, "highest": self.highest}
        return {"activation": self.kind, "parameter": self.parameter, **bounds}


NONE, RELU, RELU6 = KernelActivation(), KernelActivation(lowest=0.0), KernelActivation(lowest=0.0, highest=6.0)
SWISH, HARD_SWISH = KernelActivation(SILU), KernelActivation(HARDSWISH)
PLAIN_ACTIVATIONS = {"none": NONE, "relu": RELU, "hardtanh": RELU6, "swish": SWISH, "hardswish": HARD_SWISH}
"""Those of `gatefit.graph.activations.PLAIN`, by its keys."""


def _gelu(approximate: str = "none") -> KernelActivation:
    return KernelActivation(GELU_TANH if approximate == "tanh" else GELU)


def _leaky(negative_slope: float = 0.01) -> KernelActivation:
    return KernelActivation(LEAKY_RELU, float(negative_slope))


def _elu(alpha: float = 1.0) -> KernelActivation:
    return KernelActivation(ELU, float(alpha))


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> KernelActivation:
    return KernelActivation(lowest=float(min_val), highest=float(max_val))


_MODULES: dict[type[nn.Module], Callable[[Any], KernelActivation]] = {
    nn.ReLU: lambda m: RELU,
    nn.ReLU6: lambda m: RELU6,
    nn.Hardtanh: lambda m: _hardtanh(m.min_val, m.max_val),
    nn.SiLU: lambda m: SWISH,
    nn.Hardswish: lambda m: HARD_SWISH,
    nn.GELU: lambda m: _gelu(m.approximate),
    nn.LeakyReLU: lambda m: _leaky(m.negative_slope),
    nn.ELU: lambda m: _elu(m.alpha),
}
_FUNCTIONS: dict[Any, Callable[..., KernelActivation]] = {
    F.relu: lambda: RELU,
    torch.relu: lambda: RELU,
    "relu": lambda: RELU,
    F.relu6: lambda: RELU6,
    F.hardtanh: _hardtanh,
    F.silu: lambda: SWISH,
    F.hardswish: lambda: HARD_SWISH,
    F.gelu: _gelu,
    F.leaky_relu: _leaky,
    F.elu: _elu,
}


def kernel_activation(network: fx.GraphModule, node: fx.Node) -> KernelActivation | None:
    """Describe an activation as the kernels know it; None for another node, and for one with settings unknown here."""
    module = module_of(network, node)
    if module is not None:
        made = _MODULES.get(type(module))
        return None if made is None else made(module)
    function = _FUNCTIONS.get(node.target)
    if function is None or len(node.all_input_nodes) != 1:
        return None
    settings = {k: v for k, v in node.kwargs.items() if k not in ("input", "inplace")}
    try:
        return function(*(a for a in node.args[1:] if not isinstance(a, bool)), **settings)  # a bool is `inplace`
    except TypeError:
        return None
