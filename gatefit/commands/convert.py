"""The main job, from a recipe to an output folder, as a list of stages."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from gatefit.commands.figures import kept_figures, summarise
from gatefit.commands.output_folder import BASELINE, CHECKPOINTS, FINETUNE, check_folder, output_folder
from gatefit.commands.report.result import REPORT, Result
from gatefit.errors import DataError, RecipeError
from gatefit.files import write_json, write_tensors
from gatefit.folder import ORIGINAL
from gatefit.gating.checkpoint import save
from gatefit.gating.info import info_of, set_info
from gatefit.gating.insert import retrofit, rewrite
from gatefit.graph.partial import traced_forwards
from gatefit.inputs.data import Splits, normalise, read_data
from gatefit.inputs.models import (
    ModelReference,
    build,
    load_weights,
    output_count,
    parse_reference,
    read_weights,
    skeleton,
)
from gatefit.inputs.spec import InputSpec, StatedInput, network_input
from gatefit.mode import evaluating
from gatefit.progress import OnProgress, Progress, silent
from gatefit.recipe import FinetunePart, Recipe
from gatefit.training.evaluate import Evaluation, evaluate, warn_of_chance
from gatefit.training.finetune import check_closing, check_settings, finetune, train_dense
from gatefit.training.trainer import Epoch

LOOKED_AT = 200
"""Test images on which the original is tried before anything is trained."""
TOLERANCE = 0.02
"""Largest distance from the target that passes without a word."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    gated: nn.Module
    evaluation: Evaluation
    report: dict[str, Any]
    """The content of report.json."""


def convert(recipe: Recipe, out: Path, *, resume: bool = False, on_progress: OnProgress = silent) -> Conversion:
    """Build, train where the recipe has a baseline, retrofit, fine-tune, evaluate, and write `out`.

    Args:
        recipe: everything that the result depends on.
        out: folder to write; must be new, or one that is resumed.
        resume: go on with a broken run of the same recipe.
        on_progress: called after each step of each stage, and with one line at each stage.

    Raises:
        GatefitError: whatever the user can mend; nothing half-written is left behind. What a training had saved
            before something else than itself went wrong stays, and `resume` takes it up.
    """
    if not recipe.model.name:
        raise RecipeError("no model: name one on the command line or in the recipe's [model]")
    check_folder(recipe, out, resume)
    check_closing(recipe.closing)
    run = _Run(recipe, out, resume, PartialState().is_main_process, on_progress)
    if resume and not any((out / name).exists() for name in CHECKPOINTS):
        run.say(f"note: there is nothing to resume in {out}; the run begins anew")
    inputs = prepare(run)
    with output_folder(recipe, out, run.main, on_progress):
        inputs = train_baseline(run, inputs)
        gated = insert_gates(run, inputs)
        history = close_gates(run, inputs, gated)
        evaluation = evaluate_result(run, inputs, gated)
        report = write_result(run, inputs, gated, evaluation, history)
    return Conversion(gated, evaluation, report)


@dataclass(frozen=True)
class _Run:
    """What every stage is told."""

    recipe: Recipe
    out: Path
    resume: bool
    main: bool
    """Whether this process is the one that writes."""
    on_progress: OnProgress

    def say(self, line: str) -> None:
        """Tell the user one line."""
        self.on_progress(Progress("convert", message=line))


@dataclass(frozen=True)
class _Inputs:
    """The original network and its images."""

    reference: ModelReference
    model: nn.Module
    data: Splits
    spec: InputSpec
    labelled: bool
    """Whether the labels are used: they fit the network's head."""
    trained: bool
    """Whether the network has learnt anything yet: from weights or a baseline."""

    @property
    def teacher(self) -> nn.Module | None:
        """Give the original, if there is anything to learn from it."""
        return self.model if self.trained else None

    @property
    def example(self) -> Tensor:
        """Give a batch of two empty images, (2, C, H, W)."""
        return torch.zeros(2, *self.spec.shape)


def prepare(run: _Run) -> _Inputs:
    """Build the network with its weights, read the images, and decide whether the labels fit."""
    recipe = run.recipe
    part = recipe.model
    if part.pretrained + bool(part.weights) + part.trained > 1:
        raise RecipeError("give only one of --pretrained, --weights and --trained: each says where the weights are")
    trained = part.starts_trained
    reference = parse_reference(part.name)
    if part.trained and reference.source != "file":
        raise RecipeError(f"--trained is for a function in a file; for {reference} pass --pretrained or --weights FILE")
    model = None
    if trained:
        reference, model = _with_weights(reference, part.pretrained, part.weights)
    stated = StatedInput(part.image_size, part.mean, part.std)
    expected = network_input(skeleton(reference) if model is None else model, stated)
    run.say(str(expected))
    if not (trained or recipe.baseline.epochs):
        run.say(_untrained(reference))
    if not recipe.data.name:
        how = "by distillation from the original, which needs no labels" if trained else "on its labels"
        run.say(
            "no --data given: fine-tuning on Imagenette (9,469 ImageNet images of 10 classes, fetched through "
            f"torchvision) {how}"
        )
    data = read_data(
        recipe.data.name, expected.spec, recipe.data.corrupt, recipe.seed, recipe.data.limit, expected.size_assumed
    )
    if model is None:
        torch.manual_seed(recipe.seed)
        classes = len(data.train.classes)
        if reference.source != "file" and classes:
            reference = replace(reference, arguments={"num_classes": classes})
        model = build(reference)
    spec = network_input(model, stated).spec
    if trained and not recipe.data.name:
        data = data.unlabelled()  # Imagenette's classes are not the network's
    data, labelled = _fit_labels(model, data, spec, trained, run.say)
    if trained and labelled:
        _check_knows(model, data, spec)
    return _Inputs(reference, model, data, spec, labelled, trained)


def train_baseline(run: _Run, inputs: _Inputs) -> _Inputs:
    """Train the dense network on labels, where the recipe has a baseline."""
    recipe, part = run.recipe, run.recipe.baseline
    if not part.epochs:
        return inputs
    # What cannot work is refused now, not when the baseline is trained.
    planned = rewrite(inputs.model, inputs.example, recipe.gates.kinds, recipe.gates.form)
    check_settings(planned, inputs.data.train, recipe.finetune, recipe.closing, recipe.gates.start)
    run.say(f"training the dense network for {part.epochs} epochs on {len(inputs.data.train)} images")
    loop = FinetunePart(
        epochs=part.epochs,
        batch_size=part.batch_size,
        lr=part.lr,
        weight_decay=part.weight_decay,
        augment=recipe.finetune.augment,
        flip=recipe.finetune.flip,
        mixed_precision=recipe.finetune.mixed_precision,
        compile=recipe.finetune.compile,
    )
    train_dense(
        inputs.model,
        inputs.data.train,
        inputs.spec,
        loop,
        seed=recipe.seed,
        on_progress=run.on_progress,
        checkpoint=run.out / BASELINE,
        resume=run.resume,
    )
    if run.main:
        write_tensors(run.out / ORIGINAL, inputs.model.state_dict())  # whatever comes, this was paid for
    return replace(inputs, trained=True)


def insert_gates(run: _Run, inputs: _Inputs) -> nn.Module:
    """Retrofit the gates, and say what the proof checked."""
    part = run.recipe.gates
    gated = retrofit(inputs.model, inputs.example, part.kinds, part.form, part.compensation)
    set_info(gated, input=inputs.spec, reference=inputs.reference)
    checked = info_of(gated).verification
    assert checked is not None
    if parts := traced_forwards(gated):
        run.say(
            f"note: the network cannot be traced as a whole; gates stand in {', '.join(parts)}, and it cannot be "
            "deployed"
        )
    run.say(
        f"converted: {checked.outputs} outputs equal the original's to the bit; {checked.closed_units} closed "
        f"units and {checked.closed_blocks} closed blocks overwritten with noise without changing one"
    )
    return gated


def close_gates(run: _Run, inputs: _Inputs, gated: nn.Module) -> list[Epoch]:
    """Fine-tune the gated network."""
    recipe = run.recipe
    return finetune(
        gated,
        inputs.data,
        inputs.teacher,
        settings=recipe.finetune,
        distillation=recipe.distillation,
        closing=recipe.closing,
        start=recipe.gates.start,
        seed=recipe.seed,
        on_progress=run.on_progress,
        checkpoint=run.out / FINETUNE,
        resume=run.resume,
    )


def evaluate_result(run: _Run, inputs: _Inputs, gated: nn.Module) -> Evaluation:
    """Evaluate the gated network on the test images, beside the original."""
    run.say(f"evaluating on {len(inputs.data.test)} images")
    evaluation = evaluate(gated, inputs.data, inputs.teacher, run.on_progress)
    target = run.recipe.closing.target
    if target is not None and abs(evaluation.share - target) > TOLERANCE:
        run.say(f"note: the target was {target}, the share reached on the test images is {evaluation.share:.3f}")
    return evaluation


def write_result(
    run: _Run, inputs: _Inputs, gated: nn.Module, evaluation: Evaluation, history: list[Epoch]
) -> dict[str, Any]:
    """Write networks, figures and the page; report.json, which marks the folder as complete, comes last of the first.

    Returns:
        The content of report.json.
    """
    recipe = run.recipe
    report = summarise(recipe, inputs.reference, evaluation, history, inputs.labelled)
    if run.main:
        write_tensors(run.out / ORIGINAL, inputs.model.state_dict())
        classes = inputs.data.train.classes if inputs.labelled else None
        save(gated, run.out, classes=classes, figures=kept_figures(evaluation, recipe.data.name or "imagenette"))
        write_json(run.out / REPORT, report)
        _write_page(run, report, evaluation, inputs.data)
    return report


def _with_weights(reference: ModelReference, pretrained: bool, weights: str) -> tuple[ModelReference, nn.Module]:
    """Build a network with weights; a head of another size than the name's default is taken from their file.

    Without a file the user's own function has loaded them.
    """
    if pretrained:
        return reference, build(reference, pretrained=True)
    model = build(reference)
    if not weights:
        return reference, model
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
    """Decide whether the labels are used: where they fit the head. A trained network can do without."""
    outputs, classes = output_count(model, spec), len(data.train.classes)
    if data.train.fits(outputs):
        if not classes:
            say(f"the data does not name its classes: its labels are taken for the network's {outputs}, in their order")
        return data, True
    if not trained:
        raise DataError(
            f"the network has {outputs} outputs, the data {classes} classes; without trained weights it "
            "cannot learn from them: give --weights or --pretrained, or change the network's head or the data"
        )
    has = f"{classes} classes" if classes else "no labels"
    say(f"the data has {has} for {outputs} outputs: its labels are not used, distillation alone trains")
    return data.unlabelled(), False


def _untrained(reference: ModelReference) -> str:
    """Say what is done with a network whose weights no one has named."""
    if reference.source == "file":
        return (
            "note: none of --weights, --trained and --pretrained was given, so the network counts as untrained: it "
            "learns from labels alone, without the original as its teacher. If the function returns trained weights, "
            "pass --trained"
        )
    return (
        f"note: neither --weights nor --pretrained was given: the weights of {reference} are random, and the network "
        "counts as untrained: it is trained on labels from the start, with its gates. For a trained one pass "
        "--pretrained, or --weights FILE"
    )


@torch.no_grad()
def _check_knows(model: nn.Module, data: Splits, spec: InputSpec) -> None:
    """Warn, before anything is trained, of a network that only guesses the labels of some test images."""
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:LOOKED_AT]
    images, labels, _ = data.test.__getitems__(order.tolist())
    with evaluating(model):
        answers = [model(normalise(part, spec)).argmax(1) for part in images.split(50)]
    warn_of_chance(torch.cat(answers), labels)


def _write_page(run: _Run, report: dict[str, Any], evaluation: Evaluation, data: Splits) -> None:
    """Write the page; without it the folder is complete too."""
    try:
        from gatefit.commands.report.write import write_report

        write_report(run.out, Result(run.out.resolve().name, report, []), [], evaluation, data.test)
    except Exception as error:
        again = f"gatefit report {run.out}"
        run.say(f"note: the page could not be written ({error}); everything else was, and {again} tries again")
