"""Blocks run what each image needs and leave out what is closed."""

import pytest
import torch
from deployed import gated_network, macs, same, set_all
from networks import images, make

import gatefit
from gatefit.deployment.dynamic import DynamicBlock
from gatefit.deployment.info import deployed_info
from gatefit.gating.cost import costs_of, decisions_of
from gatefit.gating.gates import gates_of


@pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted", "pre-activation", "squeeze-excite"])
def test_in_the_parallel_placement_first_layers_run_whole(name):
    """And nothing else that is closed: counted by torch's own counter, beside the closed form."""
    gated = gated_network(name)
    for gate in gates_of(gated).values():
        gate.block.weight.data.fill_(1e-9)
        gate.block.bias.data.fill_(1.0)
        gate.channel.weight.data.zero_()
        gate.channel.bias.data[::2] = -1.0
    costs = costs_of(gated, tuple(images(1).shape[1:]))
    for closed in (0, 1):
        for gate in list(gates_of(gated).values())[:closed]:
            gate.block.bias.data.fill_(-1.0)
        with torch.no_grad():
            gated(images(1))
        opened = decisions_of(gated)
        for placement in ("sequential", "parallel"):
            deployed = gatefit.deploy(gated, images(4), tuned=False, placement=placement)
            assert all(plan.parallel == (placement == "parallel") for plan in deployed_info(deployed).plans)
            assert macs(deployed) == float(costs.per_image(opened, placement))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_deployed_on_cuda(placement):
    gated = gated_network("basic").cuda()
    deployed = gatefit.deploy(gated, images(8).cuda(), placement=placement)
    with torch.no_grad():
        for others in (images(9, seed=5).cuda(), images(1, seed=6).cuda()):
            assert same(deployed(others), gated(others))


@pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted", "grouped", "squeeze-excite"])
def test_what_is_closed_is_not_computed(name):
    """Half of the channels closed for good, every block skipped, or gone: counted by torch's own counter."""
    gated = gated_network(name)
    set_all(gated, 1.0)
    for gate in gates_of(gated).values():
        if gate.channel is not None:
            gate.channel.bias.data[::2] = -1
    dense = macs(make(name))
    half = macs(gatefit.deploy(gated, images(), tuned=False))
    set_all(gated, -1.0)
    none = macs(gatefit.deploy(gated, images(), tuned=False))
    assert none < half < dense
    closed = sum(b.macs for b in gatefit.find_blocks(make(name), images()).blocks)
    assert none == dense - closed  # no image can open them
    for gate in gates_of(gated).values():
        gate.block.weight.data.fill_(1e-9)
    none = macs(gatefit.deploy(gated, images(), tuned=False))
    assert none == dense - closed + sum(g.macs for g in gates_of(gated).values())


def test_samples_that_need_the_same_run_together():
    gated = gated_network("basic")
    deployed = gatefit.deploy(gated, images(16), tuned=False)
    block = next(m for m in deployed.modules() if isinstance(m, DynamicBlock))
    seen = []
    for variant in block.variants:
        variant.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    with torch.no_grad():
        deployed(images(16))
    assert len(seen) <= len(block.variants) and sum(seen) <= 16
