"""Deployed networks answer as the gated ones do, for every image and every mask, and leave out what is closed."""

import contextlib
import copy
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from networks import CASES, GATABLE, images, make
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import gatefit
from gatefit.commands import deploy as deployment_folder
from gatefit.commands.deploy import load_deployed, write_deployment
from gatefit.deployment.bench.baselines import BF16, dense_engines
from gatefit.deployment.bench.memory import held_by, peak_of
from gatefit.deployment.bench.what_if import keep_open, set_share
from gatefit.deployment.codebook import assign, choose_codebook, expected_units, most_frequent
from gatefit.deployment.dynamic import DynamicBlock
from gatefit.deployment.engines.chain import ChainBlock, ChainBlocks, PlainBlock, Pooling
from gatefit.deployment.engines.gathered import GatheredBlock, GatheredConv
from gatefit.deployment.engines.join import join_chains
from gatefit.deployment.engines.native_network import gathered_blocks, gathered_network
from gatefit.deployment.engines.prepack import PackedConv
from gatefit.deployment.engines.runtimes import OnnxNetwork, masked_onnx, packed
from gatefit.deployment.engines.segments import ONNX, TORCH, OnnxSegment, TorchSegment
from gatefit.deployment.kernels.native import kernels, threads, torch_alone
from gatefit.deployment.plan import BlockPlan, never_closes, observe, plan_block
from gatefit.deployment.region import region_of, region_or_none
from gatefit.deployment.tune import forms_of
from gatefit.errors import DeployError
from gatefit.gating.cost import costs_of, decisions_of
from gatefit.gating.gates import gates_of
from gatefit.graph.fold import fold_batch_norms

FORMS = ["relu1", "step"]


def gated_network(name, form="step", compensation=False, spread=1.0):
    """A small network whose gates open and close at random, image by image."""
    gated = gatefit.retrofit(make(name), images(), "lc", form, compensation)
    torch.manual_seed(2)
    for gate in gates_of(gated).values():
        for fc in gate.layers:
            torch.nn.init.normal_(fc.weight, std=3.0)
            torch.nn.init.normal_(fc.bias, std=spread)
        if gate.compensation is not None:
            torch.nn.init.normal_(gate.compensation.weight, std=0.1)
    return gated.eval()


def plans_for(gated, x):
    return {n: plan_block(gated, gates_of(gated)[n], seen, 4) for n, seen in observe(gated, [x]).items()}


def in_our_kernels(network, *shape):
    """A gated network whose gates open and close at random, six images, its plans, and deployed."""
    torch.manual_seed(0)
    gated = gatefit.retrofit(network(), torch.zeros(2, *shape), "lc", "step", compensation=True).eval()
    for gate in gates_of(gated).values():
        torch.nn.init.normal_(gate.channel.weight, std=3.0)
        torch.nn.init.normal_(gate.block.weight, std=3.0)
    x = torch.randn(6, *shape)
    plans = plans_for(gated, x)
    return gated, x, plans, gathered_network(gated, plans, [x])


def set_all(gated, value):
    with torch.no_grad():
        for gate in gates_of(gated).values():
            for fc in gate.layers:
                fc.weight.zero_()
                fc.bias.fill_(value)


def same(a, b):
    largest = float(b.abs().max()) if len(b) else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5 * largest)


@contextlib.contextmanager
def running_on(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GATABLE)
def test_exact_for_images_outside_the_calibration_set(name, form, compensation):
    gated = gated_network(name, form, compensation)
    deployed = gatefit.deploy(gated, images(8), tuned=False)
    others = images(9, seed=5)
    with torch.no_grad():
        wanted = gated(others)
        assert same(deployed(others), wanted)
        assert same(torch.cat([deployed(x) for x in others.split(1)]), wanted)
        assert same(deployed(others.flip(0)), wanted.flip(0))


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GATABLE)
def test_the_parallel_placement_is_exact(name, form, compensation):
    gated = gated_network(name, form, compensation)
    if not any(region_or_none(gated, gate) for gate in gates_of(gated).values()):
        with pytest.raises(gatefit.GatefitError, match="no block has a first layer"):
            gatefit.deploy(gated, images(8), tuned=False, placement="parallel")
        return
    deployed = gatefit.deploy(gated, images(8), tuned=False, placement="parallel")
    others = images(9, seed=5)
    with torch.no_grad():
        assert same(deployed(others), gated(others))
        assert same(torch.cat([deployed(x) for x in others.split(1)]), gated(others))


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
            assert all(plan.parallel == (placement == "parallel") for plan in deployed.meta["plans"])
            assert macs(deployed) == float(costs.per_image(opened, placement))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_deployed_on_cuda(placement):
    gated = gated_network("basic").cuda()
    deployed = gatefit.deploy(gated, images(8).cuda(), placement=placement)
    with torch.no_grad():
        for others in (images(9, seed=5).cuda(), images(1, seed=6).cuda()):
            assert same(deployed(others), gated(others))


@pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted", "squeeze-excite"])
def test_packed_convolutions(name):
    """With their activation, and what they are added to; and again after a copy, which packs anew."""
    model = make(name).eval()
    network = packed(fold_batch_norms(model, images()))
    convs = [m for m in network.modules() if isinstance(m, PackedConv)]
    x = images(3, seed=4)
    with torch.no_grad():
        wanted = model(x)
        assert same(network(x), wanted) and same(copy.deepcopy(network)(x), wanted)
        assert convs and all(c.packed.is_mkldnn for c in convs)
        with torch.backends.mkldnn.flags(enabled=False):
            assert same(copy.deepcopy(network)(x), wanted)
    deployed = gatefit.deploy(gated_network(name), images(8), tuned=False)
    variants = [n for m in deployed.modules() if isinstance(m, DynamicBlock) for w in m.variants for n in w.graph.nodes]
    assert not any(n.target is torch.add for n in variants) or name == "squeeze-excite"


@pytest.mark.parametrize("value", [1.0, -1.0])
@pytest.mark.parametrize("name", ["basic", "inverted", "grouped", "squeeze-excite"])
def test_all_open_and_all_closed(name, value):
    gated = gated_network(name)
    set_all(gated, value)
    deployed = gatefit.deploy(gated, images(), tuned=False)
    with torch.no_grad():
        assert same(deployed(images(3, seed=7)), gated(images(3, seed=7)))


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


def macs(network):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):  # it does not know packed ones
        network(images(1))
    return counter.get_total_flops() // 2


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "shape",
    [
        (6, 16, 24, 3),
        (5, 9, 11, 3),
        (7, 4, 4, 3),
        (13, 5, 8, 1),
        (8, 14, 14, 1),
        (6, 7, 7, 5),
        (700, 7, 7, 1),
        (9, 9, 9, 1),
        (5, 7, 1, 3),
    ],
)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_gathered_convolution(shape, stride):
    """Of some rows and some columns, two images at once, with a shortcut; and with no column at all."""
    channels, height, width, size = shape
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(channels, 20, size, stride, size // 2)
    rows, columns = torch.tensor([0, 3, 4, 7, 11, 12, 19]), torch.tensor([0, 2, 4])
    x = torch.randn(2, channels, height, width)
    with torch.no_grad():
        whole = conv(x)
        assert same(GatheredConv(conv)(x), whole)
        conv.weight.data[:, [c for c in range(channels) if c not in columns.tolist()]] = 0
        some = conv(x)[:, rows]
        added = torch.randn(some.shape)
        gathered = GatheredConv(conv, "relu")
        assert same(gathered(x[:, columns], added, rows, columns), (some + added).relu())
        none = gathered(x[:, :0], None, rows, columns[:0])
        assert same(none, conv.bias[rows, None, None].relu().expand_as(none))


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("size", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("image", [(9, 21), (7, 7), (40, 33)])
def test_a_gathered_depthwise_convolution(size, stride, image):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(12, 12, size, stride, size // 2, groups=12)
    rows, x = torch.tensor([1, 2, 5, 11]), torch.randn(2, 12, *image)
    with torch.no_grad():
        whole = conv(x).clamp(0, 6)
        assert same(GatheredConv(conv, "hardtanh")(x), whole)
        assert same(GatheredConv(conv, "hardtanh")(x[:, rows], None, rows), whole[:, rows])
        assert same(GatheredConv(conv, "swish")(x), torch.nn.functional.silu(conv(x)))


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("sizes", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)])
@pytest.mark.parametrize("image", [(9, 21), (7, 7), (40, 67)])
def test_max_pooling(sizes, image):
    torch.manual_seed(0)
    x = torch.randn(3, 5, *image) - 3.0  # below 0, which no border may be
    x[0, 1, 2, 3] = float("nan")
    with torch.no_grad():
        for threads in (1, 2):
            with running_on(threads):
                pooled = ChainBlocks([PlainBlock([Pooling(*sizes)])])(x)
                torch.testing.assert_close(pooled, nn.MaxPool2d(*sizes)(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GATABLE)
def test_gathered_networks_are_exact(name, form, compensation, monkeypatch):
    """Where a block cannot be gathered, its codebook serves."""
    monkeypatch.setattr("gatefit.deployment.engines.segments.has_onnx", lambda: False)
    gated = gated_network(name, form, compensation)
    plans = plans_for(gated, images(8))
    deployed = gathered_network(gated, plans, [images(8)])
    others = images(9, seed=5)
    with torch.no_grad():
        assert same(deployed(others), gated(others))
    if name in ("basic", "bottleneck", "inverted"):
        kind = ChainBlock if form == "step" and name != "inverted" else GatheredBlock  # its activation is SiLU
        assert sum(isinstance(m, kind) for m in deployed.modules()) == len(gates_of(gated))
        with torch.no_grad():
            assert same(copy.deepcopy(deployed)(others), gated(others))
            assert same(deployed.to(memory_format=torch.channels_last)(others), gated(others))


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


def _check_narrow(network, channels, height, width, threads, batches=(1, 5)):
    torch.manual_seed(0)
    gated = gatefit.retrofit(network, torch.zeros(2, channels, 8, 8), "lc", "step", compensation=True).eval()
    [gate] = gates_of(gated).values()
    torch.nn.init.normal_(gate.channel.weight, std=3.0)
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


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
def test_kernels_called_from_several_threads_and_after_a_fork():
    conv = GatheredConv(nn.Conv2d(32, 32, 3, padding=1))
    x = torch.randn(1, 32, 24, 24)
    with torch.no_grad(), running_on(2):
        expected = conv(x)
        with ThreadPoolExecutor(4) as callers:
            assert all(torch.equal(y, expected) for y in callers.map(lambda _: conv(x), range(200)))
        child = os.fork()  # it has none of its parent's threads, and must not wait for them
        if not child:
            try:
                os._exit(0 if torch.equal(conv(x), expected) else 1)
            finally:
                os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(kernels() is None or sys.platform != "linux", reason="no C++ compiler, or OpenMP out of reach")
def test_pytorch_runs_on_one_thread_between_blocks_and_kernels_on_all():
    gated = gated_network("basic")
    plans = plans_for(gated, images(8))
    count = len(gathered_network(gated, plans, [images(1)]).meta["engines"])
    network = gathered_network(gated, plans, [images(1)], [TORCH] * count)
    seen = []
    for segment in network.modules():
        if isinstance(segment, TorchSegment):
            segment.segment.register_forward_hook(lambda *_: seen.append((torch.get_num_threads(), threads())))
    with torch.no_grad(), running_on(2):
        network(images(3))
        assert set(seen) == {(1, 2)}
        with pytest.raises(RuntimeError), torch_alone(), torch_alone():
            assert torch.get_num_threads() == 1
            with ThreadPoolExecutor(1) as other:
                assert other.submit(torch.get_num_threads).result() == 2
            raise RuntimeError
        assert torch.get_num_threads() == threads() == 2


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["basic", "inverted", "squeeze-excite"])
def test_what_lies_between_blocks_in_either_engine(name, tmp_path):
    pytest.importorskip("onnxruntime")
    gated = gated_network(name)
    plans = plans_for(gated, images(8))
    count = len(gathered_network(gated, plans, [images(1)]).meta["engines"])
    for engine in (TORCH, ONNX):
        deployed = gathered_network(gated, plans, [images(1)], [engine] * count)
        assert set(deployed.meta["engines"]) == {engine}
        every = {n: True for n in gates_of(gated)}
        assert gathered_blocks(deployed) == ({} if name == "squeeze-excite" else every)  # codebooks serve that one
        assert sum(isinstance(m, OnnxSegment) for m in deployed.modules()) == (count if engine == ONNX else 0)
        for others in (images(9, seed=5), images(1, seed=6), torch.randn(2, 3, 24, 20)):
            with torch.no_grad():
                assert same(deployed(others), gated(others))
                assert same(copy.deepcopy(deployed)(others), gated(others))
    gatefit.save(gated, tmp_path)
    write_deployment(tmp_path, tuple(plan for plan, _ in plans.values()), deployed.meta["engines"])
    with torch.no_grad():
        assert torch.equal(load_deployed(tmp_path, make(name))(images(3)), deployed(images(3)))


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


def test_a_codebook_covers_every_image():
    torch.manual_seed(0)
    kinds = torch.rand(3, 32) < 0.4
    opens = kinds[torch.randint(3, (200,))] & (torch.rand(200, 32) < 0.95)
    possible = torch.ones(32, dtype=torch.bool)
    book = choose_codebook(opens, 4)
    assert len(book) <= 4 and book[-1].all() and (book.sum(1).diff() > 0).all()
    strangers = torch.rand(100, 32) < 0.5
    for some in (opens, strangers):
        assert not (some & ~book[assign(some, book)]).any()
    assert expected_units(opens, book) < 0.75 * 32
    assert expected_units(opens, choose_codebook(opens, 1)) == 32
    exact, covered = most_frequent(kinds[torch.randint(3, (50,))], 4, possible)
    assert covered == 1.0 and len(exact) == 4


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


def test_nothing_to_deploy():
    with pytest.raises(gatefit.GatefitError, match="has no gates"):
        gatefit.deploy(make("basic"), images())
    with pytest.raises(gatefit.GatefitError, match="calibration"):
        gatefit.deploy(gated_network("basic"), [])
    with pytest.raises(gatefit.GatefitError, match="placement must be"):
        gatefit.deploy(gated_network("basic"), images(), placement="beside")
    with pytest.raises(gatefit.GatefitError, match="needs the backend 'torch'"):
        gatefit.deploy(gated_network("basic"), images(), "onnx", placement="parallel")
    assert set(GATABLE) <= set(CASES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted", "grouped", "squeeze-excite"])
def test_one_file_for_onnx_runtime(name, form):
    pytest.importorskip("onnxruntime")
    gated = gated_network(name, form, compensation=True)
    deployed = gatefit.deploy(gated, images(8), "onnx", tuned=False)
    others = images(9, seed=5)
    with torch.no_grad():
        assert same(deployed(others), gated(others))


def test_a_file_without_control_flow():
    pytest.importorskip("onnxruntime")
    import onnx

    gated = gated_network("basic", compensation=True)
    model = masked_onnx(gated, images(1))
    assert "If" not in {n.op_type for n in onnx.load_from_string(model).graph.node}
    with torch.no_grad():
        assert same(OnnxNetwork(model)(images(5, seed=3)), gated(images(5, seed=3)))
    with pytest.raises(gatefit.GatefitError, match=r"takes images of shape.*deploy anew"):
        OnnxNetwork(model)(torch.zeros(1, 3, 5, 5))
    with pytest.raises(gatefit.GatefitError, match="cannot read the file"):
        OnnxNetwork(model[: len(model) // 2])


@pytest.mark.parametrize(("backend", "batch"), [("torch", 1), ("torch", 12), ("onnx", 1)])
def test_tuned(backend, batch):
    """Whatever the clock chooses, outputs stay."""
    gated = gated_network("basic")
    deployed = gatefit.deploy(gated, images(8), backend, batch=batch)
    with torch.no_grad():
        assert same(deployed(images(5, seed=3)), gated(images(5, seed=3)))


def test_harvest_drops_what_no_calibration_image_opens():
    gated = gated_network("basic", spread=0.0)
    few = images(2)
    pruned = gatefit.deploy(gated, few, masks=1, prune_unused=True)
    books = [p.codebook for p in pruned.meta["plans"] if p.codebook is not None]
    assert books and any(not book.all() for book in books)
    assert all(book.all() for p in gatefit.deploy(gated, few, masks=1).meta["plans"] for book in p.codebook[-1:])
    with torch.no_grad():
        assert same(pruned(few), gated(few)) and not same(pruned(images(9, seed=5)), gated(images(9, seed=5)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_memory_is_what_is_held_and_what_a_run_takes():
    made, held = held_by(lambda: torch.ones(20_000_000))
    assert made.numel() == 20_000_000 and 60 < held < 120
    found = peak_of(lambda: torch.ones(20_000_000).sum())
    assert found is None or 60 < found < 120


def test_dense_engines_answer_alike():
    network = make("basic").eval()
    x = images(3)
    with torch.no_grad():
        for name, engine in dense_engines(network, x).items():
            allowed = 0.1 if name == BF16 else 1e-4
            assert float((engine()(x) - network(x)).abs().max()) < allowed * float(network(x).abs().max())


def test_forms_of_a_block():
    book = torch.tensor([[True, False], [True, True]])
    forms = forms_of(BlockPlan("b", True, book))
    assert [(f.skip, len(f.codebook)) for f in forms] == [(True, 2), (True, 1), (False, 2), (False, 1)]
    assert [f.dynamic for f in forms] == [True, True, True, False]
    assert len(forms_of(BlockPlan("b", False, None))) == 1


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_a_deployment_in_a_folder(tmp_path, placement):
    gated = gatefit.retrofit(timm.create_model("test_resnet").eval(), torch.zeros(2, 3, 32, 32), "lc", "step")
    for gate in gates_of(gated).values():
        for fc in gate.layers:
            torch.nn.init.normal_(fc.weight, std=3.0)
    calibration = torch.randn(8, 3, 32, 32)
    deployed = gatefit.deploy(gated.eval(), calibration, tuned=False, placement=placement)
    gatefit.save(gated, tmp_path)
    write_deployment(tmp_path, deployed.meta["plans"])
    with torch.no_grad():
        assert torch.equal(load_deployed(tmp_path)(calibration), deployed(calibration))
    assert all(p.parallel == (placement == "parallel") for p in load_deployed(tmp_path).meta["plans"])
    (tmp_path / "deployment.json").write_text('{"format": 4}')
    with pytest.raises(gatefit.GatefitError, match="damaged"):
        load_deployed(tmp_path)
    with pytest.raises(gatefit.GatefitError, match="no file"):
        load_deployed(tmp_path / "nowhere")


def test_a_placebo_is_open_for_all_its_images_but_not_for_good():
    gated = gatefit.retrofit(make("basic"), images(), "lc", "step").eval()
    keep_open(gated, images(8))
    gated(images(8))
    for name, opened in decisions_of(gated).blocks.items():
        assert opened.runs.all() and opened.units.all()
        assert not never_closes(gates_of(gated)[name])


def test_what_if_reaches_its_share():
    gated = gatefit.retrofit(make("basic"), images(), "lc", "step").eval()
    many = images(64) + images(64, seed=9)[:, :, :1, :1]
    assert set_share(gated, many, 0.6) == pytest.approx(0.6, abs=0.05)


def test_an_original_that_cannot_be_had_in_one_engine_is_timed_in_the_others(monkeypatch):
    def fails():
        raise RuntimeError("no such engine here")

    made = {"broken": fails, "plain": lambda: torch.nn.Identity()}
    monkeypatch.setattr(deployment_folder, "dense_engines", lambda original, images: made)
    images = torch.rand(4, 3, 8, 8)
    found = deployment_folder._latency(torch.nn.Identity(), torch.nn.Identity(), images, 2, set(made))
    assert found is not None and found.engine == "plain" and found.batch == 2
    assert deployment_folder._latency(torch.nn.Identity(), torch.nn.Identity(), images, 2, {"broken"}) is None
