"""Pixels: depth and channels."""

import numpy as np
import pytest
import torch
from PIL import Image

from gatefit.errors import DataError
from gatefit.inputs.data import normalise, read_data
from gatefit.inputs.decode import decode
from gatefit.inputs.models import InputSpec

RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040


def saved(file, pixels):
    Image.fromarray(pixels).save(file)
    return Image.open(file)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled(tmp_path, name, channels):
    pixels = decode(saved(tmp_path / name, RAMP), InputSpec((channels, 8, 8)))
    assert pixels.shape == (channels, 8, 8)
    assert pixels[0].flatten().tolist() == [round(v / 257) for v in RAMP.flatten().tolist()]


def test_a_portable_greymap_of_sixteen_bits_is_scaled(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes())
    pixels = decode(Image.open(tmp_path / "a.pgm"), InputSpec((1, 8, 8)))
    assert pixels.flatten().tolist() == [round(v / 257) for v in RAMP.flatten().tolist()]


@pytest.mark.parametrize(("kind", "word"), [(np.int32, "32-bit whole numbers"), (np.float32, "floats")])
def test_pixels_of_unknown_range_are_refused(tmp_path, kind, word):
    saved(tmp_path / "a.tif", RAMP.astype(kind))
    with pytest.raises(DataError, match=rf"a\.tif' cannot be read \(its pixels are {word}.*8 or 16 bits"):
        read_data(str(tmp_path), InputSpec((3, 8, 8)))


def test_one_and_four_channels(tmp_path):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (12, 10, 4), dtype=torch.uint8).numpy()
    pixels[..., 3] = 0  # channels under an alpha of 0 count too
    picture = saved(tmp_path / "a.png", pixels)
    four, three = decode(picture, InputSpec((4, 8, 8))), decode(picture.convert("RGB"), InputSpec((3, 8, 8)))
    assert torch.equal(four[:3], three) and four[3].eq(0).all()
    (grey,) = decode(picture, InputSpec((1, 12, 10)))
    assert grey.tolist() == np.asarray(picture.convert("L")).tolist()


def test_other_channels_are_refused_for_files_but_not_normalised_wrongly(tmp_path):
    saved(tmp_path / "a.png", RAMP)
    with pytest.raises(DataError, match="takes 5 channels"):
        read_data(str(tmp_path), InputSpec((5, 8, 8)))
    grey = normalise(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), InputSpec((1, 2, 2), (0.5,), (0.5,)))
    assert grey.unique().tolist() == [1]
    with pytest.raises(DataError, match=r"1 channel\(s\).*3 means"):
        normalise(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), InputSpec((3, 2, 2)))


def test_digits_have_as_many_channels_as_the_network():
    assert read_data("digits", InputSpec((1, 8, 8), (0.5,), (0.5,))).train.resident.shape[1:] == (1, 8, 8)
