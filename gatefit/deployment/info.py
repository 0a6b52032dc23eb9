"""What a deployed network knows of itself: one typed record on its graph."""

from dataclasses import dataclass

from torch import fx, nn

from gatefit.deployment.plan import BlockPlan
from gatefit.errors import DeployError
from gatefit.gating.info import DEPLOYED


@dataclass(frozen=True)
class DeployedInfo:
    """How a network was deployed."""

    plans: tuple[BlockPlan, ...]
    """What was planned for each block."""
    engines: tuple[str, ...] | None = None
    """The engine of each segment between the blocks of a gathered network; None: the network is not gathered."""


def need_whole_graph(gated: nn.Module) -> fx.GraphModule:
    """Return a gated network as the graph that a deployment is made of.

    Raises:
        DeployError: it was traced in parts.
    """
    if not isinstance(gated, fx.GraphModule):
        raise DeployError(
            "this network cannot be traced as a whole, and only networks that can are deployed; its gates work in "
            "PyTorch as they are (gatefit.load), or rewrite its forward without what cannot be traced"
        )
    return gated


def deployed_info(network: fx.GraphModule) -> DeployedInfo:
    """Return the record of a deployed network.

    Raises:
        DeployError: gatefit did not deploy the network.
    """
    info = network.meta.get(DEPLOYED)
    if not isinstance(info, DeployedInfo):
        raise DeployError("this network is not deployed; call gatefit.deploy(gated, images) first")
    return info


def set_deployed_info(network: fx.GraphModule, info: DeployedInfo) -> None:
    """Give a deployed network its record."""
    network.meta[DEPLOYED] = info
