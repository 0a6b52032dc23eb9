"""A deployed network that runs for each image just the units it opens, with compiled kernels."""

from torch import fx, nn

from gatefit.deployment.branch import Place
from gatefit.deployment.chain import ChainBlock
from gatefit.deployment.dynamic import DynamicBlock, assemble
from gatefit.deployment.gathered import GatheredBlock, with_gathered_convs
from gatefit.deployment.plan import BlockPlan
from gatefit.errors import DeployError
from gatefit.gates import Gate


def gathered_network(gated: fx.GraphModule, plans: dict[str, tuple[BlockPlan, Place | None]]) -> fx.GraphModule:
    """Each block as a `ChainBlock` if it can be one, else as a `GatheredBlock`, else as `plans` says."""
    return with_gathered_convs(assemble(gated, plans, _block))


def _block(gated: fx.GraphModule, gate: Gate, place: Place, plan: BlockPlan) -> nn.Module:
    for kind in (ChainBlock, GatheredBlock):
        try:
            return kind(gated, gate, place, plan)
        except DeployError:
            continue
    return DynamicBlock(gated, gate, place, plan)
