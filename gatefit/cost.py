"""MACs per image in the two placements of the paper, by closed form from the graph."""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from gatefit.blocks import layer_name, node_macs
from gatefit.gates import gates_of, outputs_of
from gatefit.graph import propagate_shapes

Placement = Literal["sequential", "parallel"]
"""sequential: gates run first, so all that is closed is saved. parallel: gates run beside the first
layer of the branch, which always runs whole; no latency is added."""


@dataclass(frozen=True)
class BlockCost:
    """MACs per image of one block at a given image size."""

    name: str
    parent: str | None
    fixed: int
    """Layers whose work does not depend on the open channels, less the first layer."""
    scaled: int
    """Layers whose work shrinks with the open channels, less the first layer."""
    first: int
    first_scaled: bool
    gate: int

    @property
    def branch(self) -> int:
        """The whole branch, dense."""
        return self.fixed + self.scaled + self.first


@dataclass(frozen=True)
class Costs:
    """MACs per image of a gated network at a given image size."""

    base: int
    """All that no gate controls."""
    blocks: tuple[BlockCost, ...]

    @property
    def dense(self) -> int:
        """The original network."""
        return self.base + sum(b.branch for b in self.blocks)


@dataclass(frozen=True)
class Opens:
    """Which gates of one block are open for each image of a batch."""

    block: Tensor | None
    """(B,) bool; None: no block gate."""
    channel: Tensor | None
    """(B, units) bool; None: no channel gate."""


def costs_of(gated: fx.GraphModule, image_shape: tuple[int, ...]) -> Costs:
    """MACs of a gated network for images of shape (C, H, W).

    Raises:
        ConversionError: the network does not take images of that shape.
    """
    analysed = copy.deepcopy(gated)
    propagate_shapes(analysed, torch.zeros(2, *image_shape, dtype=next(gated.parameters()).dtype, device="meta"))
    macs: dict[str, int] = {}
    gate_paths = tuple(f"{name}." for name, m in gated.named_modules() if m in set(gates_of(gated).values()))
    for node in analysed.graph.nodes:
        if not layer_name(node).startswith(gate_paths):
            macs[layer_name(node)] = macs.get(layer_name(node), 0) + node_macs(analysed, node)
    blocks = []
    for name, gate in gates_of(gated).items():
        first = next(layer for layer in gate.of.layers if layer.first) if gate.of.layers else None
        rest = [layer for layer in gate.of.layers if layer is not first]
        scalable = gate.channel is not None
        blocks.append(
            BlockCost(
                name=name,
                parent=gate.of.parent,
                fixed=sum(macs[x.name] for x in rest if not (x.scaled and scalable)),
                scaled=sum(macs[x.name] for x in rest if x.scaled and scalable),
                first=macs[first.name] if first else 0,
                first_scaled=bool(first and first.scaled and scalable),
                gate=gate.macs,
            )
        )
    return Costs(sum(macs.values()) - sum(b.branch for b in blocks), tuple(blocks))


def opens_of(gated: nn.Module) -> dict[str, Opens]:
    """What was open in the last forward, by block name."""
    return {
        gate.of.name: Opens(
            None if out.block is None else out.block.detach()[:, 0] > 0,
            None if out.channel is None else out.channel.detach() > 0,
        )
        for gate, out in outputs_of(gated)
    }


def macs_per_image(costs: Costs, opens: dict[str, Opens], placement: Placement = "sequential") -> Tensor:
    """MACs of each image, gates included: (B,) float64."""
    running: dict[str, Tensor] = {}
    total: Tensor | None = None
    for cost in costs.blocks:
        open_ = opens[cost.name]
        known = open_.block if open_.block is not None else open_.channel
        assert known is not None
        if total is None:
            total = torch.full((known.shape[0],), float(costs.base), dtype=torch.float64, device=known.device)
        one = torch.ones_like(total)
        reached = running.get(cost.parent or "", one)
        runs = reached * (one if open_.block is None else open_.block.double())
        running[cost.name] = runs
        share = one if open_.channel is None else open_.channel.double().mean(1)
        if placement == "sequential":
            first = runs * cost.first * (share if cost.first_scaled else one)
        else:
            first = reached * cost.first
        total = total + reached * cost.gate + first + runs * (cost.fixed + cost.scaled * share)
    assert total is not None
    return total
