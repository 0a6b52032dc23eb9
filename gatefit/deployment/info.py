"""What a deployed network knows of itself: one typed record on its graph."""

from dataclasses import dataclass

from torch import fx

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
