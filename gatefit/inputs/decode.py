"""From an opened image to the bytes of one input: channels, depth, size and crop."""

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from gatefit.errors import DataError
from gatefit.inputs.models import InputSpec

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's modes by the number of channels that a network takes."""


def check_channels(spec: InputSpec) -> None:
    """Refuse a network whose input no image file holds.

    Raises:
        DataError: it takes neither 1, 3 nor 4 channels.
    """
    if spec.shape[0] not in MODES:
        raise DataError(
            f"the network takes {spec.shape[0]} channels, and image files give 1, 3 or 4; in Python, pass tensors: "
            "gatefit.finetune(gated, (images, labels), ...)"
        )


def decode(image: Image.Image, spec: InputSpec) -> Tensor:
    """Resize the shorter side, crop the centre; an image of the right size stays as it is. (C, H, W) uint8.

    Raises:
        ValueError: the range of the pixels is not known.
    """
    height, width = spec.shape[1:]
    image = _eight_bits(image).convert(MODES[spec.shape[0]])
    if image.size != (width, height):
        scale = max(height / spec.crop / image.height, width / spec.crop / image.width)
        size = (max(height, round(image.height * scale)), max(width, round(image.width * scale)))
        image = _resized(image, size, InterpolationMode(spec.interpolation))
        image = TF.center_crop(image, [height, width])
    tensor: Tensor = TF.pil_to_tensor(image)
    return tensor


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits to 8: Pillow itself would clip them. Its mode "I" has 32 bits, of which these formats fill 16."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        pixels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode.startswith(("I", "F")):
        kind = "32-bit whole numbers" if image.mode.startswith("I") else "floats"
        raise ValueError(f"its pixels are {kind}, of which no one knows the range; save it with 8 or 16 bits")
    return image


def _resized(image: Image.Image, size: tuple[int, int], interpolation: InterpolationMode) -> Image.Image:
    """Resize to (height, width); with alpha band by band, for Pillow would weigh the colours by it."""
    bands = image.split() if image.mode == "RGBA" else [image]
    resized = [TF.resize(band, list(size), interpolation) for band in bands]
    return Image.merge("RGBA", resized) if len(resized) > 1 else resized[0]
