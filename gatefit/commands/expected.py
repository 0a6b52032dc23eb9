"""What a conversion can gain on this machine, measured before it is paid for."""

import copy

import torch
from torch import nn

from gatefit.deployment.bench.what_if import set_share
from gatefit.deployment.deploy import expected_latency
from gatefit.deployment.plan import Latency
from gatefit.errors import first_line
from gatefit.gating.cost import costs_of
from gatefit.gating.info import GateKinds
from gatefit.gating.insert import rewrite

IMAGES = 16
"""Of noise, which random gates tell apart."""
SMALL = 2e6
"""MACs of a network that takes less than a millisecond: what it takes beside them decides its time."""


def expected(model: nn.Module, shape: tuple[int, ...], share: float, gates: GateKinds = "lc") -> Latency | None:
    """Give a copy of a network random gates that leave a share of its MACs, and time it beside itself on this CPU.

    The state of torch's random numbers stays as it is.

    Args:
        model: untouched.
        shape: of an image, (C, H, W).
        share: of the MACs.
        gates: which gates it is to get.

    Returns:
        Milliseconds for one image; None where the network is too small for it to mean anything.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        gated = rewrite(copy.deepcopy(model).cpu().eval(), torch.zeros(2, *shape), gates, "step").eval()
        if costs_of(gated, shape).dense < SMALL:
            return None
        images = torch.randn(IMAGES, *shape) + torch.randn(IMAGES, shape[0], 1, 1)
        set_share(gated, images, share)
        return expected_latency(gated, images)


def expectation(model: nn.Module, shape: tuple[int, ...], share: float, gates: GateKinds = "lc") -> str:
    """Say in one line what `expected` found, whatever happens."""
    if not 0 < share < 1:
        return "expected time: not measured, as no share of the MACs between 0 and 1 is asked for"
    try:
        latency = expected(model, shape, share, gates)
    except Exception as error:  # an estimate must not stop what it is an estimate for
        return f"expected time: not measured: {first_line(error)[:120]}"
    if latency is None:
        return "expected time: not measured; so small a network takes less than a millisecond, and gates rarely pay"
    figures = f"{latency.deployed:.2f} ms an image instead of {latency.original:.2f} ms ({latency.engine})"
    if latency.deployed >= latency.original:
        return f"expect no gain in time on this CPU at {share:.0%} of the MACs: {figures}, with random gates"
    part = latency.deployed / latency.original
    return f"expect {part:.0%} of the time on this CPU at {share:.0%} of the MACs: {figures}, with random gates"
