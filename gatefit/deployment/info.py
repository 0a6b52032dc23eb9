"""What a deployed network knows of itself: one typed record on its graph."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from gatefit.deployment.plan import BlockPlan, Latency
from gatefit.errors import DeployError

_KEY = "gatefit_deployed"


@dataclass(frozen=True)
class Images:
    """What a deployed network takes: batches of images of one kind."""

    shape: tuple[int, ...]
    """Of one image that it was deployed with, (C, H, W)."""
    dtype: torch.dtype = torch.float32

    def check(self, images: Any, device: torch.device) -> None:
        """Refuse what no deployed network of these images can run.

        Raises:
            DeployError: `images` is no batch of them, or lies elsewhere, or wants a gradient.
        """
        if not isinstance(images, Tensor):
            raise DeployError(f"a deployed network takes a tensor of images, not a {type(images).__name__}")
        if images.dim() != len(self.shape) + 1:
            raise DeployError(
                f"a deployed network takes a batch of images (B, {', '.join(map(str, self.shape))}), not a tensor of "
                f"shape {tuple(images.shape)}"
            )
        if images.dtype != self.dtype or images.device != device:
            raise DeployError(
                f"this deployment takes {self.dtype} on {device}, not {images.dtype} on {images.device}; convert the "
                "images, or deploy anew with such"
            )
        if images.requires_grad and torch.is_grad_enabled():
            raise DeployError(
                "a deployed network is for inference only and gives no gradients; take them from the gated network, "
                "or pass images.detach()"
            )


@dataclass(frozen=True)
class DeployedInfo:
    """How a network was deployed."""

    plans: tuple[BlockPlan, ...]
    """What was planned for each block."""
    engines: tuple[str, ...] | None = None
    """The engine of each segment between the blocks of a gathered network; None: the network is not gathered."""
    segments: tuple[bytes, ...] = field(default=(), repr=False)
    """The ONNX files of those that ONNX Runtime runs, in order."""
    weights: str = ""
    """SHA-256 of the weights of the gated network that it was made from, see `fingerprint`."""
    images: Images | None = None
    """What it takes; None: it is not in the user's hands yet."""
    latency: Latency | None = None
    """Beside the dense network; None: it was not timed."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a network's weights, in hexadecimal; names do not count."""
    digests = []
    for tensor in tensors.values():
        plain = tensor.detach().cpu().contiguous()
        state = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
        state.update(plain.reshape(-1).view(torch.uint8).numpy())
        digests.append(state.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def deployed_info(network: fx.GraphModule) -> DeployedInfo:
    """Return the record of a deployed network.

    Raises:
        DeployError: gatefit did not deploy the network.
    """
    info = network.meta.get(_KEY)
    if not isinstance(info, DeployedInfo):
        raise DeployError("this network is not deployed; call gatefit.deploy(gated, images) first")
    return info


def set_deployed_info(network: fx.GraphModule, info: DeployedInfo) -> None:
    """Give a deployed network its record."""
    network.meta[_KEY] = info
