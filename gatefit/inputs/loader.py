"""Batches of images for training and statistics: their order, decoding and augmentation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from gatefit.inputs.data import ImageSet


def augment(images: Tensor, index: Tensor, count: int, seed: int, epoch: int, flip: bool) -> Tensor:
    """Crop at random with a padding of 1/8 and, if `flip`, mirroring of a batch (B, C, H, W).

    What happens to an image depends on its index, the seed and the epoch alone: not on batches or processes.
    """
    pad = images.shape[-1] // 8
    random = generator(seed, epoch)
    plan = torch.randint(0, 2 * pad + 1, (2, count), generator=random)[:, index].to(images.device)
    mirrored = (torch.rand(count, generator=random)[index] < 0.5).to(images.device) & flip
    height, width = images.shape[-2:]
    padded = F.pad(images, (pad,) * 4)
    rows = plan[0][:, None] + torch.arange(height, device=images.device)
    columns = plan[1][:, None] + torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    each = torch.arange(len(images), device=images.device)
    return padded.permute(0, 2, 3, 1)[each[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def loader(images: ImageSet, batches: list[list[int]]) -> DataLoader[Any]:
    """Load batches of an ImageSet by their indices; images that are not in memory are decoded by workers."""
    workers = 0 if images.resident is not None else 2
    return DataLoader(images, batch_sampler=batches, collate_fn=_whole, num_workers=workers)  # type: ignore[arg-type]


def generator(seed: int, epoch: int) -> torch.Generator:
    """Seed the random numbers of one epoch; -1 for what comes after the last."""
    return torch.Generator().manual_seed(seed * 100_003 + epoch + 1)


def _whole(batch: Any) -> Any:
    return batch
