"""Networks without a residual block: channel gates between layers that follow each other."""

import pytest
import torch
import torch.nn.functional as F
from networks import Plain, conv, images
from torch import Tensor, nn

import gatefit
from gatefit.errors import ConversionError
from gatefit.gating.cost import costs_of, decisions_of
from gatefit.gating.gates import gates_of
from gatefit.gating.info import info_of
from gatefit.recipe import ClosingPart, FinetunePart


class Separable(nn.Module):
    """A MobileNetV1: depthwise layers stand between the pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.point = conv(3, 16), conv(16, 16, groups=16), conv(16, 24, 1)
        self.bn, self.head = nn.BatchNorm2d(16), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn(self.depthwise(self.stem(x))))
        return self.head(F.relu(self.point(x)).mean((2, 3)))


def _made(kind=Plain, **options):
    torch.manual_seed(0)
    model = kind(**options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.bias)
    return model


NETWORKS = {
    "batch norm": (lambda: _made(), {"features.0": 8, "features.7": 16}),
    "bias": (lambda: _made(norm=False), {"features.0": 8, "features.5": 16}),
    "depthwise": (lambda: _made(Separable), {"stem": 16}),
}


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_pairs_are_gated_and_proved(name, compensation):
    make, units = NETWORKS[name]
    model = make()
    gated = gatefit.retrofit(model, images(), "c", compensation=compensation).eval()
    assert {n: g.of.units for n, g in gates_of(gated).items()} == units
    assert torch.equal(model(images(5)), gated(images(5)))
    assert info_of(gated).verification.closed_units == sum(u // 2 for u in units.values())


@pytest.mark.parametrize("gates", ["lc", "l"])
def test_block_gates_say_what_is_missing(gates):
    with pytest.raises(ConversionError, match=r"Plain has no residual block.*2 pairs of layers: gates 'c'"):
        gatefit.retrofit(_made(), images(), gates)


def test_each_layer_is_in_one_pair_and_costs_what_is_open():
    model = _made()
    found = gatefit.find_blocks(model, images())
    layers = [layer.name for b in found.blocks for layer in b.layers]
    assert len(layers) == len(set(layers)) == 4 and found.block_share == 0 < found.channel_share < 1
    gated = gatefit.retrofit(model, images(), "c").eval()
    costs = costs_of(gated, (3, 8, 8))
    assert costs.dense == found.macs
    gates = gates_of(gated)
    gates["features.0"].channel.bias.data[:4] = -1
    gated(images(3))
    saved = costs.dense + sum(b.gate for b in costs.blocks) - float(costs.per_image(decisions_of(gated))[0])
    assert saved == next(b.macs for b in found.blocks if b.name == "features.0") / 2


def test_a_gate_that_costs_as_much_as_it_saves_is_not_made():
    """A linear layer of 64 to 24 reads a flat input: its gate would have as many weights."""
    assert "classifier.0" not in gates_of(gatefit.retrofit(_made(), images(), "c"))


def test_a_network_with_a_residual_block_has_no_pairs():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d, self.head = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.b(F.relu(self.a(x))))
            return self.head((x + self.d(F.relu(self.c(x)))).mean((2, 3)))

    assert [b.has_shortcut for b in gatefit.find_blocks(Residual(), images()).blocks] == [True]


def test_the_steps_of_a_conversion(tmp_path):
    model = _made()
    data = (images(64), torch.arange(64) % 5)
    gated = gatefit.retrofit(model, images(), "c", "step", compensation=True)
    settings = FinetunePart(epochs=1, batch_size=16, augment=False)
    gatefit.finetune(gated, data, model, settings=settings, closing=ClosingPart(target=0.7))
    assert 0.5 < gatefit.evaluate(gated, data, model).share < 0.9
    gatefit.save(gated, tmp_path)
    assert torch.equal(gatefit.load(tmp_path, _made())(images(3)), gated(images(3)))
