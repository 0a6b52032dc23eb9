"""Put the page and its pictures together and write them."""

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from gatefit.commands.report import pictures
from gatefit.commands.report.page import Section, png, render
from gatefit.commands.report.result import Result
from gatefit.files import write_atomically
from gatefit.inputs.data import ImageSet
from gatefit.training.evaluate import Evaluation

PAGE = "report.html"


def write_report(
    folder: Path, result: Result, others: list[Result], evaluation: Evaluation, images: ImageSet, block: str = ""
) -> Path:
    """Write `report.html` and its pictures, as PNG, into `folder`; pictures that it no longer has are removed.

    Args:
        folder: of the result.
        result: what the page is about.
        others: results to compare it with.
        evaluation: of the result, on `images`.
        images: those that were evaluated.
        block: whose channels are shown; by default the one in which images differ most.

    Returns:
        The page.

    Raises:
        GatefitError: the folder cannot be written.
    """
    sections = [
        section if figure is None else section.with_picture(png(figure))
        for section, figure in _sections(result, others, evaluation, images, block)
    ]
    text = render(result.name, result.report, sections)
    for section in sections:
        file = folder / f"{section.file}.png"
        if section.picture:
            write_atomically(file, partial(_write_bytes, section.picture))
        else:
            file.unlink(missing_ok=True)
    write_atomically(folder / PAGE, partial(_write_bytes, text.encode()))
    return folder / PAGE


def _write_bytes(data: bytes, file: Path) -> None:
    file.write_bytes(data)


def _sections(
    result: Result, others: list[Result], evaluation: Evaluation, images: ImageSet, block: str
) -> list[tuple[Section, Figure | None]]:
    """Give each part of the page with its picture, or with a word on why there is none."""
    labels, classes = evaluation.labels, images.classes
    chosen = block or pictures.most_varied(evaluation)
    meaning = "No block is ever skipped whole: mean share of each block's channels that the images of a class open."
    if pictures.are_skipped(evaluation):
        meaning = "Share of the images of a class that run each block."
    by_class = "There are no labels that fit the network's classes: nothing to tell apart here."
    return [
        (
            Section("accuracy", "Accuracy against work", "Up and to the left is better. MACs are means per image, "
                    "gates included. Filled: sequential placement. Hollow: parallel placement.",
                    "There is no accuracy without labels."),
            pictures.accuracy_against_macs(result, others)
            if result.report["gated"]["accuracy"] is not None
            else None,
        ),
        (
            Section("macs", "Work of each image", f"{evaluation.paths:,} different paths through the network were "
                    f"taken by {evaluation.images:,} images."),
            pictures.histogram(evaluation),
        ),
        (
            Section("extremes", "The images with the fewest and the most MACs", "With their labels, where known, and "
                    "the network's answer where it is another."),
            pictures.extremes(evaluation, images),
        ),
        (
            Section("gates", "Units always, sometimes and never open", "A unit is the "
                    "smallest set of channels that open and close together. What is never open could go "
                    "for good; what is always open needs no gate."),
            pictures.lives(evaluation),
        ),
        (
            Section("classes", "What each class runs", meaning, by_class),
            pictures.blocks_by_class(evaluation, labels, classes) if labels is not None else None,
        ),
        (
            Section("channels", "Channels of one block, by class", f"Share of the images of a class that open each "
                    f"channel of {chosen}.", by_class if chosen else "No block has a channel gate."),
            pictures.channels_by_class(evaluation, labels, classes, chosen)
            if labels is not None and chosen
            else None,
        ),
        (
            Section("training", "Training", "Means of each epoch. The share of MACs is what the hard gates ran.",
                    "There was no training."),
            pictures.training(result.report["history"]) if result.report["history"] else None,
        ),
        (
            Section("time", "Work and time", "Of the network as gatefit bench deployed it, as shares of the "
                    "original in its fastest form on the same machine.",
                    "Not timed: run gatefit bench FOLDER, then gatefit report FOLDER."),
            pictures.time(result.bench) if result.bench else None,
        ),
    ]  # fmt: skip
