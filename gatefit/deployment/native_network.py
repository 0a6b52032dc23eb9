"""A deployed network that runs for each image just the units it opens, with compiled kernels."""

from collections.abc import Sequence

from torch import Tensor, fx, nn

from gatefit.deployment.branch import Place
from gatefit.deployment.chain import ChainBlock
from gatefit.deployment.dynamic import DynamicBlock, assemble
from gatefit.deployment.gathered import GatheredBlock
from gatefit.deployment.plan import BlockPlan
from gatefit.deployment.stretches import ONNX, with_fast_stretches
from gatefit.errors import DeployError
from gatefit.gates import Gate


def gathered_network(
    gated: fx.GraphModule,
    plans: dict[str, tuple[BlockPlan, Place | None]],
    batches: Sequence[Tensor],
    engines: Sequence[str] | None = None,
) -> fx.GraphModule:
    """Each block as a `ChainBlock` if it can be one, else as a `GatheredBlock`, else as `plans` says.

    What lies between them runs as `gatefit.deployment.stretches.with_fast_stretches` says; the engines that it chose
    stand in `.meta["engines"]`.
    """
    network, chosen = with_fast_stretches(assemble(gated, plans, _block), batches, engines)
    for block in network.modules():
        if isinstance(block, ChainBlock):
            block.shares = ONNX not in chosen  # two sets of threads would wait for each other
    network.meta["engines"] = chosen
    return network


def _block(gated: fx.GraphModule, gate: Gate, place: Place, plan: BlockPlan) -> nn.Module:
    for kind in (ChainBlock, GatheredBlock):
        try:
            return kind(gated, gate, place, plan)
        except DeployError:
            continue
    return DynamicBlock(gated, gate, place, plan)
