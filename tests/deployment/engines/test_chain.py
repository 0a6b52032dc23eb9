"""Consecutive blocks, and the layers between them, run in one call."""

import copy

import pytest
import torch
import torch.nn.functional as F
from deployed import in_our_kernels, running_on, same
from torch import fx, nn

import gatefit
from gatefit.deployment.engines.activation import kernel_activation
from gatefit.deployment.engines.chain import ChainBlock, ChainBlocks
from gatefit.deployment.engines.join import join_chains
from gatefit.deployment.engines.native_network import gathered_network
from gatefit.deployment.kernels.native import kernels
from gatefit.deployment.plan import BlockPlan
from gatefit.deployment.region import region_of
from gatefit.errors import DeployError
from gatefit.gating.gates import gates_of


class Narrow(nn.Module):
    """A block of 3 x 3 convolutions with as many channels as registers are filled with."""

    def __init__(self, width=32, hidden=48):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, hidden, 3, padding=1), nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, x):
        return (x + self.second(self.first(x).relu())).relu()


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("height", [1, 2, 4, 5, 16])
@pytest.mark.parametrize("width", [4, 7, 8, 14, 16, 28, 32, 9])
def test_narrow_images(width, height, threads):
    _check_narrow(Narrow(), 32, height, width, threads)


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [4, 7])
def test_large_weights_of_narrow_images(size, threads):
    _check_narrow(Narrow(352, 352), 352, size, size, threads, (0, 1, 5, 35))


def _check_narrow(network, channels, height, width, threads, batches=(1, 5)):
    torch.manual_seed(0)
    gated = gatefit.retrofit(network, torch.zeros(2, channels, 8, 8), "lc", "step", compensation=True).eval()
    [gate] = gates_of(gated).values()
    nn.init.normal_(gate.channel.weight, std=3.0)
    blocks = ChainBlocks([ChainBlock(gated, gate, region_of(gated, gate), BlockPlan(gate.of.name, True, None))])
    with torch.no_grad(), running_on(threads):
        for batch in batches:
            x = torch.randn(batch, channels, height, width)
            assert same(blocks(x, x), gated(x))


class Chains(nn.Module):
    """Blocks behind each other: with a shortcut of its own, two with their input, and one whose input goes on."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Narrow(8, 8) for _ in range(4))
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.block = Narrow(8, 8)

    def forward(self, x):
        x = x.relu()
        x = (self.shortcut(x) + self.block.second(self.block.first(x).relu())).relu()
        x = self.blocks[1](self.blocks[0](x))
        x = self.blocks[2](x)
        return (x * self.blocks[3](x)).mean((2, 3))


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_behind_each_other_run_in_one_call(threads, monkeypatch):
    monkeypatch.setattr("gatefit.deployment.engines.segments.has_onnx", lambda: False)
    gated, x, plans, deployed = in_our_kernels(Chains, 8, 9, 9)
    assert [len(m.blocks) for m in deployed.modules() if isinstance(m, ChainBlocks)] == [4, 1]
    with torch.no_grad(), running_on(threads):
        for images in (x, x[:1], torch.randn(3, 8, 5, 7)):
            assert same(deployed(images), gated(images))
    gates_of(gated)["blocks.0"].block.weight.data.zero_()
    gates_of(gated)["blocks.0"].block.bias.data.fill_(-1.0)
    deployed = gathered_network(gated, plans, [x])  # the block that is gone parts none
    assert [len(m.blocks) for m in deployed.modules() if isinstance(m, ChainBlocks)] == [3, 1]
    with torch.no_grad():
        assert same(deployed(x), gated(x))


class Whole(nn.Module):
    """Gated blocks, large and small, between convolutions that are not, and with one that makes the shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.MaxPool2d(3, 1, 1), *self.separable(8, 20, 8, 1))
        self.narrow = Narrow(8, 24)
        self.between = nn.Sequential(*self.separable(8, 44, 24, 2), nn.ReLU())
        self.shortcut = nn.Conv2d(24, 144, 1, 2, bias=False)
        self.first, self.second = nn.Conv2d(24, 32, 3, 2, 1), nn.Conv2d(32, 144, 3, padding=1)
        self.large = nn.Sequential(Narrow(144, 144), Narrow(144, 144))
        self.small = nn.Sequential(nn.Conv2d(144, 16, 1), Narrow(16, 16))
        self.twice = nn.MaxPool2d(2, 1)

    @staticmethod
    def separable(into, middle, out, stride):
        yield from (nn.Conv2d(into, middle, 1), nn.ReLU6(), nn.Conv2d(middle, middle, 3, stride, 1, groups=middle))
        yield from (nn.ReLU(), nn.Conv2d(middle, out, 1))

    def forward(self, x):
        x = self.between(self.twice(self.narrow(self.twice(self.stem(x)))))
        x = (self.shortcut(x) + self.second(self.first(x).relu())).relu()
        return self.small(self.large(x)).mean((2, 3))


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_whole_network_runs_in_one_call(threads, monkeypatch):
    monkeypatch.setattr("gatefit.deployment.engines.segments.has_onnx", lambda: False)
    gated, x, _, deployed = in_our_kernels(Whole, 3, 40, 40)
    assert len(gates_of(gated)) == 5
    assert [len(m.blocks) for m in deployed.modules() if isinstance(m, ChainBlocks)] == [8]
    with torch.no_grad(), running_on(threads):
        for images in (x, x[:1], torch.randn(3, 3, 25, 34), torch.randn(37, 3, 33, 9), x[:0]):
            assert same(deployed(images), gated(images))
            assert same(copy.deepcopy(deployed)(images), gated(images))
    with pytest.raises(DeployError, match="a layer for 3 channels is given 1"):
        deployed(torch.randn(2, 1, 40, 40))
    with pytest.raises(DeployError, match="too small for this network"):
        deployed(torch.randn(2, 3, 3, 3))
    with pytest.raises(DeployError, match="must be a batch"):
        deployed(torch.randn(3, 40, 40))


class SamePool(nn.MaxPool2d):
    """As timm's: it pads by itself."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1), value=-torch.inf))


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
def test_only_plain_pooling_joins_a_chain():
    network = nn.Sequential(nn.Conv2d(3, 16, 3), SamePool(3, 2), nn.Conv2d(16, 8, 1), nn.MaxPool2d((2, 2), (1, 1)))
    joined = join_chains(fx.symbolic_trace(network.eval(), concrete_args=None))
    x = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        assert same(joined(x), network(x))


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
def test_gates_that_never_close_are_not_asked():
    gated = gatefit.retrofit(Narrow(), torch.zeros(2, 32, 9, 9), "lc", "step", compensation=True).eval()
    [gate] = gates_of(gated).values()
    block_plan = BlockPlan(gate.of.name, True, None)
    for share_open in (True, False):
        if not share_open:
            gate.channel.bias.data[3] = -1.0
        block = ChainBlock(gated, gate, region_of(gated, gate), block_plan)
        struct, _, _ = block.to_structs(kernels(), (32, 9, 9))
        assert (struct.gate_weight is None) == share_open and struct.steps[0].open_oc == 1 - share_open
        x = torch.randn(2, 32, 9, 9)
        with torch.no_grad():
            assert same(ChainBlocks([block])(x, x), gated(x))
    gate.channel.weight.data.fill_(1e-9)  # may close, but does not
    gate.channel.bias.data.fill_(1.0)
    x = torch.randn(3, 32, 16, 16)
    with torch.no_grad():
        assert same(ChainBlocks([ChainBlock(gated, gate, region_of(gated, gate), block_plan)])(x, x), gated(x))


class LeakyByFunction(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, 0.2, True)


class TanhGelu(nn.Module):
    def forward(self, x):
        return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu by tanh": TanhGelu,
    "leaky": lambda: nn.LeakyReLU(0.3),
    "leaky by function": LeakyByFunction,
    "elu": lambda: nn.ELU(0.5),
    "hardtanh": lambda: nn.Hardtanh(-0.5, 2.0),
}


class Activated(nn.Module):
    """Two blocks with an activation in the branch and behind the sum, and a stem with one."""

    def __init__(self, make):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.second = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(8, 10)
        self.acts = nn.ModuleList(make() for _ in range(6))

    def forward(self, x):
        x = self.acts[0](self.stem(x))
        x = self.acts[2](x + self.first[1](self.acts[1](self.first[0](x))))
        x = self.acts[4](x + self.second[1](self.acts[3](self.second[0](x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_networks_with_any_common_activation_run_in_one_call(name, monkeypatch):
    monkeypatch.setattr("gatefit.deployment.engines.segments.has_onnx", lambda: False)
    gated, x, _, deployed = in_our_kernels(lambda: Activated(ACTIVATIONS[name]).eval(), 3, 6, 8)
    chains = [m for m in deployed.modules() if isinstance(m, ChainBlocks)]
    assert [len(chain.blocks) for chain in chains] == [3]
    graphs = [m for m in deployed.modules() if isinstance(m, fx.GraphModule)]
    assert not any(kernel_activation(g, node) for g in graphs for node in g.graph.nodes)
    with torch.no_grad():
        for batch in (x, torch.randn(3, 3, 9, 5)):
            assert same(deployed(batch), gated(batch))
        assert same(copy.deepcopy(deployed)(x), gated(x))


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("twice", [lambda x: F.silu(F.silu(x)), lambda x: torch.relu(x.clamp(-1, 1))])
def test_two_activations_in_a_row_are_not_taken_for_one(twice, monkeypatch):
    class Twice(nn.Module):
        def forward(self, x):
            return twice(x)

    monkeypatch.setattr("gatefit.deployment.engines.segments.has_onnx", lambda: False)
    gated, x, _, deployed = in_our_kernels(lambda: Activated(Twice).eval(), 3, 6, 8)
    with torch.no_grad():
        assert same(deployed(x), gated(x))
