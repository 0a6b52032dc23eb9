import pytest
import torch
from networks import Basic, Network

import gatefit
from gatefit.commands.coverage import cover, kind_of
from gatefit.errors import GatefitError
from gatefit.inputs.models import names_like, parse_reference, skeleton


def test_names_by_part_and_by_pattern():
    assert "timm/resnet18" in names_like("resnet18") and "torchvision/resnet18" in names_like("resnet18")
    assert all(n.endswith("d") for n in names_like("resnet*d"))
    with pytest.raises(GatefitError, match="no model"):
        names_like("no-such-network")


def test_coverage_counts_macs_and_branches():
    c = cover("timm/resnet50")
    assert (c.family, c.blocks, c.channel_blocks, c.convolutional, c.convolutional_gated) == ("resnet", 16, 16, 16, 16)
    assert c.block_share == pytest.approx(0.883, abs=0.001) and c.channel_share == pytest.approx(0.682, abs=0.001)


def test_gates_pool_channels_of_windowed_attention():
    """Its windows are cut from (B, H, W, C) before the first layer."""
    found = gatefit.find_blocks(skeleton(parse_reference("timm/tiny_vit_5m_224")), torch.zeros(2, 3, 224, 224))
    assert [b.features for b in found.blocks if b.name.startswith("stages.2.")] == [160] * 12


def test_what_cannot_be_gated_says_why():
    assert cover("torchvision/vgg11").block_share == 0 < cover("torchvision/vgg11").channel_share
    assert "side by side" in cover("timm/repvgg_a0").reason
    assert kind_of("the branch ending in 'x_1' reads 2 tensors (a, b) instead of one") == kind_of(
        "the branch ending in 'y' reads 2 tensors (c, d) instead of one"
    )


@pytest.mark.parametrize("size", [(3, 8, 8), (5, 12, 20)])
def test_one_conversion_serves_other_sizes(size):
    batch, height, width = size
    torch.manual_seed(0)
    model = Network(Basic(8, 8), Basic(8, 16, 2)).eval()
    gated = gatefit.retrofit(model, torch.zeros(2, 3, 8, 8))
    x = torch.randn(batch, 3, height, width)
    assert torch.equal(gated(x), model(x))
