import pytest
import timm
import torch
from networks import GATABLE, images, make
from torch.utils.flop_counter import FlopCounterMode

import gatefit
from gatefit.decisions import BlockDecision, Decisions
from gatefit.gating.cost import costs_of, decisions_of
from gatefit.gating.gates import gates_of
from gatefit.gating.threshold import smallest_share

STEM = 3 * 8 * 9 * 64
HEAD = 8 * 10
CONV = 8 * 8 * 9 * 64
"""MACs of the table's stem, its head, and an 8 to 8 channel 3x3 convolution, at 8x8 pixels."""


def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2 // len(x)


@pytest.mark.parametrize("name", GATABLE)
def test_dense_macs_are_those_of_torch(name):
    model = make(name)
    found = gatefit.find_blocks(model, images())
    spare = CONV if name == "unused state" else 0  # gatefit drops the dead call, torch counts it
    assert found.macs == flops(model, images()) - spare


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "resnext50_32x4d", "tf_efficientnet_lite0"])
def test_dense_macs_of_real_networks(name):
    model = timm.create_model(name).eval()
    assert gatefit.find_blocks(model).macs == flops(model, torch.zeros(1, 3, 224, 224))


def opened(gated, block, units):
    """Open or close the gates by hand and run two images."""
    for gate in gates_of(gated).values():
        if gate.block is not None:
            gate.block.bias.data.fill_(1 if block else -1)
        if gate.channel is not None:
            gate.channel.bias.data.fill_(-1)
            gate.channel.bias.data[:units] = 1
    gated(images(2))
    costs = costs_of(gated, (3, 8, 8))
    both = [costs.per_image(decisions_of(gated), p) for p in ("sequential", "parallel")]
    assert all(t[0] == t[1] for t in both)
    return int(both[0][0]), int(both[1][0])


def test_basic_block_by_hand():
    from networks import Basic, Network

    gated = gatefit.retrofit(Network(Basic(8, 8)).eval(), images())
    gate = 8 * 1 + 8 * 8
    assert opened(gated, True, 8) == (STEM + HEAD + gate + 2 * CONV,) * 2
    assert opened(gated, True, 2) == (STEM + HEAD + gate + CONV // 2, STEM + HEAD + gate + CONV + CONV // 4)
    assert opened(gated, False, 8) == (STEM + HEAD + gate, STEM + HEAD + gate + CONV)


def test_bottleneck_by_hand():
    gated = gatefit.retrofit(make("bottleneck"), images())
    gate = 8 * 1 + 8 * 4
    one, two, three = 8 * 4 * 64, 4 * 4 * 9 * 64, 4 * 8 * 64
    rest = STEM + HEAD + gate
    assert opened(gated, True, 4) == (rest + one + two + three,) * 2
    # only conv1's rows and conv2's columns close; conv3 reads conv2's channels, which stay
    assert opened(gated, True, 1) == (rest + one // 4 + two // 4 + three, rest + one + two // 4 + three)
    assert opened(gated, False, 4) == (rest, rest + one)


def test_inverted_residual_by_hand():
    gated = gatefit.retrofit(make("inverted"), images())
    gate = 8 * 1 + 8 * 24
    expand, depthwise, project = 8 * 24 * 64, 24 * 9 * 64, 24 * 8 * 64
    rest = STEM + HEAD + gate
    third = (expand // 3, depthwise // 3 + project // 3)
    assert opened(gated, True, 8) == (rest + sum(third), rest + expand + third[1])


def test_grouped_convolution_by_hand():
    gated = gatefit.retrofit(make("grouped"), images())
    gate = 8 * 1 + 8 * 4
    one, two, three = 8 * 16 * 64, 16 * 4 * 9 * 64, 16 * 8 * 64
    rest = STEM + HEAD + gate
    assert opened(gated, True, 1) == (rest + (one + two + three) // 4, rest + one + (two + three) // 4)


def test_a_fill_is_counted():
    plain, compensated = (gatefit.retrofit(make("bottleneck"), images(), compensation=f) for f in (False, True))
    gates = [costs_of(g, (3, 8, 8)).blocks[0].gate for g in (plain, compensated)]
    assert gates[1] - gates[0] == 4 * 4  # 4 units into conv2's 4 channels


def test_block_and_channel_saliences_combine():
    gated = gatefit.retrofit(make("basic"), images())
    costs = costs_of(gated, (3, 8, 8))
    blocks = {
        "blocks.0": BlockDecision(torch.tensor([True, False]), torch.ones(2, 8, dtype=torch.bool)),
        "blocks.1": BlockDecision(torch.tensor([True, True]), torch.zeros(2, 16, dtype=torch.bool)),
    }
    macs = costs.per_image(Decisions(blocks))
    first, second = costs.blocks
    assert macs[0] - macs[1] == first.branch
    assert macs[1] == costs.base + first.gate + second.gate


def test_a_skipped_block_skips_the_block_in_it():
    gated = gatefit.retrofit(make("nested"), images())
    costs = costs_of(gated, (3, 8, 8))
    assert {b.name: b.parent for b in costs.blocks} == {"blocks.0": None, "blocks.0.inner": "blocks.0"}
    gates_of(gated)["blocks.0"].block.bias.data.fill_(-1)
    gated(images(2))
    outer = next(b for b in costs.blocks if b.name == "blocks.0")
    assert costs.per_image(decisions_of(gated)).tolist() == [costs.base + outer.gate] * 2
    assert costs.dense == STEM + HEAD + 3 * CONV
    # What no image runs is not told as open either, and the guard's smallest share counts it as skipped.
    result = gatefit.evaluate(gated, (images(2), torch.zeros(2, dtype=torch.long)))
    assert {g.name: g.block_open for g in result.gates} == {"blocks.0": 0, "blocks.0.inner": 0}
    assert smallest_share(costs, 0.0) == (costs.base + outer.gate) / costs.dense


@pytest.mark.parametrize("name", ["shared weights", "tied"])
def test_weights_that_are_used_again_count_each_time(name):
    gated = gatefit.retrofit(make(name), images())
    costs = costs_of(gated, (3, 8, 8))
    assert costs.base == STEM + HEAD and costs.dense == flops(make(name), images())


def test_macs_follow_the_image_size():
    gated = gatefit.retrofit(make("basic"), images())
    small, large = costs_of(gated, (3, 8, 8)), costs_of(gated, (3, 16, 16))
    assert large.blocks[0].branch == 4 * small.blocks[0].branch
    assert large.blocks[0].gate == small.blocks[0].gate
