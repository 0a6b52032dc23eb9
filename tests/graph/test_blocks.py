import pytest
import timm
import torch
import torchvision
from networks import CASES, images, make
from torch import nn

import gatefit
from gatefit.errors import ConversionError

ZOO = {
    "timm/resnet18": (8, 8), "timm/resnet50": (16, 16), "timm/mobilenetv2_100": (10, 10),
    "timm/resnext50_32x4d": (16, 16), "timm/tf_efficientnet_lite0": (9, 9), "timm/wide_resnet50_2": (16, 16),
    "timm/efficientnet_b0": (9, 9), "timm/convnext_tiny": (18, 18), "timm/regnety_016": (27, 27),
    "timm/vit_tiny_patch16_224": (24, 12), "timm/densenet121": (58, 58), "timm/resnetv2_50": (16, 16),
    "timm/dla34": (12, 12), "timm/hrnet_w18_small": (23, 23), "timm/cspdarknet53": (23, 23),
    "timm/swin_tiny_patch4_window7_224": (24, 12), "timm/res2net50_26w_4s": (16, 16),
    "timm/ghostnet_050": (16, 16), "timm/nfnet_f0": (12, 12), "timm/beit_base_patch16_224": (24, 12),
    "torchvision/resnet50": (16, 16), "torchvision/mobilenet_v2": (10, 10), "torchvision/resnext50_32x4d": (16, 16),
    "torchvision/vgg11": (4, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_small_networks(name):
    case = CASES[name]
    found = gatefit.find_blocks(make(name), images())
    assert tuple(b.units for b in found.blocks if b.has_shortcut) == case.units
    if case.reason:
        reasons = [s.reason for s in found.skipped] + [b.no_channel_gate + b.channel_limit for b in found.blocks]
        assert any(case.reason in r for r in reasons), reasons


@pytest.mark.parametrize("name", ZOO)
def test_zoo_counts(name):
    source, model = name.split("/")
    with torch.device("meta"):
        network = timm.create_model(model) if source == "timm" else torchvision.models.get_model(model)
    found = gatefit.find_blocks(network)
    assert (len(found.blocks), sum(b.channels > 0 for b in found.blocks)) == ZOO[name]


def test_names_are_the_modules_of_the_blocks():
    found = gatefit.find_blocks(timm.create_model("resnet18"))
    assert [b.name for b in found.blocks] == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert found.blocks[0].channel_units.target == "layer1.0.conv1"


def test_grouped_units_are_whole_groups():
    block = gatefit.find_blocks(timm.create_model("resnext50_32x4d")).blocks[0]
    assert (block.channels, block.units) == (128, 32)
    assert {x.name.rsplit(".", 1)[1] for x in block.layers if x.scaled} == {"conv1", "conv2", "conv3"}


def test_mobilenet_closes_expansion_depthwise_and_projection():
    block = gatefit.find_blocks(timm.create_model("mobilenetv2_100")).blocks[0]
    assert {x.name.rsplit(".", 1)[1] for x in block.layers if x.scaled} == {"conv_pw", "conv_dw", "conv_pwl"}
    assert {s.tensor.rsplit(".", 2)[1] for s in block.channel_units.slices} == {
        "conv_pw",
        "bn1",
        "conv_dw",
        "bn2",
        "conv_pwl",
    }


def test_a_network_without_blocks_says_what_was_looked_at():
    with pytest.raises(ConversionError, match="not one addition of two tensors"):
        gatefit.retrofit(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images())
    with pytest.raises(ConversionError, match="side by side"):
        gatefit.retrofit(make("reparameterised"), images())


def test_a_wrong_example_is_named():
    with pytest.raises(ConversionError, match="does not take an input of shape"):
        gatefit.find_blocks(make("basic"), torch.zeros(2, 5, 8, 8))


def test_an_untraceable_network_is_named():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(ConversionError, match="Branching cannot be traced"):
        gatefit.find_blocks(Branching(), torch.zeros(2, 3))
