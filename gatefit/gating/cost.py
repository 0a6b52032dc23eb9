"""MACs per image in the two placements of the paper, by closed form from the graph."""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from gatefit.gating.gates import gates_of, outputs_of
from gatefit.graph.macs import layer_name, node_macs
from gatefit.graph.trace import propagate_shapes

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
    """The gates themselves."""
    has_block_gate: bool
    """Whether there is a block gate."""

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
    gates = gates_of(gated)
    paths = tuple(f"{name}." for name, m in gated.named_modules() if m in set(gates.values()))
    macs = {n.name: node_macs(analysed, n) for n in analysed.graph.nodes if not layer_name(n).startswith(paths)}
    blocks: list[BlockCost] = []
    for name, gate in gates.items():
        first = next((layer for layer in gate.of.layers if layer.first), None)
        rest = [layer for layer in gate.of.layers if layer is not first]
        scalable = gate.channel is not None
        blocks.append(
            BlockCost(
                name=name,
                parent=gate.of.parent if gate.of.parent in gates else None,
                fixed=sum(macs[x.node] for x in rest if not (x.scaled and scalable)),
                scaled=sum(macs[x.node] for x in rest if x.scaled and scalable),
                first=macs[first.node] if first else 0,
                first_scaled=bool(first and first.scaled and scalable),
                gate=gate.macs,
                has_block_gate=gate.block is not None,
            )
        )
    parents = {b.name: b.parent for b in blocks}
    blocks.sort(key=lambda b: _depth(b.name, parents))  # outer blocks first, as macs_per_image needs them
    return Costs(sum(macs.values()) - sum(b.branch for b in blocks), tuple(blocks))


def _depth(name: str, parents: dict[str, str | None]) -> int:
    """In how many other blocks' branches a block lies."""
    parent = parents[name]
    return 0 if parent is None else 1 + _depth(parent, parents)


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
