"""What a network takes: its own word for it, the user's, or what is assumed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from torch import nn
from torchvision.transforms import InterpolationMode

from gatefit.errors import ModelError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ASSUMED_SIZE = 224
LARGEST_SIDE = 65_536


@dataclass(frozen=True)
class InputSpec:
    """What a network takes: image shape (C, H, W), and the normalisation and crop that it was trained with.

    A network that takes something else than images has the shape of its first input, less the batch.
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of each channel."""
    std: tuple[float, ...] = IMAGENET_STD
    """Of each channel."""
    crop: float = 0.875
    """Share of the resized image's side that the centre crop keeps."""
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class StatedInput:
    """What the user says of a network's input; it goes before what the network says."""

    image_size: int = 0
    """Side of the square input; 0: not stated."""
    mean: tuple[float, ...] = ()
    """One value, or one for each channel; empty: not stated."""
    std: tuple[float, ...] = ()
    """One value, or one for each channel; empty: not stated."""

    def __post_init__(self) -> None:
        if not 0 <= self.image_size <= LARGEST_SIDE:
            raise ModelError(f"--image-size must lie between 0 and {LARGEST_SIDE}, not {self.image_size}")


@dataclass(frozen=True)
class NetworkInput:
    """The input of a network, and who said so."""

    spec: InputSpec
    size_from: str
    """Such as "stated", "pretrained_cfg" or "assumed"."""
    mean_from: str
    std_from: str

    @property
    def size_assumed(self) -> bool:
        """Tell whether neither user nor network said which size it is."""
        return self.size_from == ASSUMED

    def __str__(self) -> str:
        channels, height, width = self.spec.shape
        parts = [
            (f"{height}x{width} pixels, {channels} channel{'s' * (channels > 1)}", self.size_from),
            (f"mean {_short(self.spec.mean)}", self.mean_from),
            (f"std {_short(self.spec.std)}", self.std_from),
        ]
        origins = {origin for _, origin in parts}
        if len(origins) == 1:
            line = f"{', '.join(text for text, _ in parts)} ({origins.pop()})"
        else:
            line = ", ".join(f"{text} ({origin})" for text, origin in parts)
        if ASSUMED not in (self.size_from, self.mean_from, self.std_from):
            return f"input: {line}"
        return f"input: {line}; say otherwise with --image-size, --mean, --std or the network's pretrained_cfg"


FOLDER = "from the folder's config.json"
STATED, NETWORK, ASSUMED = "as stated", "from the network's pretrained_cfg", "assumed"


def network_input(model: nn.Module, stated: StatedInput | None = None) -> NetworkInput:
    """Find the input of a network: as stated, else as in its `pretrained_cfg` (timm's convention), else ImageNet's.

    Raises:
        ModelError: a value is none that an input can have.
    """
    stated = stated or StatedInput()
    config = _config(model)
    shape = _shape(config.get("input_size"), _channels(model, config))
    if stated.image_size:
        shape = (shape[0], stated.image_size, stated.image_size)
    size_from = STATED if stated.image_size else NETWORK if "input_size" in config else ASSUMED
    mean, mean_from = _statistic("mean", stated.mean, config, IMAGENET_MEAN, shape[0])
    std, std_from = _statistic("std", stated.std, config, IMAGENET_STD, shape[0])
    if min(std) <= 0:
        raise ModelError(f"std must be positive, not {_short(std)}")
    spec = InputSpec(shape, mean, std, _crop(config), _interpolation(config))
    return NetworkInput(spec, size_from, mean_from, std_from)


def input_spec(model: nn.Module) -> InputSpec:
    """Find the input of a network of which the user states nothing, see `network_input`."""
    return network_input(model).spec


def _config(model: nn.Module) -> dict[str, Any]:
    """Read `pretrained_cfg`, without what is not set; timm also has it as a dataclass."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if is_dataclass(config) and not isinstance(config, type):
        config = asdict(config)
    if not isinstance(config, Mapping):
        raise ModelError(f"the network's pretrained_cfg must be a dictionary, not {type(config).__name__}")
    return {k: v for k, v in config.items() if v is not None}


def _channels(model: nn.Module, config: dict[str, Any]) -> int:
    """Count the channels of the input: timm names the layer that reads it; else `input_size`, else the first layer."""
    size = config.get("input_size")
    modules = dict(model.named_modules())
    first = modules.get(str(config.get("first_conv")))
    declared = getattr(model, "in_chans", None)
    if first is not None and type(declared) is int and declared > 0:
        return declared  # of timm's TResNet the first layer reads patches that were folded into channels
    if first is None and not (isinstance(size, Sequence) and len(size) == 3):
        first = next((m for m in modules.values() if isinstance(m, nn.Conv2d)), None)
    if isinstance(first, nn.Conv2d):
        return first.in_channels
    return int(size[0]) if isinstance(size, Sequence) and len(size) == 3 else 3


def _shape(size: Any, channels: int) -> tuple[int, int, int]:
    """Read timm's `input_size`: (C, H, W); also (H, W), or one side."""
    sides = (ASSUMED_SIZE,) if size is None else tuple(size) if isinstance(size, Sequence) else (size,)
    if not 1 <= len(sides) <= 3 or not all(type(side) is int and side > 0 for side in sides):
        raise ModelError(
            f"the network's pretrained_cfg has input_size = {size!r}; it must be (C, H, W), such as (3, 64, 64)"
        )
    height, width = sides[-2:] if len(sides) > 1 else sides * 2
    return channels, height, width


def _statistic(
    name: str, stated: tuple[float, ...], config: dict[str, Any], imagenet: tuple[float, ...], channels: int
) -> tuple[tuple[float, ...], str]:
    """Find mean or std with a value for each channel, and who said so.

    Of ImageNet's colours another number of channels gets the average, as do timm's networks of another `in_chans`.
    """
    origin = STATED if stated else NETWORK if name in config else ASSUMED
    values = stated or config.get(name, imagenet)
    values = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
    if not values or not all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    ):
        raise ModelError(f"{name} must be numbers, one for all channels or one for each, not {values!r}")
    if max(map(abs, values)) > 1:
        raise ModelError(
            f"{name} must fit pixels from 0 to 1, not {max(values):g}; if they are from 0 to 255, divide by 255"
        )
    if len(values) == 3 != channels and origin != STATED:
        values = (sum(values) / 3,)
    if len(values) not in (1, channels):
        raise ModelError(f"{name} has {len(values)} values, and the network takes {channels} channel(s)")
    return tuple(map(float, values)) * (channels if len(values) == 1 else 1), origin


def _crop(config: dict[str, Any]) -> float:
    crop = config.get("crop_pct") or 0.875
    if not isinstance(crop, int | float) or not 0 < crop < math.inf:
        raise ModelError(f"the network's pretrained_cfg has crop_pct = {crop!r}; it must be a positive number")
    return float(crop)


def _interpolation(config: dict[str, Any]) -> str:
    name = str(config.get("interpolation") or "bicubic")
    known = [mode.value for mode in InterpolationMode]
    if name not in known:
        raise ModelError(f"the network's pretrained_cfg has interpolation = {name!r}; known are {', '.join(known)}")
    return name


def _short(values: tuple[float, ...]) -> str:
    """Write one value where all are alike."""
    return f"{values[0]:.4g}" if len(set(values)) == 1 else " ".join(f"{v:.4g}" for v in values)
