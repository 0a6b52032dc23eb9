"""Networks that take something else than one batch of images."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Basic, Network, images, make
from torch import nn

import gatefit
from gatefit.errors import ConversionError, GatefitError
from gatefit.gating.cost import costs_of
from gatefit.gating.gates import gates_of, outputs_of
from gatefit.gating.info import info_of


class Convolutional(nn.Module):
    """A residual block on series (1), images (2) or volumes (3), pooled and squeezed as people write it there."""

    def __init__(self, axes, c=8):
        super().__init__()
        conv, norm = getattr(nn, f"Conv{axes}d"), getattr(nn, f"BatchNorm{axes}d")
        self.conv1, self.norm, self.conv2 = conv(c, 12, 3, padding=1), norm(12), conv(12, c, 3, padding=1)
        self.pool, self.excite = getattr(nn, f"AvgPool{axes}d")(3, 1, 1), conv(12, 12, 1)

    def forward(self, x):
        y = self.pool(F.relu(self.norm(self.conv1(x))))
        weights = y.mean(tuple(range(2, y.dim())), keepdim=True)
        return x + self.conv2(y * self.excite(weights).sigmoid())


class Positional(nn.Module):
    """A residual MLP on the last axis."""

    def __init__(self, c=8):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(c), nn.Linear(c, 16), nn.Linear(16, c)

    def forward(self, x):
        return x + self.second(F.gelu(self.first(self.norm(x))))


class Two(nn.Module):
    """An image and a table, and a scale that need not be given."""

    def __init__(self):
        super().__init__()
        self.image, self.table, self.head = Network(Basic(8, 8)), Positional(), nn.Linear(18, 3)

    def forward(self, image, table, scale=None):
        y = self.head(torch.cat([self.image(image), self.table(table)], 1))
        return y if scale is None else y * scale


class OfDictionary(Two):
    def forward(self, batch):
        return super().forward(batch["image"], batch["table"])


class OfMany(Two):
    def forward(self, *inputs):
        return super().forward(inputs[0], inputs[1])


def _r(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Inputs:
    network: nn.Module
    example: Any
    args: tuple[Any, ...]
    """Others to call it with."""
    units: tuple[int, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


def _table():
    torch.manual_seed(0)
    pair, other = (_r(2, 3, 8, 8), _r(2, 8)), (_r(5, 3, 8, 8), _r(5, 8))
    named, others = ({"image": i, "table": t} for i, t in (pair, other))
    return {
        "series": Inputs(Convolutional(1), _r(2, 8, 20), (_r(5, 8, 31),), (12,)),
        "images": Inputs(Convolutional(2), _r(2, 8, 6, 6), (_r(5, 8, 7, 9),), (12,)),
        "videos": Inputs(Convolutional(3), _r(2, 8, 4, 6, 6), (_r(5, 8, 3, 7, 9),), (12,)),
        "rows": Inputs(Positional(), _r(2, 8), (_r(5, 8),), (16,)),
        "sequences": Inputs(Positional(), _r(2, 7, 8), (_r(5, 9, 8),), (16,)),
        "tokens": Inputs(
            nn.Sequential(nn.Embedding(9, 8), Positional()), torch.tensor([[1, 2]]), (torch.tensor([[8]]),), (16,)
        ),
        "two": Inputs(Two(), pair, other, (8, 16)),
        "by name": Inputs(Two(), named, (), (8, 16), tuple(others.items())),
        "with an optional one": Inputs(Two(), (*pair, _r(2, 3)), (*other, _r(5, 3)), (8, 16)),
        "a dictionary": Inputs(OfDictionary(), named, (others,), (8, 16)),
        "any number": Inputs(OfMany(), pair, other, (8, 16)),
    }


@pytest.mark.parametrize("name", _table())
def test_other_inputs(name):
    case = _table()[name]
    model = case.network.eval()
    gated = gatefit.retrofit(model, case.example)
    assert tuple(g.of.units for g in gates_of(gated).values()) == case.units
    assert info_of(gated).verification.closed_units == sum(case.units) // 2
    assert torch.equal(gated(*case.args, **dict(case.kwargs)), model(*case.args, **dict(case.kwargs)))
    assert all(len(o.channel) == len(gated(*case.args, **dict(case.kwargs))) for _, o in outputs_of(gated))
    dense = gatefit.find_blocks(model, case.example).macs
    assert costs_of(gated, info_of(gated).input.shape).dense == dense


@pytest.mark.parametrize("name", ["series", "two", "by name", "tokens"])
def test_other_inputs_are_saved(name, tmp_path):
    case = _table()[name]
    gated = gatefit.retrofit(case.network.eval(), case.example)
    gates_of(gated).popitem()[1].channel.bias.data[:3] = -1
    gatefit.save(gated, tmp_path)
    again = gatefit.load(tmp_path, case.network, case.example)
    assert torch.equal(again(*case.args, **dict(case.kwargs)), gated(*case.args, **dict(case.kwargs)))


def test_what_knows_images_alone_says_so():
    series = gatefit.retrofit(Convolutional(1).eval(), _r(2, 8, 20))
    pair = _table()["two"]
    both = gatefit.retrofit(pair.network.eval(), pair.example)
    for gated, what in ((series, r"inputs \(B, 8, 20\)"), (both, "several inputs")):
        with pytest.raises(GatefitError, match=f"takes {what}.*loop of your own"):
            gatefit.evaluate(gated, (images(4), torch.zeros(4, dtype=torch.long)))
        with pytest.raises(GatefitError, match=f"takes {what}.*loop of your own"):
            gatefit.finetune(gated, (images(4), torch.zeros(4, dtype=torch.long)), target=0.5)
        with pytest.raises(GatefitError, match=f"takes {what}.*loop of your own"):
            gatefit.deploy(gated, images(4))


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (images(2), r"more than one input \(table\); pass an example of all"),
        ({"image": images(2)}, r"more than one input \(table\)"),
        ((images(2),) * 4, "does not take the example"),
        ({"picture": images(2)}, "does not take the example.*'picture'"),
        ((), "the example holds no tensor"),
    ],
)
def test_examples_that_do_not_fit_are_named(example, reason):
    with pytest.raises(ConversionError, match=reason):
        gatefit.find_blocks(Two(), example)


def test_an_example_without_a_tensor_is_named():
    with pytest.raises(ConversionError, match="the example holds no tensor"):
        gatefit.retrofit(make("basic"), "image")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["basic", "nhwc", "two readers"])
def test_a_float_example_serves_a_network_of_another_type(name, dtype):
    model = make(name).to(dtype)
    gated = gatefit.retrofit(model, images())
    assert torch.equal(gated(images().to(dtype)), model(images().to(dtype)))
    assert costs_of(gated, (3, 8, 8)).dense == gatefit.find_blocks(model, images()).macs
