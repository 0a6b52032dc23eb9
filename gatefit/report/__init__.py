"""A report to look at: one self-contained page and its pictures."""

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from gatefit.data import ImageSet
from gatefit.errors import GatefitError
from gatefit.evaluate import Evaluation
from gatefit.files import write_atomically
from gatefit.report import pictures
from gatefit.report.page import Section, png, render
from gatefit.report.run import Run

PAGE = "report.html"


def write_report(
    folder: Path, run: Run, others: list[Run], evaluation: Evaluation, images: ImageSet, block: str = ""
) -> Path:
    """Write `report.html` and its pictures, as PNG, into `folder`.

    Args:
        folder: of the run.
        run: what the page is about.
        others: runs to compare it with.
        evaluation: of the run, on `images`.
        images: those that were evaluated.
        block: whose channels are shown; by default the one in which images differ most.

    Returns:
        The page.

    Raises:
        GatefitError: there is no such block, or the folder cannot be written.
    """
    known = [g.name for g in evaluation.gates if g.units]
    if block and block not in known:
        raise GatefitError(f"no block '{block}' with channel gates; there are {', '.join(known) or 'none'}")
    sections = []
    for section, figure in _sections(run, others, evaluation, images, block):
        if figure is not None:
            picture = png(figure)
            write_atomically(folder / f"{section.file}.png", partial(_write_bytes, picture))
            section = section.with_picture(picture)
        sections.append(section)
    text = render(run.name, run.summary, sections)
    write_atomically(folder / PAGE, lambda file: file.write_text(text))
    return folder / PAGE


def _write_bytes(data: bytes, file: Path) -> None:
    file.write_bytes(data)


def _sections(
    run: Run, others: list[Run], evaluation: Evaluation, images: ImageSet, block: str
) -> list[tuple[Section, Figure | None]]:
    """Each part of the page with its picture, or with a word on why there is none."""
    labels, classes = evaluation.labels, images.classes
    chosen = block or pictures.most_varied(evaluation)
    by_class = "There are no labels that fit the network's classes: nothing to tell apart here."
    return [
        (
            Section("accuracy", "Accuracy against work", "Up and to the left is better. MACs are means per image, "
                    "gates included; sequential placement (filled) and parallel placement (hollow).",
                    "There is no accuracy without labels."),
            pictures.accuracy_against_macs(run, others) if evaluation.accuracy is not None else None,
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
            Section("gates", "Units always open, alive, never open", "Over all images. What is never open could go "
                    "for good; what is always open needs no gate."),
            pictures.lives(evaluation),
        ),
        (
            Section("classes", "What each class runs", pictures.meaning(evaluation), by_class),
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
                    "There was no training: the start from data and the refit made this network."),
            pictures.training(run.summary["history"]) if run.summary["history"] else None,
        ),
        (
            Section("time", "Work and time", "Of the deployed network, as shares of the original in its fastest "
                    "form on the same machine.", "Not timed: gatefit bench DIR does that."),
            pictures.time(run.bench) if run.bench else None,
        ),
    ]  # fmt: skip
