"""Experiment trackers, such as TensorBoard and Weights & Biases, through accelerate."""

import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from gatefit.errors import RecipeError
from gatefit.progress import OnProgress, Progress
from gatefit.recipe import Recipe

PROJECT = "gatefit"


def check_trackers(names: Sequence[str]) -> None:
    """Check that every tracker is one of accelerate's and is installed.

    Raises:
        RecipeError: one of them is not.
    """
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(known))}"
            raise RecipeError(f"--log-with: no tracker '{name}'; {hint}")
        if name not in available:
            raise RecipeError(f"--log-with {name}: it is not installed; run: pip install {name}")


@contextmanager
def tracking(names: Sequence[str], recipe: Recipe, folder: Path) -> Iterator[OnProgress]:
    """Give a callback that logs every training step to trackers, under one project, "gatefit".

    Trackers start at the first step, so a run that is refused leaves nothing in them. Only the main process logs.

    Args:
        names: of trackers, checked by `check_trackers`.
        recipe: logged as the run's configuration, one value per dotted key.
        folder: where trackers that write files put them.
    """
    trackers: list[Any] = []
    started = False

    def log(progress: Progress) -> None:
        nonlocal started
        if not names or not PartialState().is_main_process or progress.loss is None:
            return
        if not started:
            started = True
            trackers.extend(_start(name, folder) for name in dict.fromkeys(names))
            for tracker in trackers:
                tracker.store_init_configuration(flat(asdict(recipe)))
        values = {"loss": progress.loss, "accuracy": progress.accuracy, "share": progress.share}
        named = {f"{progress.stage}/{k}": v for k, v in values.items() if v is not None}
        for tracker in trackers:
            tracker.log(named, step=progress.step)

    try:
        yield log
    finally:
        for tracker in trackers:
            with suppress(OSError):  # a run that failed may have removed the folder
                tracker.finish()


def _start(name: str, folder: Path) -> Any:
    tracker_class: Any = LOGGER_TYPE_TO_CLASS[name]
    if tracker_class.requires_logging_directory:
        tracker = tracker_class(PROJECT, os.fspath(folder))
    else:
        tracker = tracker_class(PROJECT)
    if hasattr(tracker, "start"):  # earlier versions of accelerate start a tracker when they make it
        tracker.start()
    return tracker


def flat(table: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Flatten nested tables to dotted keys; leave out what is not set."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        path = f"{where}.{key}" if where else key
        if isinstance(value, dict):
            values |= flat(value, path)
        elif value is not None:
            values[path] = value
    return values
