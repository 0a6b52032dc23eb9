"""Blocks that gather the open rows and columns of their weights."""

import pytest
import torch
from deployed import gated_network
from networks import images
from torch import fx, nn

import gatefit
from gatefit.deployment.engines.chain import ChainBlock, ChainBlocks, PlainBlock, Pooling
from gatefit.deployment.engines.gathered import GatheredBlock, GatheredConv
from gatefit.deployment.kernels.native import kernels
from gatefit.deployment.plan import BlockPlan
from gatefit.deployment.region import region_of
from gatefit.errors import DeployError
from gatefit.gating.cost import decisions_of
from gatefit.gating.gates import gates_of


class Shrinking(nn.Module):
    """A branch and a shortcut that shrink images, of odd sizes not alike."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return nn.functional.avg_pool2d(x, 2) + self.second(self.first(x).relu())


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
def test_a_branch_that_does_not_fit_its_shortcut():
    gated = gatefit.retrofit(Shrinking(), torch.zeros(2, 4, 8, 8), "lc", "step").eval()
    [gate] = gates_of(gated).values()
    blocks = ChainBlocks([ChainBlock(gated, gate, region_of(gated, gate), BlockPlan(gate.of.name, True, None))])
    with pytest.raises(DeployError, match=r"gives \(4, 5, 5\) cannot be added"):
        blocks(torch.randn(1, 4, 9, 9), torch.randn(1, 4, 4, 4))
    blocks.first.projection = PlainBlock([Pooling(2, 2, 0)])  # ends elsewhere on images of odd sizes
    with torch.no_grad():
        blocks(torch.randn(1, 4, 8, 8))
    with pytest.raises(DeployError, match=r"gives \(4, 5, 5\) cannot be added"):
        blocks(torch.randn(1, 4, 9, 9))


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted"])
def test_gathered_blocks_run_what_is_open(name):
    gated = gated_network(name)
    gate = next(iter(gates_of(gated).values()))
    torch.nn.init.zeros_(gate.block.weight)
    torch.nn.init.ones_(gate.block.bias)
    region = region_of(gated, gate)
    block = GatheredBlock(gated, gate, region, BlockPlan(gate.of.name, True, None))
    ran = []
    for conv in block.variant.modules():
        if isinstance(conv, GatheredConv):
            conv.register_forward_hook(lambda m, args, out, into=ran: into.append((args[0].shape[1], out.shape[1])))
    interpreter = fx.Interpreter(gated, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(images(9))
        block(interpreter.env[region.entry], interpreter.env[region.shortcut])
    opened = decisions_of(gated).blocks[gate.of.name]
    counts = opened.units.sum(1)[opened.runs].tolist()
    convs = len(ran) // len(counts)
    assert [out for _, out in ran[::convs]] == counts and [given for given, _ in ran[1::convs]] == counts
