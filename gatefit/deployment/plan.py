"""What is made of each block of a gated network when it is deployed."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from gatefit.decisions import Placement
from gatefit.deployment.codebook import choose_codebook, most_frequent
from gatefit.deployment.region import Region, extract, region_of, region_or_none
from gatefit.errors import DeployError
from gatefit.gating.cost import costs_of, decisions_of
from gatefit.gating.gates import Gate, gates_of

EXACT_SHARE = 0.9
"""Share of images that have to ask for one of a few masks for entries that serve no others."""


@dataclass(frozen=True)
class BlockPlan:
    """How one block runs."""

    name: str
    skip: bool
    """Whether its branch is left out for images whose block gate is closed; else it is multiplied by 0."""
    codebook: Tensor | None
    """(entries, units) bool, see `gatefit.deployment.codebook`; None: no channel gate, or none that could save."""
    exact: bool = False
    """Whether an entry is taken only by images that open just its units, so that it needs no mask (steps alone)."""
    reason: str = ""
    """Why it runs whole and masked; empty where it does not."""
    parallel: bool = False
    """Whether its first layer runs whole, beside the gates."""

    @property
    def dynamic(self) -> bool:
        """Tell whether anything can be saved at run time."""
        return self.skip or (self.codebook is not None and len(self.codebook) > 1)


@dataclass(frozen=True)
class Deployment:
    """What was made of a converted folder."""

    plans: tuple[BlockPlan, ...]
    gathered: dict[str, bool]
    """Blocks that run, with weights gathered for each image, just what it opens, whatever their plan; by name, whether
    they are skipped."""
    agreement: float | None
    """Share of images that chose no channel which are answered as before; None: all of them, by construction."""
    latency: "Latency | None"
    """None: there is no original to compare with, or it cannot be made to run in the deployment's engines."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds for a batch on this machine, medians."""

    batch: int
    deployed: float
    original: float
    engine: str
    """Of the original: the fastest of those that a deployment of this backend is made of."""


@dataclass(frozen=True)
class Observed:
    """What the gates of one block gave on calibration images."""

    runs: Tensor
    """(N,) bool"""
    opens: Tensor
    """(N, units) bool; (N, 0) without a channel gate"""


@torch.no_grad()
def observe(gated: fx.GraphModule, images: list[Tensor]) -> dict[str, Observed]:
    """Run a gated network on calibration images, (B, C, H, W) each, and note what its gates open."""
    gated.eval()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in gates_of(gated)}
    for batch in images:
        gated(batch)
        for name, opened in decisions_of(gated).blocks.items():
            everything = torch.ones(len(batch), dtype=torch.bool)
            runs = everything if opened.runs is None else opened.runs.cpu()
            units = everything[:, None][:, :0] if opened.units is None else opened.units.cpu()
            found[name].append((runs, units))
    return {name: Observed(*(torch.cat(parts) for parts in zip(*rows, strict=True))) for name, rows in found.items()}


def never_open(gate: Gate) -> Tensor:
    """Find the units that no input whatever can open, (units,) bool: their gate is constant and closed."""
    assert gate.channel is not None
    constant = (gate.channel.weight == 0).all(1)
    return (constant & (gate.channel.bias <= 0)).cpu()


def never_runs(gate: Gate) -> bool:
    """Tell whether no input whatever can open the block: its gate is constant and closed."""
    return gate.block is not None and not gate.block.weight.any() and bool((gate.block.bias <= 0).all())


def never_closes(gate: Gate) -> bool:
    """Tell whether no input whatever can close the block or one of its units: its gates are constant and open."""
    return all(not fc.weight.any() and bool((fc.bias > 0).all()) for fc in gate.layers)


def plan_block(
    gated: fx.GraphModule,
    gate: Gate,
    seen: Observed,
    masks: int,
    prune_unused: bool = False,
    placement: Placement = "sequential",
) -> tuple[BlockPlan, Region | None]:
    """Plan the most dynamic form of a block; whether it pays is another question (see `gatefit.deployment.tune`).

    Args:
        prune_unused: take channels that no calibration image opened for ones that none ever will.
        placement: "parallel" for blocks that have an `Prefix`; the others stay sequential.
    """
    name, whole = gate.of.name, gate.block is not None
    try:
        region = region_of(gated, gate)
    except DeployError as error:
        return BlockPlan(name, False, None, reason=str(error)), None
    parallel = placement == "parallel" and region.prefix is not None
    codebook = None
    if gate.channel is not None:
        ran = seen.opens[seen.runs]
        possible = ~never_open(gate)
        if prune_unused and len(ran):
            possible &= ran.any(0)
        if not possible.any():
            possible[0] = True  # a layer without channels is none
        try:
            extract(gated, gate, region, possible.nonzero()[:, 0], parallel=parallel)
        except DeployError as error:
            return BlockPlan(name, whole, None, reason=str(error), parallel=parallel), region
        frequent, covered = most_frequent(ran, masks, possible)
        if gate.form == "step" and covered >= EXACT_SHARE:
            return BlockPlan(name, whole, frequent, exact=True, parallel=parallel), region
        codebook = choose_codebook(ran, masks, possible=possible)
    return BlockPlan(name, whole, codebook, parallel=parallel), region


def plans_without_codebooks(gated: fx.GraphModule, skip: bool) -> dict[str, tuple[BlockPlan, Region | None]]:
    """Plan the same form for all blocks, whatever images ask for; tell where they stand."""
    return {n: (BlockPlan(n, skip, None), region_or_none(gated, gate)) for n, gate in gates_of(gated).items()}


def share_of(gated: nn.Module, images: list[Tensor]) -> float:
    """Measure the share of the dense MACs that the gates let through (sequential placement, gates included)."""
    costs = costs_of(gated, tuple(images[0].shape[1:]))
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in images:
            gated(batch)
            total += float(costs.per_image(decisions_of(gated)).sum())
            count += len(batch)
    return total / count / costs.dense
