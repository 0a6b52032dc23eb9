"""Deployed networks in PyTorch's fastest form."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from gatefit.deployment.dynamic import DynamicBlock
from gatefit.deployment.engines.prepack import prepack

Network = TypeVar("Network", bound=nn.Module)
Run = Callable[[Tensor], Tensor]
"""Takes images (B, C, H, W), gives predictions (B, classes)."""


def torch_blocks(blocks: list[DynamicBlock], inputs: list[tuple[Tensor, Tensor]]) -> list[Callable[..., Any]]:
    """Pack the weights of blocks; their inputs must be channels-last."""
    return [packed(block) for block in blocks]


def packed(network: Network) -> Network:
    """Bring a deployed network, or a block of one, into PyTorch's fastest form, in place."""
    for part in list(network.modules()):
        if isinstance(part, fx.GraphModule):
            prepack(part)
    return network.to(memory_format=torch.channels_last)
