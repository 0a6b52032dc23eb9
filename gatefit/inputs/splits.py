"""Divide the files of a listing into splits and classes, by the folders that they lie in."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gatefit.errors import DataError
from gatefit.inputs.listing import IMG_EXTENSIONS, SPLITS, TEST_NAMES, TRAIN_NAMES, Listing


@dataclass(frozen=True)
class LabelledFiles:
    """Images of one split."""

    split: str
    """Name of its folder; empty: the set has no splits."""
    items: list[tuple[Any, int]]
    """Source and class index of each; -1: none."""
    classes: list[str]
    """Names of the folders, in alphabetical order; empty: there are none."""


@dataclass(frozen=True)
class DividedFiles:
    """All images of a set."""

    parts: list[LabelledFiles]
    """The whole set, or training and test images."""
    skipped: list[str]
    """Why each other file is not read."""


def divide(name: str, listing: Listing) -> DividedFiles:
    """Divide a set into its splits, if it has any, and find the classes.

    Args:
        name: of the set, for messages.
        listing: its files.

    Raises:
        DataError: there are no images, half of the splits, two folders for one split, images beside class folders,
            class folders without images, or splits of different classes.
    """
    if not listing.images:
        rest = f"; it holds {counts(why for _, why in listing.skipped)}" if listing.skipped else ""
        raise DataError(f"'{name}' holds no images ({', '.join(sorted(IMG_EXTENSIONS))}){rest}")
    listing = _without_wrapper(listing)
    train, test = _split_folder(name, listing, TRAIN_NAMES), _split_folder(name, listing, TEST_NAMES)
    if train is None and test is None:
        return DividedFiles([_labelled(name, "", listing)], [why for _, why in listing.skipped])
    if train is None or test is None:
        there, missing = (train, "val/ or test/") if train else (test, "train/")
        raise DataError(f"'{name}' has {there}/ but no {missing}")
    parts = [_labelled(name, top, _below(listing, top)) for top in (train, test)]
    if parts[0].classes != parts[1].classes:
        odd = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise DataError(f"'{name}': {train}/ and {test}/ have different classes ({', '.join(odd[:3])})")
    skipped = [why for parts_, why in listing.skipped if parts_[0] in (train, test)]
    outside = [files for files, _ in listing.images if files[0] not in (train, test)]
    return DividedFiles(parts, skipped + [f"outside {train}/ and {test}/"] * len(outside))


def counts(kinds: Iterable[str]) -> str:
    """Write what was skipped as "38 .heic, 12 corrupt", the most frequent first."""
    return ", ".join(f"{count:,} {kind}" for kind, count in Counter(kinds).most_common())


def _without_wrapper(listing: Listing) -> Listing:
    """Look into a single folder that holds the whole set, as tars often have one."""
    while True:
        tops = {parts[0] for parts, _ in listing.images}
        if len(tops) != 1 or tops.pop().lower() in SPLITS or any(len(parts) < 3 for parts, _ in listing.images):
            return listing
        listing = _below(listing, listing.images[0][0][0])


def _below(listing: Listing, top: str) -> Listing:
    """Give what lies in one folder at the top, as seen from there."""
    return Listing(
        [(parts[1:], source) for parts, source in listing.images if parts[0] == top and len(parts) > 1],
        frozenset(parts[1:] for parts in listing.folders if parts[0] == top and len(parts) > 1),
        [(parts[1:], why) for parts, why in listing.skipped if parts[0] == top and len(parts) > 1],
    )


def _split_folder(name: str, listing: Listing, names: Iterable[str]) -> str | None:
    """Find the folder of one split, in whatever case its name is written; of several names the first one."""
    tops = sorted({parts[0] for parts, _ in listing.images if len(parts) > 1})
    for wanted in names:
        written = [top for top in tops if top.lower() == wanted]
        if len(written) > 1:
            raise DataError(f"'{name}' has {'/ and '.join(written)}/, which are one split; keep one of them")
        if written:
            return written[0]
    return None


def _labelled(name: str, split: str, listing: Listing) -> LabelledFiles:
    """Number the classes; images that all lie outside of folders have none."""
    where = f"'{name}'" if not split else f"{split}/ of '{name}'"
    loose = [parts[0] for parts, _ in listing.images if len(parts) == 1]
    if len(loose) == len(listing.images):
        return LabelledFiles(split, [(source, -1) for _, source in listing.images], [])
    classes = sorted({parts[0] for parts, _ in listing.images if len(parts) > 1})
    if loose:
        raise DataError(
            f"{where} has {len(loose)} image{'s' * (len(loose) > 1)} ({', '.join(loose[:3])}) beside its class folders "
            f"({', '.join(classes[:3])}); move them into a class folder, or remove them"
        )
    empty = sorted({parts[0] for parts in listing.folders} - set(classes))
    if empty:
        others = [why for parts, why in listing.skipped if parts[0] == empty[0]]
        holds = f"only {counts(others)}" if others else "no image"
        raise DataError(f"the class folder '{empty[0]}' in {where} holds {holds}; put images there, or remove it")
    number = {label: i for i, label in enumerate(classes)}
    return LabelledFiles(split, [(source, number[parts[0]]) for parts, source in listing.images], classes)
