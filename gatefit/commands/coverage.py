"""How much of a network the gates would reach, without weights or images."""

import re
from collections import Counter
from dataclasses import dataclass

import timm
import torch
from torch import nn

from gatefit.errors import GatefitError
from gatefit.gating.insert import find_blocks
from gatefit.graph.blocks import FoundBlocks
from gatefit.inputs.models import ModelReference, input_spec, parse_reference, skeleton


@dataclass(frozen=True)
class Coverage:
    """What matching found in one network."""

    name: str
    family: str
    """The module of timm or torchvision that defines it."""
    blocks: int = 0
    channel_blocks: int = 0
    """Blocks with a channel gate."""
    convolutional: int = 0
    """Blocks with a convolution of their own."""
    convolutional_gated: int = 0
    """Those of them with a channel gate."""
    units: int = 0
    """Saliences of all channel gates."""
    macs: int = 0
    """Per image, dense."""
    parameters: int = 0
    block_share: float = 0.0
    """Share of the MACs under a block gate."""
    channel_share: float = 0.0
    """Share of the MACs under a channel gate."""
    reason: str = ""
    """Why nothing is gated, or not more; empty where there is nothing to say."""


def cover(name: str) -> Coverage:
    """Match one network by name, built without weights; what fails stands in `reason`."""
    reference = parse_reference(name)
    family = _family(reference)
    try:
        network = skeleton(reference)
        found = find_blocks(network, torch.zeros(2, *input_spec(network).shape, device="meta"))
    except GatefitError as error:
        return Coverage(name, family, reason=str(error))
    return _count(name, family, network, found)


def _count(name: str, family: str, network: nn.Module, found: FoundBlocks) -> Coverage:
    modules = dict(network.named_modules())
    convolutional = [
        b
        for b in found.blocks
        if any(isinstance(modules.get(layer.name), nn.modules.conv._ConvNd) for layer in b.layers)
    ]
    reasons = [kind_of(s.reason) for s in found.skipped] or ["there is no addition of two tensors"]
    return Coverage(
        name=name,
        family=family,
        blocks=len(found.blocks),
        channel_blocks=sum(b.channels > 0 for b in found.blocks),
        convolutional=len(convolutional),
        convolutional_gated=sum(b.channels > 0 for b in convolutional),
        units=sum(b.units for b in found.blocks),
        macs=found.macs,
        parameters=sum(p.numel() for p in network.parameters()),
        block_share=found.block_share,
        channel_share=found.channel_share,
        reason="" if found.blocks else Counter(reasons).most_common(1)[0][0],
    )


def kind_of(reason: str) -> str:
    """Strip a reason of the names of nodes, so that reasons can be counted."""
    return re.sub(r"'[^']*'|\([^)]*\)", "...", reason)


def _family(reference: ModelReference) -> str:
    if reference.source == "timm":
        return timm.models.model_entrypoint(reference.name).__module__.rsplit(".", 1)[-1]
    return reference.source
