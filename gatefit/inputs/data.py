"""Images and labels: an image folder, a tar of one, the digits, or any data set that timm can create."""

import contextlib
import functools
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from gatefit.errors import DataError, GatefitWarning, first_line
from gatefit.inputs.decode import check_channels, decode
from gatefit.inputs.listing import SPLITS, Listing, Opener, list_folder, list_tar, open_file
from gatefit.inputs.metadata import with_labels
from gatefit.inputs.models import InputSpec
from gatefit.inputs.splits import counts, divide

RESIDENT_BYTES = 4 << 30
"""Decoded images up to this size are held in memory, as bytes; larger sets are decoded as they are read."""
TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
SAMPLED = 32
"""Images whose size is looked at where the network's is assumed."""
SIZES_APART = 2.0
"""Ratio of the images' size to an assumed one, or the other way round, from which the assumption is refused."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one split, decoded and centre-cropped to one size.

    `ImageSet` is a map-style dataset that is read batch by batch (`__getitems__`).
    """

    name: str
    count: int
    read: Callable[[int], Tensor]
    """Image i as uint8, (C, H, W)."""
    labels: Tensor | None
    """(count,) int64, or None."""
    classes: tuple[str, ...]
    """Names of the classes; empty where they are not known."""
    resident: Tensor | None = None
    """All images, (count, C, H, W) uint8, where they fit."""

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Read images (B, C, H, W) uint8, labels (B,) (-1: none) and indices (B,)."""
        index = torch.as_tensor(indices)
        images = self.resident[index] if self.resident is not None else torch.stack([self.read(i) for i in indices])
        labels = self.labels[index] if self.labels is not None else torch.full_like(index, -1)
        return images, labels, index

    def fits(self, outputs: int) -> bool:
        """Tell whether there are labels for a network with that many outputs."""
        if self.labels is None:
            return False
        return len(self.classes) == outputs if self.classes else int(self.labels.max()) < outputs

    def unlabelled(self) -> "ImageSet":
        """Give the same images without labels."""
        return replace(self, labels=None, classes=())

    def select(self, indices: Tensor) -> "ImageSet":
        """Give the images at `indices`, (n,) int64."""
        chosen = indices.tolist()
        return replace(
            self,
            count=len(chosen),
            read=lambda i: self.read(chosen[i]),
            labels=None if self.labels is None else self.labels[indices],
            resident=None if self.resident is None else self.resident[indices],
        )


@dataclass(frozen=True)
class Splits:
    """Images to train on and images to evaluate on."""

    train: ImageSet
    test: ImageSet

    def unlabelled(self) -> "Splits":
        """Give the same images without labels."""
        return Splits(self.train.unlabelled(), self.test.unlabelled())


def read_data(
    name: str,
    spec: InputSpec,
    corrupt: str = "refuse",
    seed: int = 0,
    limit: int = 0,
    size_assumed: bool = False,
) -> Splits:
    """Read a data set for a network's input.

    Args:
        name: folder or tar with `train/` and `val/` or `test/` (one folder a class; a set without such splits is
            divided 4 to 1; a table may give the labels, see `gatefit.inputs.metadata`), "digits", or a name that
            timm's `create_dataset` takes. Empty: Imagenette.
        spec: size and crop of the network's input.
        corrupt: "refuse" or "skip" images that cannot be read.
        seed: of the division and of `limit`.
        limit: images of each split to use, of a stream the first ones; 0: all.
        size_assumed: whether neither the user nor the network said for which size it was trained. Images of quite
            another size are then refused.

    Raises:
        DataError: nothing there, no images, unreadable images, a class without images, or a data set that cannot be
            fetched.
    """
    check_channels(spec)
    path = Path(name).expanduser()
    if name == "digits":
        splits = _digits(spec, size_assumed)
    elif name and path.is_dir():
        listing = list_folder(path)
        labelled = with_labels(path, listing.images, SPLITS)
        if labelled is not listing.images:  # folders are no classes then
            listing = Listing(labelled, frozenset(), listing.skipped)
        splits = _from_files(name, listing, open_file, spec, corrupt, seed, size_assumed)
    elif name and path.is_file():
        listing, opener = list_tar(path)
        splits = _from_files(name, listing, opener, spec, corrupt, seed, size_assumed)
    elif not name:
        splits = _imagenette(spec, corrupt)
    elif not name.startswith(TIMM_PREFIXES):
        raise DataError(
            f"no folder or tar '{name}'; --data takes a folder with train/ and val/, a tar of one, 'digits', "
            f"or a name for timm that begins with {', '.join(TIMM_PREFIXES)}"
        )
    else:
        splits = _from_timm(name, spec, corrupt, limit, size_assumed)
    if limit:
        generator = torch.Generator().manual_seed(seed)
        parts = (splits.train, splits.test)
        splits = Splits(*(s.select(torch.randperm(len(s), generator=generator)[:limit]) for s in parts))
    return splits


Source = Splits | ImageSet | str | Path | tuple[Tensor, Tensor]
"""What callers may pass as data, see `as_images`."""


def as_images(data: Source, spec: InputSpec, seed: int = 0) -> Splits:
    """Make splits from what a caller has at hand.

    Args:
        data: Splits; one ImageSet, to train and evaluate on alike; a name or path (see `read_data`); or a pair of
            images (N, C, H, W), uint8 or already normalised floats, and class indices (N,).
        spec: the network's input, for a name or path.
        seed: of the division of a set without splits.

    Raises:
        DataError: it is none of these, images and labels differ in number, or labels are no class indices.
    """
    if isinstance(data, Splits):
        return data
    if isinstance(data, str | Path):
        return read_data(str(data), spec, seed=seed)
    if isinstance(data, ImageSet):
        return Splits(data, data)
    if not (isinstance(data, tuple) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)):
        raise DataError(f"data must be a name, a folder, Splits or (images, labels), not {type(data).__name__}")
    images, labels = data
    _check_tensors(images, labels)
    one = ImageSet("tensors", len(images), images.__getitem__, labels.long(), (), images)
    return Splits(one, one)


def _check_tensors(images: Tensor, labels: Tensor) -> None:
    """Refuse images and labels that do not fit each other, or that are none."""
    if images.dim() != 4 or not len(images) or len(images) != len(labels):
        raise DataError(f"images {tuple(images.shape)} and labels {tuple(labels.shape)} do not fit each other")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(f"images must be uint8, or floats that are normalised, not {images.dtype}")
    if labels.dim() != 1:
        raise DataError(f"labels must be one class index for each image, ({len(images)},), not {tuple(labels.shape)}")
    if labels.is_complex() or not bool((labels == labels.long()).all()):
        raise DataError(f"labels must be class indices in whole numbers, not such {labels.dtype}")
    if int(labels.min()) < 0:
        raise DataError(f"labels must be class indices from 0 on; there is {int(labels.min())}: leave such images out")


def some_images(images: ImageSet, spec: InputSpec, count: int) -> Tensor:
    """Take `count` images, the same each time, normalised: (count, C, H, W)."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return normalise(images.__getitems__(chosen.tolist())[0], spec)


def hold_out(images: ImageSet, count: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Divide training images into the rest and `count` held-out ones, on which choices are made."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.select(order[count:].sort().values), images.select(order[:count].sort().values)


def normalise(images: Tensor, spec: InputSpec) -> Tensor:
    """Turn uint8 images (B, C, H, W) into the float32 that the network was trained on; floats are taken as they are."""
    if images.dtype != torch.uint8:
        return images
    if images.shape[1] != len(spec.mean):
        raise DataError(f"the images have {images.shape[1]} channel(s), the network's input {len(spec.mean)} means")
    mean = torch.tensor(spec.mean, device=images.device).view(1, -1, 1, 1) * 255
    std = torch.tensor(spec.std, device=images.device).view(1, -1, 1, 1) * 255
    return (images.float() - mean) / std


def _digits(spec: InputSpec, size_assumed: bool) -> Splits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if size_assumed:
        _check_size("digits", 8, spec)
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    images = (
        torch.from_numpy(pixels)
        .view(-1, 1, 8, 8)
        .mul(255 / 16)
        .round()
        .to(torch.uint8)
        .expand(-1, spec.shape[0], -1, -1)
    )
    images = TF.resize(images, list(spec.shape[1:]), InterpolationMode.BILINEAR)
    every = ImageSet(
        "digits", len(images), images.__getitem__, torch.from_numpy(labels).long(), tuple("0123456789"), images
    )
    return Splits(*(every.select(torch.tensor(sorted(p))) for p in parts))


def _imagenette(spec: InputSpec, corrupt: str) -> Splits:
    from torchvision.datasets import Imagenette

    root = Path(torch.hub.get_dir()).parent / "gatefit"
    try:
        parts = [
            Imagenette(str(root), split=s, size="320px", download=not (root / "imagenette2-320").is_dir())
            for s in ("train", "val")
        ]
    except Exception as error:
        raise DataError(
            "the default images (Imagenette) could not be fetched; check the network, or pass --data DIR"
        ) from error
    return Splits(
        *(_build("imagenette", [(Path(f), c) for f, c in p._samples], open_file, p.wnids, spec, corrupt) for p in parts)
    )


def _from_timm(name: str, spec: InputSpec, corrupt: str, limit: int, size_assumed: bool) -> Splits:
    from timm.data import create_dataset

    root = str(Path(torch.hub.get_dir()).parent / "gatefit" / "timm")
    splits = []
    for split in ("train", "validation"):
        try:
            dataset = create_dataset(name, root=root, split=split, is_training=False, download=True)
            dataset.transform = None
            if isinstance(dataset, IterableDataset):
                splits.append(_streamed(name, dataset, spec, limit, size_assumed))
                continue
            labels = (
                [int(dataset[i][1]) for i in range(len(dataset))]
                if not hasattr(dataset, "targets")
                else list(dataset.targets)
            )
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"timm cannot create the data set '{name}' ({first_line(error)[:120]}); pass --data DIR"
            ) from error
        names = [str(c) for c in getattr(dataset, "classes", sorted(set(labels)))]
        items = [(i, label) for i, label in enumerate(labels)]
        opener = functools.partial(_image_of, dataset)
        if size_assumed:
            _check_size(name, _shorter_side(items, opener), spec)
        splits.append(_build(name, items, opener, names, spec, corrupt))
    return Splits(*splits)


def _image_of(dataset: Any, index: int) -> Image.Image:
    image: Image.Image = dataset[index][0]
    return image


def _streamed(
    name: str, dataset: Iterable[tuple[Image.Image, int]], spec: InputSpec, limit: int, size_assumed: bool
) -> ImageSet:
    """Hold what a stream gives in memory: training needs its images in any order."""
    most = RESIDENT_BYTES // math.prod(spec.shape)
    images: list[Tensor] = []
    labels: list[int] = []
    for image, label in islice(dataset, limit or None):
        if len(images) == most:
            raise DataError(
                f"'{name}' is a stream of more than {most} images, which do not fit into memory; "
                "set data.limit in a recipe, or pass --data DIR"
            )
        if size_assumed and not images:
            _check_size(name, min(image.size), spec)
        images.append(decode(image, spec))
        labels.append(int(label))
    if not images:
        raise DataError(f"the data set '{name}' gives no images")
    resident = torch.stack(images)
    # Which classes there are a part of a stream does not say.
    return ImageSet(name, len(images), resident.__getitem__, torch.tensor(labels), (), resident)


def _from_files(
    name: str, listing: Listing, opener: Opener, spec: InputSpec, corrupt: str, seed: int, size_assumed: bool
) -> Splits:
    divided = divide(name, listing)
    if size_assumed:
        _check_size(name, _shorter_side(divided.parts[0].items, opener), spec)
    built = [_build(name, part.items, opener, part.classes, spec, corrupt) for part in divided.parts]
    for part, images in zip(divided.parts, built, strict=True):
        _check_classes(name, part.split, images)
    read = sum(map(len, built))
    skipped = ["corrupt"] * (sum(len(part.items) for part in divided.parts) - read) + divided.skipped
    if skipped:
        warnings.warn(
            f"'{name}': read {read:,} images, skipped {len(skipped):,} ({counts(skipped)})",
            GatefitWarning,
            stacklevel=2,
        )
    if len(built) == 1:
        rest, held = hold_out(built[0], max(1, len(built[0]) // 5), seed)
        return Splits(rest, held)
    return Splits(*built)


def _check_classes(name: str, split: str, images: ImageSet) -> None:
    """Refuse a set of which a whole class cannot be read."""
    if images.labels is None:
        return
    counted = torch.bincount(images.labels, minlength=len(images.classes))
    empty = [label for label, count in zip(images.classes, counted.tolist(), strict=True) if not count]
    if empty:
        where = f"{split}/ of '{name}'" if split else f"'{name}'"
        raise DataError(f"no image of class '{empty[0]}' in {where} can be read; repair them, or remove the class")


def _shorter_side(items: Sequence[tuple[Any, int]], opener: Opener) -> int | None:
    """Find the median of the shorter sides of some images as they are stored; None: none of them can be opened."""
    sides = []
    for source, _ in items[:: max(1, len(items) // SAMPLED)]:
        with contextlib.suppress(Exception):  # `_build` says what cannot be read
            sides.append(min(opener(source).size))
    return int(statistics.median(sides)) if sides else None


def _check_size(name: str, side: int | None, spec: InputSpec) -> None:
    """Refuse images of quite another size than the one that was assumed of the network."""
    assumed = min(spec.shape[1:])
    if side is not None and max(side / assumed, assumed / side) >= SIZES_APART:
        raise DataError(
            f"the images of '{name}' measure {side} pixels (shorter side), and no one said for which size the network "
            f"was trained: {assumed} was assumed; pass --image-size N (in a recipe model.image_size), or set "
            "pretrained_cfg on the network"
        )


def _build(
    name: str,
    items: list[tuple[Any, int]],
    opener: Opener,
    classes: Sequence[str],
    spec: InputSpec,
    corrupt: str,
) -> ImageSet:
    """Decode all images where they fit in memory, else on reading."""

    def read(source: Any) -> Tensor:
        label = source[0] if isinstance(source, tuple) else source
        try:
            return decode(opener(source), spec)
        except Exception as error:
            raise DataError(
                f"the image '{label}' cannot be read ({error}); repair or remove it, or pass --skip-corrupt"
            ) from error

    def read_or_none(source: Any) -> Tensor | None:
        try:
            return read(source)
        except DataError:
            if corrupt == "refuse":
                raise
            return None

    resident = None
    if len(items) * math.prod(spec.shape) <= RESIDENT_BYTES:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoded = list(pool.map(read_or_none, [source for source, _ in items]))
        items = [item for item, image in zip(items, decoded, strict=True) if image is not None]
        kept = [image for image in decoded if image is not None]
        if not kept:
            raise DataError(f"'{name}' holds no readable image")
        resident = torch.stack(kept)
    labels = torch.tensor([label for _, label in items])
    sources = [source for source, _ in items]
    return ImageSet(
        name=name,
        count=len(items),
        read=(lambda i: read(sources[i])) if resident is None else resident.__getitem__,
        labels=labels if classes else None,
        classes=tuple(str(c) for c in classes),
        resident=resident,
    )
