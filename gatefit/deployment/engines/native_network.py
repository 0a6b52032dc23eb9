"""A deployed network that runs for each image just the units it opens, with compiled kernels."""

from collections.abc import Sequence

from torch import Tensor, fx, nn

from gatefit.deployment.dynamic import DynamicBlock, assemble
from gatefit.deployment.engines.chain import ChainBlock, ChainBlocks
from gatefit.deployment.engines.gathered import GatheredBlock
from gatefit.deployment.engines.segments import with_fast_segments
from gatefit.deployment.info import DeployedInfo, set_deployed_info
from gatefit.deployment.plan import BlockPlan
from gatefit.deployment.region import Region
from gatefit.errors import DeployError
from gatefit.gating.gates import Gate


def gathered_network(
    gated: fx.GraphModule,
    plans: dict[str, tuple[BlockPlan, Region | None]],
    batches: Sequence[Tensor],
    engines: Sequence[str] | None = None,
    contents: Sequence[bytes] = (),
) -> fx.GraphModule:
    """Make blocks `ChainBlocks` if they can be, else as a `GatheredBlock` each, else as `plans` says.

    What lies between them runs as `gatefit.deployment.engines.segments.with_fast_segments` says; the engines that
    it chose stand in its `gatefit.deployment.info.DeployedInfo`.
    """
    network, chosen, exported = with_fast_segments(assemble(gated, plans, _block), batches, engines, contents)
    set_deployed_info(network, DeployedInfo(tuple(plan for plan, _ in plans.values()), chosen, exported))
    return network


def gathered_blocks(network: nn.Module) -> dict[str, bool]:
    """List the blocks of a deployed network that run just what each image opens: whether they are skipped, by name."""
    saliences = [m.saliences for m in network.modules() if isinstance(m, ChainBlock | GatheredBlock)]
    return {s.gate.of.name: s.skip for s in saliences}


def _block(gated: fx.GraphModule, gate: Gate, region: Region, plan: BlockPlan) -> nn.Module:
    for kind in (_chained, GatheredBlock):
        try:
            return kind(gated, gate, region, plan)
        except DeployError:
            continue
    return DynamicBlock(gated, gate, region, plan)


def _chained(gated: fx.GraphModule, gate: Gate, region: Region, plan: BlockPlan) -> ChainBlocks:
    return ChainBlocks([ChainBlock(gated, gate, region, plan)])
