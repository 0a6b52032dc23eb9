"""What a network takes, and who said so."""

import dataclasses

import pytest
import timm
import torch
from torch import nn

from gatefit.errors import ModelError
from gatefit.inputs.spec import StatedInput, input_spec, network_input


def network(config=None, channels=3):
    net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    if config is not None:
        net.pretrained_cfg = config
    return net


def test_what_no_one_said_is_assumed_and_told():
    taken = network_input(network())
    assert taken.size_assumed and taken.spec.shape == (3, 224, 224)
    assert str(taken).startswith("input: 224x224 pixels, 3 channels, mean 0.485 0.456 0.406, std")
    assert "(assumed); say otherwise with --image-size, --mean, --std" in str(taken)


def test_the_user_goes_before_the_network():
    config = {"input_size": (3, 32, 48), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    taken = network_input(network(config))
    assert (taken.spec.shape, taken.spec.mean, taken.spec.std) == ((3, 32, 48), *list(config.values())[1:])
    assert not taken.size_assumed and "from the network's pretrained_cfg" in str(taken) and "say" not in str(taken)
    taken = network_input(network(config), StatedInput(64, (0.5,), (0.25,)))
    assert (taken.spec.shape, taken.spec.mean, taken.spec.std) == ((3, 64, 64), (0.5,) * 3, (0.25,) * 3)
    assert str(taken) == "input: 64x64 pixels, 3 channels, mean 0.5, std 0.25 (as stated)"


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_channels_are_those_of_the_first_layer(channels):
    spec = input_spec(network(channels=channels))
    assert spec.shape == (channels, 224, 224) and len(spec.mean) == len(spec.std) == channels
    assert spec.mean[0] == pytest.approx(0.449, abs=1e-3)


def test_channels_of_a_timm_network_that_was_made_with_others():
    assert input_spec(timm.create_model("test_resnet", in_chans=1)).shape[0] == 1
    with torch.device("meta"):
        assert input_spec(timm.create_model("test_vit", in_chans=4)).shape[0] == 4


@pytest.mark.parametrize(
    ("config", "shape", "mean"),
    [
        ({"mean": 0.5, "input_size": 64}, (3, 64, 64), (0.5,) * 3),
        ({"mean": [0.5], "input_size": [32, 64]}, (3, 32, 64), (0.5,) * 3),
        ({"mean": None, "input_size": None}, (3, 224, 224), (0.485, 0.456, 0.406)),
    ],
)
def test_scalars_and_short_forms(config, shape, mean):
    spec = input_spec(network(config))
    assert (spec.shape, spec.mean) == (shape, mean)


def test_timms_own_record():
    @dataclasses.dataclass
    class Record:
        input_size: tuple = (3, 16, 16)

    assert input_spec(network(Record())).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"input_size": "64"}, "input_size = '64'"),
        ({"input_size": (3, 64.0, 64)}, "input_size"),
        ({"input_size": -1}, "input_size = -1"),
        ({"input_size": ()}, "input_size"),
        ({"mean": "0.5"}, "mean must be numbers"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values, and the network takes 3"),
        ({"mean": float("nan")}, "mean must be numbers"),
        ({"mean": (123.7, 116.3, 103.5)}, "divide by 255"),
        ({"std": 0}, "std must be positive"),
        ({"std": ()}, "std must be numbers"),
        ({"crop_pct": -1}, "crop_pct = -1"),
        ({"interpolation": "sharp"}, "interpolation = 'sharp'"),
        ([1], "must be a dictionary, not list"),
    ],
)
def test_values_that_no_input_has_are_refused(config, message):
    with pytest.raises(ModelError, match=message):
        input_spec(network(config))


def test_a_first_layer_that_reads_folded_patches():
    """The first layer of timm's TResNet reads patches of 4 x 4 pixels as channels."""
    network = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 8, 1))
    network.pretrained_cfg = {"first_conv": "1", "input_size": (3, 32, 32)}
    network.in_chans = 3
    assert input_spec(network).shape == (3, 32, 32)
