"""MACs per image in the two placements of the paper, by closed form from the graph."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from gatefit.decisions import BlockDecision, Decisions, Placement
from gatefit.gating.gates import Gate, gates_of, outputs_of
from gatefit.graph.example import takes_one_tensor
from gatefit.graph.macs import layer_name, node_macs
from gatefit.graph.partial import inputs_of, macs_around, parts_of
from gatefit.graph.trace import propagate_shapes


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
        """Add up the MACs of the whole branch, dense."""
        return self.fixed + self.scaled + self.first


@dataclass(frozen=True)
class GateCosts:
    """MACs per image of a gated network at one image size (see `gatefit.decisions.Costs`)."""

    base: int
    """All that no gate controls."""
    blocks: tuple[BlockCost, ...]
    """Outer blocks before those in their branches."""

    @property
    def dense(self) -> int:
        """Add up the MACs of the original network."""
        return self.base + sum(b.branch for b in self.blocks)

    @property
    def parents(self) -> dict[str, str | None]:
        """Name each block and the block in whose branch it lies, outer blocks first."""
        return {b.name: b.parent for b in self.blocks}

    def per_image(self, decisions: Decisions, placement: Placement = "sequential") -> Tensor:
        """Add up the MACs of each image, gates included: (B,) float64."""
        running: dict[str, Tensor] = {}
        total: Tensor | None = None
        for cost in self.blocks:
            decided = decisions.blocks[cost.name]
            given = decided.runs if decided.runs is not None else decided.units
            assert given is not None
            if total is None:
                total = torch.full((len(given),), float(self.base), dtype=torch.float64, device=given.device)
            one = torch.ones_like(total)
            reached = running.get(cost.parent or "", one)
            runs = reached * (one if decided.runs is None else decided.runs.double())
            running[cost.name] = runs
            share = one if decided.units is None else decided.units.double().mean(1)
            if placement == "sequential":
                first = runs * cost.first * (share if cost.first_scaled else one)
            else:
                first = reached * cost.first
            total = total + reached * cost.gate + first + runs * (cost.fixed + cost.scaled * share)
        assert total is not None
        return total


@dataclass(frozen=True)
class GateDecider:
    """The gates of a network as what decides in it (see `gatefit.decisions.Decider`)."""

    gated: nn.Module

    def costs(self, image_shape: tuple[int, ...]) -> GateCosts:
        """Compute the MACs of the network for images of shape (C, H, W); see `costs_of`."""
        return costs_of(self.gated, image_shape)

    def decisions(self) -> Decisions:
        """Tell which gates were open in the last forward; see `decisions_of`."""
        return decisions_of(self.gated)


def costs_of(gated: nn.Module, image_shape: tuple[int, ...]) -> GateCosts:
    """Compute the MACs of a gated network for inputs of shape (C, H, W) or another, from its graph.

    A network of several inputs has those of the example that it was converted with.

    Raises:
        ConversionError: the network does not take inputs of that shape.
    """
    gates = gates_of(gated)
    total, macs_of = _macs(gated, image_shape)
    blocks: list[BlockCost] = []
    for name, gate in gates.items():
        macs = macs_of[gate]
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
    blocks.sort(key=lambda b: _depth(b.name, parents))  # outer blocks first, as `GateCosts.per_image` needs them
    return GateCosts(total - sum(b.branch for b in blocks), tuple(blocks))


def _macs(gated: nn.Module, image_shape: tuple[int, ...]) -> tuple[int, dict[Gate, dict[str, int]]]:
    """Count the MACs per image of the network but for its gates; and for each gate those of the nodes around it."""
    if isinstance(gated, fx.GraphModule):
        macs = _node_macs(gated, _example(gated, image_shape) if takes_one_tensor(gated) else None)
        return sum(macs.values()), dict.fromkeys(gates_of(gated).values(), macs)
    parameter = next(gated.parameters())
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
    images = images.to(parameter.device, parameter.dtype)
    parts = parts_of(gated)
    total = macs_around(gated, set(parts), images)
    inputs = inputs_of(copy.deepcopy(gated).eval(), images)
    by_gate: dict[Gate, dict[str, int]] = {}
    for path, part in parts.items():
        macs = _node_macs(part, inputs.get(path))
        total += sum(macs.values())
        by_gate |= dict.fromkeys(gates_of(part).values(), macs)
    return total, by_gate


def _example(traced: fx.GraphModule, shape: tuple[int, ...]) -> Tensor:
    """Make two inputs of a shape, without numbers, of the type that the network takes."""
    recorded = traced.graph.find_nodes(op="placeholder")[0].meta.get("dtype", torch.float32)
    dtype = next(traced.parameters()).dtype if recorded.is_floating_point else recorded
    return torch.zeros(2, *shape, dtype=dtype, device="meta")


def _node_macs(traced: fx.GraphModule, example: Tensor | None) -> dict[str, int]:
    """Count the MACs per image of each node but the gates; without an example at the size of the conversion's."""
    analysed = copy.deepcopy(traced)
    if example is not None:
        propagate_shapes(analysed, example)
    gates = set(gates_of(traced).values())
    paths = tuple(f"{name}." for name, m in traced.named_modules() if m in gates)
    return {n.name: node_macs(analysed, n) for n in analysed.graph.nodes if not layer_name(n).startswith(paths)}


def _depth(name: str, parents: dict[str, str | None]) -> int:
    """Count the other blocks in whose branches a block lies."""
    parent = parents[name]
    return 0 if parent is None else 1 + _depth(parent, parents)


def decisions_of(gated: nn.Module) -> Decisions:
    """Tell which gates were open for each image of the last forward.

    Raises:
        GatefitError: the network has no gates, or no forward has been run.
    """
    return Decisions(
        {
            gate.of.name: BlockDecision(
                None if out.block is None else out.block.detach()[:, 0] > 0,
                None if out.channel is None else out.channel.detach() > 0,
            )
            for gate, out in outputs_of(gated)
        }
    )
