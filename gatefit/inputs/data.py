"""Images and labels: an image folder, a tar of one, the digits, or any data set that timm can create."""

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from gatefit.errors import DataError, first_line
from gatefit.inputs.metadata import Files, with_labels
from gatefit.inputs.models import InputSpec

RESIDENT_BYTES = 4 << 30
"""Decoded images up to this size are held in memory, as bytes; larger sets are decoded as they are read."""
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "validation", "valid", "test", "testing")


@dataclass(frozen=True)
class ImageSet:
    """Images of one split, decoded and centre-cropped to one size.

    `ImageSet` is a map-style dataset that is read batch by batch (`__getitems__`).
    """

    name: str
    count: int
    read: Callable[[int], Tensor]
    """Image i as uint8, (3, H, W)."""
    labels: Tensor | None
    """(count,) int64, or None."""
    classes: tuple[str, ...]
    """Names of the classes; empty where they are not known."""
    resident: Tensor | None = None
    """All images, (count, 3, H, W) uint8, where they fit."""

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Read images (B, 3, H, W) uint8, labels (B,) (-1: none) and indices (B,)."""
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


def read_data(name: str, spec: InputSpec, corrupt: str = "refuse", seed: int = 0, limit: int = 0) -> Splits:
    """Read a data set for a network's input.

    Args:
        name: folder or tar with `train/` and `val/` or `test/` (one folder a class; a set without such splits is
            divided 4 to 1; a table may give the labels, see `gatefit.inputs.metadata`), "digits", or a name that
            timm's `create_dataset` takes. Empty: Imagenette.
        spec: size and crop of the network's input.
        corrupt: "refuse" or "skip" images that cannot be read.
        seed: of the division and of `limit`.
        limit: images of each split to use, of a stream the first ones; 0: all.

    Raises:
        DataError: nothing there, no images, unreadable images, or a data set that cannot be fetched.
    """
    path = Path(name).expanduser()
    if name == "digits":
        splits = _digits(spec)
    elif name and path.is_dir():
        files = with_labels(path, _folder_files(path), (*TRAIN_NAMES, *TEST_NAMES))
        splits = _from_files(name, files, _open_file, spec, corrupt, seed)
    elif name and path.is_file():
        members, opener = _tar_files(path)
        splits = _from_files(name, members, opener, spec, corrupt, seed)
    elif not name:
        splits = _imagenette(spec, corrupt)
    elif not name.startswith(TIMM_PREFIXES):
        raise DataError(
            f"no folder or tar '{name}'; --data takes a folder with train/ and val/, a tar of one, 'digits', "
            f"or a name for timm that begins with {', '.join(TIMM_PREFIXES)}"
        )
    else:
        splits = _from_timm(name, spec, corrupt, limit)
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
            images (N, 3, H, W), uint8 or already normalised floats, and labels (N,).
        spec: the network's input, for a name or path.
        seed: of the division of a set without splits.

    Raises:
        DataError: it is none of these, or images and labels differ in number.
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
    if images.dim() != 4 or len(images) != len(labels):
        raise DataError(f"images {tuple(images.shape)} and labels {tuple(labels.shape)} do not fit each other")
    one = ImageSet("tensors", len(images), images.__getitem__, labels.long(), (), images)
    return Splits(one, one)


def some_images(images: ImageSet, spec: InputSpec, count: int) -> Tensor:
    """Take `count` images, the same each time, normalised: (count, C, H, W)."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return normalise(images.__getitems__(chosen.tolist())[0], spec)


def hold_out(images: ImageSet, count: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Divide training images into the rest and `count` held-out ones, on which choices are made."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.select(order[count:].sort().values), images.select(order[:count].sort().values)


def normalise(images: Tensor, spec: InputSpec) -> Tensor:
    """Turn uint8 images (B, 3, H, W) into the float32 that the network was trained on; floats are taken as they are."""
    if images.dtype != torch.uint8:
        return images
    mean = torch.tensor(spec.mean, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(spec.std, device=images.device).view(1, 3, 1, 1) * 255
    return (images.float() - mean) / std


def _digits(spec: InputSpec) -> Splits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    images = torch.from_numpy(pixels).view(-1, 1, 8, 8).mul(255 / 16).round().to(torch.uint8).expand(-1, 3, -1, -1)
    images = TF.resize(images, list(spec.shape[1:]), InterpolationMode.BILINEAR)
    whole = ImageSet(
        "digits", len(images), images.__getitem__, torch.from_numpy(labels).long(), tuple("0123456789"), images
    )
    return Splits(*(whole.select(torch.tensor(sorted(p))) for p in parts))


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
        *(
            _build("imagenette", [(Path(f), c) for f, c in p._samples], _open_file, p.wnids, spec, corrupt)
            for p in parts
        )
    )


def _from_timm(name: str, spec: InputSpec, corrupt: str, limit: int) -> Splits:
    from timm.data import create_dataset

    root = str(Path(torch.hub.get_dir()).parent / "gatefit" / "timm")
    splits = []
    for split in ("train", "validation"):
        try:
            dataset = create_dataset(name, root=root, split=split, is_training=False, download=True)
            dataset.transform = None
            if isinstance(dataset, IterableDataset):
                splits.append(_streamed(name, dataset, spec, limit))
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
        splits.append(_build(name, items, lambda i, d=dataset: d[i][0], names, spec, corrupt))  # type: ignore[misc]
    return Splits(*splits)


def _streamed(name: str, dataset: Iterable[tuple[Image.Image, int]], spec: InputSpec, limit: int) -> ImageSet:
    """Hold what a stream gives in memory: training needs its images in any order."""
    most = RESIDENT_BYTES // (3 * spec.shape[1] * spec.shape[2])
    images: list[Tensor] = []
    labels: list[int] = []
    for image, label in islice(dataset, limit or None):
        if len(images) == most:
            raise DataError(
                f"'{name}' is a stream of more than {most} images, which do not fit into memory; "
                "set data.limit in a recipe, or pass --data DIR"
            )
        images.append(_decode(image, spec))
        labels.append(int(label))
    if not images:
        raise DataError(f"the data set '{name}' gives no images")
    resident = torch.stack(images)
    # Which classes there are a part of a stream does not say.
    return ImageSet(name, len(images), resident.__getitem__, torch.tensor(labels), (), resident)


def _folder_files(root: Path) -> Files:
    """List (parts of the path below root, path) of every image, sorted."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        for file in sorted(files):
            if Path(file).suffix.lower() in EXTENSIONS:
                path = Path(folder) / file
                found.append((path.relative_to(root).parts, path))
    return found


def _tar_files(path: Path) -> tuple[list[tuple[tuple[str, ...], Any]], Callable[[Any], Image.Image]]:
    """List the images of a tar, read in place by their offsets; look into a single top folder."""
    try:
        with tarfile.open(path) as archive:
            members = [m for m in archive if m.isfile() and PurePosixPath(m.name).suffix.lower() in EXTENSIONS]
            compressed = not tarfile.is_tarfile(path) or archive.fileobj.__class__.__name__ not in (
                "BufferedReader",
                "FileIO",
            )
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"'{path}' is neither an image folder nor a readable tar: {error}") from error
    if compressed:
        raise DataError(f"'{path}' is compressed; unpack it or pass a plain tar")
    files = [
        (PurePosixPath(m.name).parts, (m.name, m.offset_data, m.size)) for m in sorted(members, key=lambda m: m.name)
    ]

    def opener(source: tuple[str, int, int]) -> Image.Image:
        with path.open("rb") as stream:
            stream.seek(source[1])
            return Image.open(io.BytesIO(stream.read(source[2])))

    return files, opener


def _open_file(path: Path) -> Image.Image:
    return Image.open(path)


def _from_files(
    name: str,
    files: list[tuple[tuple[str, ...], Any]],
    opener: Callable[[Any], Image.Image],
    spec: InputSpec,
    corrupt: str,
    seed: int,
) -> Splits:
    if not files:
        raise DataError(f"'{name}' holds no images ({', '.join(sorted(EXTENSIONS))})")
    splits = {*TRAIN_NAMES, *TEST_NAMES}
    while len(only := {p[0] for p, _ in files}) == 1 and not only & splits and all(len(p) > 2 for p, _ in files):
        files = [(parts[1:], key) for parts, key in files]
    tops = {parts[0].lower(): parts[0] for parts, _ in files if len(parts) > 1}
    train = next((tops[t] for t in TRAIN_NAMES if t in tops), None)
    test = next((tops[t] for t in TEST_NAMES if t in tops), None)
    if train is None or test is None:
        if train is not None or test is not None:
            there, missing = (train, "val/ or test/") if train else (test, "train/")
            raise DataError(f"'{name}' has {there}/ but no {missing}")
        whole = _labelled(files)
        built = _build(name, whole[0], opener, whole[1], spec, corrupt)
        rest, held = hold_out(built, max(1, len(built) // 5), seed)
        return Splits(rest, held)
    parts = []
    for top in (train, test):
        chosen = [(p[1:], key) for p, key in files if p[0] == top]
        parts.append(_labelled(chosen))
    if parts[0][1] != parts[1][1]:
        odd = sorted(set(parts[0][1]) ^ set(parts[1][1]))
        raise DataError(f"'{name}': {train}/ and {test}/ have different classes ({', '.join(odd[:3])})")
    return Splits(*(_build(name, items, opener, classes, spec, corrupt) for items, classes in parts))


def _labelled(files: list[tuple[tuple[str, ...], Any]]) -> tuple[list[tuple[Any, int]], list[str]]:
    """Give items their labels, and the class names: the folders; images without a folder have no labels."""
    if any(len(parts) == 1 for parts, _ in files):
        return [(key, -1) for _, key in files], []
    classes = sorted({parts[0] for parts, _ in files})
    number = {c: i for i, c in enumerate(classes)}
    return [(key, number[parts[0]]) for parts, key in files], classes


def _build(
    name: str,
    items: list[tuple[Any, int]],
    opener: Callable[[Any], Image.Image],
    classes: Sequence[str],
    spec: InputSpec,
    corrupt: str,
) -> ImageSet:
    """Decode all images where they fit in memory, else on reading."""

    def read(source: Any) -> Tensor:
        label = source[0] if isinstance(source, tuple) else source
        try:
            return _decode(opener(source), spec)
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

    size = 3 * spec.shape[1] * spec.shape[2]
    resident = None
    if len(items) * size <= RESIDENT_BYTES:
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


def _decode(image: Image.Image, spec: InputSpec) -> Tensor:
    """Resize the shorter side, crop the centre; an image of the right size stays as it is."""
    height, width = spec.shape[1:]
    image = image.convert("RGB")
    if image.size != (width, height):
        scale = max(height / spec.crop / image.height, width / spec.crop / image.width)
        size = (max(height, round(image.height * scale)), max(width, round(image.width * scale)))
        image = TF.resize(image, list(size), InterpolationMode(spec.interpolation))
        image = TF.center_crop(image, [height, width])
    tensor: Tensor = TF.pil_to_tensor(image)
    return tensor
