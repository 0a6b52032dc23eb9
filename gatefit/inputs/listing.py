"""Which files of an image folder, or of a tar of one, are images; and what else lies there."""

import io
import os
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from gatefit.errors import DataError

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "validation", "valid", "test", "testing")
SPLITS = frozenset({*TRAIN_NAMES, *TEST_NAMES})
DESCRIPTIONS = frozenset({".csv", ".json", ".jsonl", ".md", ".parquet", ".txt", ".xml", ".yaml", ".yml"})
"""Extensions of files that describe images and are none: they are left out without being counted."""

Parts = tuple[str, ...]
"""Names of the folders below the top of a set, and of the file."""
Opener = Callable[[Any], Image.Image]
"""Opens an image by its source."""


@dataclass(frozen=True)
class Listing:
    """The files of an image folder or tar, in the order in which they are numbered."""

    images: list[tuple[Parts, Any]]
    """With the source of each, which its opener takes."""
    folders: frozenset[Parts]
    """All folders, also those without images."""
    skipped: list[tuple[Parts, str]]
    """Files that are not read, and why: an extension, "hidden" or "links"."""


def list_folder(root: Path) -> Listing:
    """List an image folder. Hidden files and folders are not read.

    A split or a class may be a link to a folder elsewhere, and an image a link to a file elsewhere.

    Raises:
        DataError: a folder cannot be read, or a link leads out of a class folder or to images that are read anyway.
    """
    images: list[tuple[Parts, Path]] = []
    folders: set[Parts] = set()
    skipped: list[tuple[Parts, str]] = []
    roots = [Path(os.path.realpath(root))]
    waiting: list[tuple[Path, Parts, bool]] = [(root, (), True)]
    while waiting:
        folder, parts, above_classes = waiting.pop()
        below, files = _entries(folder)
        for entry in files:
            path, why = Path(entry.path), _why_skipped(entry.name)
            if why is not None:
                skipped.append(((*parts, entry.name), why))
            elif _is_image(entry.name):
                if entry.is_symlink() and path.exists():  # one that leads nowhere is a corrupt image
                    _check_link(path, roots)
                images.append(((*parts, entry.name), path))
        holds_images = any(_is_image(entry.name) for entry in files)
        for entry in below:
            if entry.is_symlink():
                if not above_classes:
                    raise DataError(
                        f"the link '{entry.path}' leads out of its class folder, to '{os.path.realpath(entry.path)}'; "
                        "put the images themselves there, or remove the link"
                    )
                roots.append(_check_link(Path(entry.path), roots))
            folders.add((*parts, entry.name))
        waiting += [
            (
                Path(entry.path),
                (*parts, entry.name),
                above_classes and (entry.name.lower() in SPLITS or (len(below) == 1 and not holds_images)),
            )
            for entry in reversed(below)
        ]
    return Listing(images, frozenset(folders), skipped)


def open_file(path: Path) -> Image.Image:
    """Open an image file; not a pipe or a device, whose reading may never end.

    Raises:
        OSError: it is no regular file, or no image.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no regular file")
    return Image.open(path)


def list_tar(path: Path) -> tuple[Listing, Opener]:
    """List the images of a tar, which its opener reads in place. Of members with one name the last counts, as in tar.

    Raises:
        DataError: it is no tar, or a compressed one.
    """
    try:
        with tarfile.open(path) as archive:
            members = {_parts(m.name): m for m in archive if _parts(m.name)}
            compressed = archive.fileobj.__class__.__name__ not in ("BufferedReader", "FileIO")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"'{path}' is neither an image folder nor a readable tar: {error}") from error
    if compressed:
        raise DataError(f"'{path}' is compressed; unpack it or pass a plain tar")
    images: list[tuple[Parts, Any]] = []
    folders: set[Parts] = set()
    skipped: list[tuple[Parts, str]] = []
    for parts, member in sorted(members.items(), key=lambda item: item[1].name):
        if member.isdir():
            folders.add(parts)
            continue
        folders |= {parts[:i] for i in range(1, len(parts))}
        why = "hidden" if any(p.startswith(".") for p in parts[:-1]) else _why_skipped(parts[-1])
        if why is None and _is_image(parts[-1]) and (not member.isfile() or member.issparse()):
            why = "links" if member.issym() or member.islnk() else "that are no files"
        if why is not None:
            skipped.append((parts, why))
        elif _is_image(parts[-1]):
            images.append((parts, (member.name, member.offset_data, member.size)))
    visible = frozenset(f for f in folders if not any(p.startswith(".") for p in f))

    def opener(source: tuple[str, int, int]) -> Image.Image:
        with path.open("rb") as stream:
            stream.seek(source[1])
            return Image.open(io.BytesIO(stream.read(source[2])))

    return Listing(images, visible, skipped), opener


def _parts(name: str) -> Parts:
    return tuple(p for p in PurePosixPath(name).parts if p not in ("/", ".."))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _why_skipped(name: str) -> str | None:
    """Say why a file is left out; None: it is an image, or nothing that one would take for an image."""
    suffix = PurePosixPath(name).suffix.lower()
    if name.startswith("."):
        return "hidden" if suffix in IMG_EXTENSIONS else None
    if suffix in IMG_EXTENSIONS or suffix in DESCRIPTIONS or name.lower() in ("thumbs.db", "desktop.ini"):
        return None
    return suffix or "without extension"


def _entries(folder: Path) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Give the visible folders and all other entries of a folder, each sorted by name."""
    folders: list[os.DirEntry[str]] = []
    files: list[os.DirEntry[str]] = []
    try:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            (folders if _is_folder(entry) else files).append(entry)
    except OSError as error:
        raise DataError(f"the folder '{folder}' cannot be read: {error.strerror}") from error
    return [entry for entry in folders if not entry.name.startswith(".")], files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _check_link(link: Path, roots: list[Path]) -> Path:
    """Return where a link leads; refuse one to what lies in, or holds, a folder of `roots`."""
    target = Path(os.path.realpath(link))
    if any(target.is_relative_to(root) or root.is_relative_to(target) for root in roots):
        raise DataError(
            f"the link '{link}' leads to '{target}', whose images are read anyway and would count twice; "
            "remove the link, or put a copy there"
        )
    return target
