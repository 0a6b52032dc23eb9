"""The main job, from a recipe to an output folder."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import fx, nn

from gatefit.commands.report.result import REPORT, Result, read_result
from gatefit.errors import CheckpointError, DataError, RecipeError, TrainingError
from gatefit.files import read_json, remove_tree, write_atomically, write_json, write_tensors
from gatefit.folder import ORIGINAL, Figures
from gatefit.gating.checkpoint import load, load_original, save
from gatefit.gating.gates import gates_of
from gatefit.gating.info import info_of, set_info
from gatefit.gating.insert import retrofit, rewrite
from gatefit.inputs.data import Splits, read_data
from gatefit.inputs.models import (
    InputSpec,
    ModelReference,
    build,
    input_spec,
    load_weights,
    output_count,
    parse_reference,
    read_weights,
    skeleton,
)
from gatefit.recipe import FinetunePart, Recipe, read_recipe, write_recipe
from gatefit.training.evaluate import Evaluation, evaluate
from gatefit.training.finetune import check_settings, finetune, train_dense
from gatefit.training.trainer import Epoch, Progress, Report

RECIPE = "recipe.toml"
TOLERANCE = 0.02
"""Largest distance from the target that passes without a word."""
_CHECKPOINTS = {"baseline": "checkpoint-baseline.safetensors", "fine-tune": "checkpoint.safetensors"}


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    gated: fx.GraphModule
    evaluation: Evaluation
    report: dict[str, Any]
    """The content of report.json."""


def convert(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
    report: Report = lambda _: None,
) -> Conversion:
    """Build, train where the recipe has a baseline, retrofit, fine-tune, evaluate, and write `out`.

    Args:
        recipe: everything that the result depends on.
        out: folder to write; must be new, or one that is resumed.
        resume: go on with a broken run of the same recipe.
        say: called with one line at each stage.
        report: called after each training step.

    Raises:
        GatefitError: whatever the user can mend; nothing half-written is left behind. What a training had saved
            before something else than itself went wrong stays, and `resume` takes it up.
    """
    main = PartialState().is_main_process
    _check_out(recipe, out, resume)
    if recipe.finetune.l1 is None and recipe.finetune.target is None:
        raise RecipeError("give --l1 X or --target SHARE: without either no gate would close")
    reference, model, data, trained = _prepare(recipe, say)
    spec = input_spec(model, recipe.model.image_size or None)
    if trained and not recipe.data.name:
        data = data.unlabelled()  # Imagenette's classes are not the network's
    data, fitting = _fit_labels(model, data, spec, trained, say)
    example = torch.zeros(2, *spec.shape)
    existed = out.exists()
    fresh = not existed or not any(out.iterdir())
    try:
        if main:
            write_atomically(out / RECIPE, lambda file: file.write_text(write_recipe(recipe)))
        if recipe.baseline.epochs:
            # What cannot work is refused now, not when the baseline is trained.
            planned = rewrite(model, example, recipe.gates.kinds, recipe.gates.form)
            check_settings(planned, data.train, recipe.finetune, recipe.gates.start)
            _train_baseline(recipe, model, data, spec, out, resume, say, report)
            trained = True
        gated = retrofit(model, example, recipe.gates.kinds, recipe.gates.form, recipe.gates.compensation)
        set_info(gated, input=spec, reference=reference)
        checked = info_of(gated).verification
        assert checked is not None
        say(
            f"converted: {checked.outputs} outputs equal the original's to the bit; {checked.closed_units} closed "
            f"units and {checked.closed_blocks} closed blocks overwritten with noise without changing one"
        )
        history = finetune(
            gated,
            data,
            model if trained else None,
            settings=recipe.finetune,
            start=recipe.gates.start,
            seed=recipe.seed,
            report=report,
            checkpoint=out / _CHECKPOINTS["fine-tune"],
            resume=resume,
        )
        say(f"evaluating on {len(data.test)} images")
        evaluation = evaluate(
            gated, data, model if trained else None, lambda done, images: report(Progress("evaluate", done, images))
        )
        target = recipe.finetune.target
        if target is not None and abs(evaluation.share - target) > TOLERANCE:
            say(f"note: the target was {target}, the share reached on the test images is {evaluation.share:.3f}")
        summary = summarise(recipe, reference, evaluation, history, fitting)
        if main:
            write_tensors(out / ORIGINAL, model.state_dict())
            classes = data.train.classes if fitting else None
            save(gated, out, classes=classes, figures=kept_figures(evaluation, recipe.data.name or "imagenette"))
            write_json(out / REPORT, summary)  # marks the folder as complete
            for name in _CHECKPOINTS.values():
                (out / name).unlink(missing_ok=True)
            fresh = False
            _write_page(out, summary, evaluation, data, say)
    except BaseException as error:
        saved = any((out / c).exists() for c in _CHECKPOINTS.values())
        resumable = saved and not isinstance(error, TrainingError | RecipeError)  # those would come again
        if fresh and main and not resumable:
            remove_tree(out)
            if existed:
                out.mkdir(exist_ok=True)
        elif main and resumable and isinstance(error, Exception):
            say(f"what was trained so far is kept: mend what follows, then go on with --resume --out {out}")
        raise
    return Conversion(gated, evaluation, summary)


def summarise(
    recipe: Recipe, reference: ModelReference, evaluation: Evaluation, history: list[Epoch], labelled: bool
) -> dict[str, Any]:
    """The content of report.json: figures of `evaluation`, MACs as means per image."""
    return {
        "model": str(reference),
        "data": recipe.data.name or "imagenette",
        "seed": recipe.seed,
        "labels": labelled,
        **figures(evaluation),
        "history": [asdict(e) for e in history],
    }


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as plain JSON values."""
    macs = evaluation.macs
    return {
        "images": evaluation.images,
        "dense": {"accuracy": evaluation.dense_accuracy, "macs": evaluation.dense_macs},
        "gated": {
            "accuracy": evaluation.accuracy,
            "agreement": evaluation.agreement,
            "macs_sequential": evaluation.macs_sequential,
            "macs_parallel": evaluation.macs_parallel,
            "share": evaluation.share,
            "macs_std": float(macs.std(correction=0)),
            "macs_min": float(macs.min()),
            "macs_max": float(macs.max()),
            "paths": evaluation.paths,
        },
        "histogram": _histogram(evaluation),
        "gates": [asdict(g) for g in evaluation.gates],
    }


def kept_figures(evaluation: Evaluation, data: str) -> Figures:
    """The figures of an evaluation that `config.json` keeps; of images in a folder, the folder's own name."""
    return Figures(
        data=Path(data).name if Path(data).is_absolute() else data,
        images=evaluation.images,
        accuracy=evaluation.accuracy,
        agreement=evaluation.agreement,
        macs=evaluation.macs_sequential,
        share=evaluation.share,
        original_accuracy=evaluation.dense_accuracy,
        original_macs=evaluation.dense_macs,
    )


def evaluate_folder(folder: Path, data: str = "", skip_corrupt: bool = False) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate a folder that `convert` wrote, on its own data or others.

    Raises:
        GatefitError: the folder or the data cannot be read.
    """
    opened = open_folder(folder, data, skip_corrupt)
    opened.gated.to(Accelerator().device)
    evaluation = evaluate(opened.gated, opened.data, opened.teacher)
    return evaluation, {"model": opened.name, **figures(evaluation)}


def report_folders(folders: list[Path], data: str = "", skip_corrupt: bool = False, block: str = "") -> Path:
    """Write the page of the first folder, compared with the others; see `gatefit.commands.report.write.write_report`.

    Raises:
        GatefitError: a folder or the data cannot be read, or there is no such block.
    """
    from gatefit.commands.report.write import (
        write_report,  # matplotlib takes half a second: only where something is drawn
    )

    result, *others = (read_result(folder) for folder in folders)
    opened = open_folder(folders[0], data, skip_corrupt)
    known = [name for name, gate in gates_of(opened.gated).items() if gate.channel is not None]
    if block and block not in known:
        raise RecipeError(f"no block '{block}' with a channel gate; there are {', '.join(known) or 'none'}")
    opened.gated.to(Accelerator().device)
    evaluation = evaluate(opened.gated, opened.data, opened.teacher)
    if data:
        result = replace(result, report={**result.report, **figures(evaluation), "data": data})
    return write_report(folders[0], result, others, evaluation, opened.data.test, block)


@dataclass(frozen=True)
class Opened:
    """A folder that `convert` wrote."""

    name: str
    """Of the model."""
    gated: fx.GraphModule
    original: nn.Module | None
    data: Splits
    trained: bool
    """Whether the original had learnt anything; without weights or a baseline it had not."""

    @property
    def teacher(self) -> nn.Module | None:
        """The original, if there is anything to compare with it."""
        return self.original if self.trained else None


def open_folder(folder: Path, data: str = "", skip_corrupt: bool = False) -> Opened:
    """Read a folder that `convert` wrote, with its own data or others.

    Raises:
        GatefitError: the folder or the data cannot be read.
    """
    gated = load(folder)
    recipe = read_recipe(folder / RECIPE) if (folder / RECIPE).is_file() else Recipe()
    if not data and not (folder / RECIPE).is_file():
        raise DataError(f"{folder} does not say what data it was made with; pass --data")
    corrupt = "skip" if skip_corrupt else recipe.data.corrupt
    limit = 0 if data else recipe.data.limit
    splits = read_data(data or recipe.data.name, info_of(gated).input, corrupt, recipe.seed, limit)
    trained = recipe.model.pretrained or bool(recipe.model.weights) or recipe.baseline.epochs > 0
    reference = info_of(gated).reference
    return Opened(reference.name if reference else "", gated, load_original(folder), splits, trained)


def _histogram(evaluation: Evaluation, bins: int = 20) -> dict[str, list[float]]:
    """Images by their share of the dense MACs."""
    share = evaluation.macs / evaluation.dense_macs
    low, high = float(share.min()), float(share.max())
    if high - low < 1e-9:
        return {"edges": [low, high], "counts": [evaluation.images]}
    counts = torch.histc(share, bins, low, high)
    return {"edges": torch.linspace(low, high, bins + 1).tolist(), "counts": counts.tolist()}


def _check_out(recipe: Recipe, out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"'{out}' is a file; choose another --out")
    if not resume:
        if out.exists() and any(out.iterdir()):
            raise CheckpointError(f"'{out}' exists; choose another --out, or go on with --resume")
    elif out.exists() and any(out.iterdir()) and not (out / RECIPE).is_file():
        raise CheckpointError(f"'{out}' is not a run of gatefit: it has no {RECIPE}; choose another --out")
    elif (out / RECIPE).is_file():
        if (out / RECIPE).read_text() != write_recipe(recipe):
            raise RecipeError(f"'{out}' was begun with another recipe ({out / RECIPE}); resume with the same options")
        if (out / REPORT).is_file():
            read_json(out / REPORT)
            raise CheckpointError(f"'{out}' is complete; there is nothing to resume")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"'{out}' cannot be written: no permission in '{parent}'; choose another --out")


def _prepare(recipe: Recipe, say: Callable[[str], None]) -> tuple[ModelReference, nn.Module, Splits, bool]:
    """The network with its weights, and the images for it."""
    part = recipe.model
    if not part.name:
        raise RecipeError("no model: name one on the command line or in the recipe's [model]")
    if part.pretrained and part.weights:
        raise RecipeError("give --pretrained or --weights, not both")
    trained = part.pretrained or bool(part.weights)
    reference = parse_reference(part.name)
    model = None
    if trained:
        reference, model = _with_weights(reference, part.pretrained, part.weights)
    if not recipe.data.name:
        say(
            "no --data given: fine-tuning on Imagenette (9,469 ImageNet images of 10 classes, fetched through "
            "torchvision) by distillation from the original, which needs no labels"
        )
    spec = input_spec(skeleton(reference) if model is None else model, part.image_size or None)
    data = read_data(recipe.data.name, spec, recipe.data.corrupt, recipe.seed, recipe.data.limit)
    if model is None:
        torch.manual_seed(recipe.seed)
        classes = len(data.train.classes)
        if reference.source != "file" and classes:
            reference = replace(reference, arguments={"num_classes": classes})
        model = build(reference)
    return reference, model, data, trained


def _with_weights(reference: ModelReference, pretrained: bool, weights: str) -> tuple[ModelReference, nn.Module]:
    """Build with weights; a head of another size than the name's default is taken from the file."""
    if pretrained:
        return reference, build(reference, pretrained=True)
    model = build(reference)
    state, own = read_weights(Path(weights)), model.state_dict()
    odd = {k for k in own if k in state and own[k].shape != state[k].shape}
    sizes = {state[k].shape[0] for k in odd if own[k].shape[1:] == state[k].shape[1:]}
    if odd and len(odd) <= 2 and len(sizes) == 1 and reference.source != "file":
        reference = replace(reference, arguments={"num_classes": int(sizes.pop())})
        model = build(reference)
    load_weights(model, Path(weights))
    return reference, model


def _fit_labels(
    model: nn.Module, data: Splits, spec: InputSpec, trained: bool, say: Callable[[str], None]
) -> tuple[Splits, bool]:
    """Labels are used where they fit the head; a trained network can do without."""
    outputs, classes = output_count(model, spec), len(data.train.classes)
    if data.train.fits(outputs):
        if not classes:
            say(f"the data does not name its classes: its labels are taken for the network's {outputs}, in their order")
        return data, True
    if not trained:
        raise DataError(
            f"the network has {outputs} outputs, the data {classes} classes; without trained weights it "
            "cannot learn from them: change the network's head or the data"
        )
    has = f"{classes} classes" if classes else "no labels"
    say(f"the data has {has} for {outputs} outputs: its labels are not used, distillation alone trains")
    return data.unlabelled(), False


def _train_baseline(
    recipe: Recipe,
    model: nn.Module,
    data: Splits,
    spec: InputSpec,
    out: Path,
    resume: bool,
    say: Callable[[str], None],
    report: Callable[[Progress], None],
) -> None:
    part = recipe.baseline
    say(f"training the dense network for {part.epochs} epochs on {len(data.train)} images")
    file = out / _CHECKPOINTS["baseline"]
    settings = FinetunePart(
        epochs=part.epochs,
        batch_size=part.batch_size,
        lr=part.lr,
        weight_decay=part.weight_decay,
        augment=recipe.finetune.augment,
        flip=recipe.finetune.flip,
        mixed_precision=recipe.finetune.mixed_precision,
        compile=recipe.finetune.compile,
    )
    train_dense(model, data.train, spec, settings, seed=recipe.seed, report=report, checkpoint=file, resume=resume)


def _write_page(
    out: Path, summary: dict[str, Any], evaluation: Evaluation, data: Splits, say: Callable[[str], None]
) -> None:
    """The page, without which the folder is complete too."""
    try:
        from gatefit.commands.report.write import write_report

        write_report(out, Result(out.resolve().name, summary, []), [], evaluation, data.test)
    except Exception as error:
        say(f"note: the page could not be written ({error}); everything else was, and gatefit report {out} tries again")
