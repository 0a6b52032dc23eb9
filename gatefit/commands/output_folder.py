"""The folder that a run writes: it ends complete, resumable, or as it was before."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gatefit.commands.report.result import REPORT
from gatefit.errors import CheckpointError, RecipeError, TrainingError
from gatefit.files import read_json, remove_tree, write_atomically
from gatefit.folder import ORIGINAL
from gatefit.progress import OnProgress, Progress
from gatefit.recipe import RECIPE, Recipe, portable, read_recipe, write_recipe

BASELINE = "checkpoint-baseline.safetensors"
FINETUNE = "checkpoint.safetensors"
CHECKPOINTS = (BASELINE, FINETUNE)
"""What --resume takes up."""


def check_folder(recipe: Recipe, out: Path, resume: bool) -> None:
    """Refuse a folder that a run of `recipe` cannot write, before anything is computed.

    Raises:
        CheckpointError: it is a file, holds something else, is complete, or cannot be written.
        RecipeError: a run of another recipe is in it.
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"'{out}' is a file; choose another --out")
    holds_something = out.exists() and any(out.iterdir())
    if holds_something and not resume:
        raise CheckpointError(f"'{out}' exists; choose another --out, or go on with --resume")
    if holds_something and not (out / RECIPE).is_file():
        raise CheckpointError(f"'{out}' is not a run of gatefit: it has no {RECIPE}; choose another --out")
    if holds_something:
        if portable(read_recipe(out / RECIPE), out) != portable(recipe, out):
            raise RecipeError(f"'{out}' was begun with another recipe ({out / RECIPE}); resume with the same options")
        if (out / REPORT).is_file():
            read_json(out / REPORT)
            raise CheckpointError(f"'{out}' is complete; there is nothing to resume")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"'{out}' cannot be written: no permission in '{parent}'; choose another --out")


@contextmanager
def output_folder(recipe: Recipe, out: Path, main: bool, on_progress: OnProgress) -> Iterator[None]:
    """Write `out` as a whole.

    At the end of the block, checkpoints go. After an error, what a training had saved stays for --resume. Where the
    same error would come again, only a network whose training had ended stays. With nothing to keep, a folder that was
    new is removed.

    Args:
        recipe: written into the folder first.
        out: checked by `check_folder`.
        main: whether this process is the one that writes.
        on_progress: told what is kept.
    """
    existed = out.exists()
    fresh = not existed or not any(out.iterdir())
    try:
        if main:
            text = write_recipe(portable(recipe, out))
            write_atomically(out / RECIPE, lambda file: file.write_text(text, encoding="utf-8"))
        yield
        if main:
            for name in CHECKPOINTS:
                (out / name).unlink(missing_ok=True)
    except BaseException as error:
        saved = any((out / name).exists() for name in CHECKPOINTS)
        resumable = saved and not isinstance(error, TrainingError | RecipeError)  # those would come again
        learnt = out / ORIGINAL
        if fresh and main and not resumable and not learnt.exists() and not (out / REPORT).exists():
            remove_tree(out)
            if existed:
                out.mkdir(exist_ok=True)
        elif main and saved and not resumable and learnt.exists():
            line = f"The trained network is kept. In a new --out go on with --weights {learnt} --set baseline.epochs=0"
            on_progress(Progress("convert", message=line))
        elif main and resumable and isinstance(error, Exception):
            line = f"What was trained so far is kept. Mend what follows, then go on with --resume --out {out}"
            on_progress(Progress("convert", message=line))
        raise
