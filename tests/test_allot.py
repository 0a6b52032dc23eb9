import pytest
import torch
from networks import Basic, Network
from torch import nn

import gatefit
from gatefit.allot import allot
from gatefit.control import lower, threshold_for
from gatefit.cost import costs_of, macs_per_image, opens_of
from gatefit.distill import distillation
from gatefit.gates import gates_of
from gatefit.start import predictions

IMAGES = (64, 3, 8, 8)
TARGET = 0.6


def random_gates(fill=False):
    """A gated network whose first block matters little and whose gates do not know."""
    torch.manual_seed(0)
    model = Network(Basic(8, 8), Basic(8, 8), Basic(8, 8)).eval()
    first = next(m for m in model.modules() if isinstance(m, Basic))
    last_norm = [m for m in first.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    last_norm.weight.data.mul_(0.01)
    gated = gatefit.retrofit(model, torch.zeros(2, *IMAGES[1:]), "c", "step", fill)
    for gate in gates_of(gated).values():
        nn.init.normal_(gate.channel.weight, std=3.0)
    return gated.eval(), torch.randn(IMAGES)


@torch.no_grad()
def meet(gated, images, costs):
    for _ in range(3):
        gated(images)
        lower(gated, threshold_for(gated, costs, TARGET, 0.1), 0.1)
    return float(distillation(gated(images), predictions(gated, images), 4.0))


@pytest.mark.parametrize("fill", [False, True])
def test_the_macs_go_where_they_help_most(fill):
    gated, images = random_gates(fill)
    costs = costs_of(gated, IMAGES[1:])
    before = meet(gated, images, costs)
    with torch.no_grad():
        first, *others = (float(o.channel.double().mean()) for o in opens_of(gated).values())
    fell = allot(gated, images, costs, TARGET, 0.1)
    after = meet(gated, images, costs)
    opened = [float(o.channel.double().mean()) for o in opens_of(gated).values()]
    assert after < 0.8 * before and fell > 0.1
    assert opened[0] < first - 0.2 and sum(opened[1:]) > sum(others) + 0.1
    assert float(macs_per_image(costs, opens_of(gated)).mean()) / costs.dense == pytest.approx(TARGET, abs=0.02)
    assert not fill or torch.equal(
        gates_of(gated)["blocks.0"].lowered, gates_of(gated)["blocks.0"].lowered[:1].expand(8)
    )


def test_what_gates_say_of_units_stays():
    gated, images = random_gates(fill=True)
    gate = gates_of(gated)["blocks.1"]
    x = torch.randn(5, 8)
    before = gate.predicted(gate.channel(x)).detach()
    weight = gate.channel.weight.detach().clone()
    allot(gated, images, costs_of(gated, IMAGES[1:]), TARGET, 0.1)
    assert torch.equal(gate.channel.weight, weight) and gate.lowered.abs().max() > 0
    assert torch.allclose(gate.predicted(gate.channel(x)), before, atol=1e-5)
