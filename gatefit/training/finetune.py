"""The fine-tune: train a gated network until the MACs that really run are those that were asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from gatefit.errors import ModelError, RecipeError
from gatefit.gating.cost import costs_of
from gatefit.gating.gates import gates_of, is_gate_key
from gatefit.gating.info import image_spec, info_of
from gatefit.gating.threshold import smallest_share
from gatefit.inputs.data import ImageSet, Source, as_images
from gatefit.inputs.models import InputSpec, output_count
from gatefit.progress import OnProgress, Progress, silent
from gatefit.recipe import ClosingPart, DistillationPart, FinetunePart
from gatefit.renamed import renamed_argument
from gatefit.training.gate_closing import GateClosing
from gatefit.training.trainer import Epoch, Trainer, check_batches

PAPERS_GATE_LR = 1e-5
SCRATCH_RAMP = 0.2
"""Of a network without an original to learn from: what its units do is not known before it has learnt."""


@renamed_argument("report", "on_progress")
def finetune(
    gated: nn.Module,
    data: Source,
    teacher: nn.Module | None = None,
    l1: float | None = None,
    target: float | None = None,
    *,
    settings: FinetunePart | None = None,
    distillation: DistillationPart | None = None,
    closing: ClosingPart | None = None,
    start: str = "data",
    seed: int = 0,
    on_progress: OnProgress = silent,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> list[Epoch]:
    """Train a gated network so that its gates close, in place; leave it in eval mode.

    Parameters that are frozen (`requires_grad=False`) stay as they are, in the reconstruction too.

    Args:
        gated: from `retrofit`.
        data: see `gatefit.inputs.data.as_images`; without labels that fit the head, distillation alone trains it.
        teacher: the original network, to distil from; None: labels alone.
        l1: L1 coefficient on the saliences of an image; `closing` may give it too.
        target: share of the dense MACs to end at, instead of `l1`; `closing` may give it too.
        settings: the training loop.
        distillation: how the teacher teaches.
        closing: how the gates close.
        start: "data" (see `gatefit.gating.initialise`) or "identity", the paper's.
        seed: of the order of images, augmentation and dropout.
        on_progress: called after each step, of the initialisation too.
        checkpoint: a file that is written as training goes.
        resume: go on from `checkpoint` if it is there; the end is then the same as without the break.

    Returns:
        Means over each epoch.

    Raises:
        RecipeError: contradictory settings, or a target that cannot be reached.
        ModelError: the teacher has other outputs than the gated network.
        TrainingError: the loss is not finite.
        CheckpointError: `checkpoint` is damaged or cannot be written.
    """
    spec = image_spec(gated)
    images = as_images(data, spec, seed).train
    outputs = output_count(gated, spec)
    if not images.fits(outputs):
        images = images.unlabelled()
    if teacher is not None and (theirs := output_count(teacher, spec)) != outputs:
        raise ModelError(
            f"the teacher has {theirs} outputs and the gated network {outputs}; pass the network that it was made from"
        )
    loop, closing = settings or FinetunePart(), closing or ClosingPart()
    if l1 is not None or target is not None:
        closing = replace(closing, l1=l1, target=target)
    closing = resolve(loop, closing, start, teacher is not None)
    check_settings(gated, images, loop, closing, start)
    _tell_of_frozen(gated, on_progress)
    controller = GateClosing(gated, images, loop, closing, start, seed, on_progress)
    trainer = Trainer(
        gated,
        images,
        spec,
        loop,
        stage="fine-tune",
        seed=seed,
        on_progress=on_progress,
        teacher=teacher,
        distillation=distillation,
        controllers=[controller],
        share=controller.share,
        gate_lr=closing.gate_lr or 0.0,
    )
    with _gates_frozen(gated, not closing.gate_lr):
        history = trainer.run(checkpoint, resume)
        controller.settle()
    return history


def check_settings(gated: nn.Module, images: ImageSet, loop: FinetunePart, closing: ClosingPart, start: str) -> None:
    """Refuse settings with which no gate would close, or that contradict each other, before anything is trained.

    Raises:
        RecipeError: they are such.
    """
    if start not in ("data", "identity"):
        raise RecipeError(f"gates.start must be 'data' or 'identity', not '{start}'")
    check_closing(closing)
    if start != "data" and not (loop.epochs and closing.gate_lr != 0):
        raise RecipeError(
            "with gates.start = 'identity' gates close by training alone: give epochs and a gate_lr, or use 'data'"
        )
    if start == "data" and closing.penalty == "plain" and not closing.gate_lr:
        raise RecipeError(
            "penalty = 'plain' is for gates that learn, and those from data do not: give a gate_lr, or use 'macs'"
        )
    check_batches(loop, images)
    if closing.target is not None:
        if start != "data":
            raise RecipeError("a target needs gates.start = 'data'; with 'identity' use l1")
        least = smallest_share(costs_of(gated, info_of(gated).input.shape), closing.min_open)
        if closing.target < least:
            raise RecipeError(
                f"target {closing.target} cannot be reached: {least:.3f} of the MACs are out of the gates' reach"
            )


def check_closing(closing: ClosingPart) -> None:
    """Refuse a recipe that closes nothing: this can be told before any network is built.

    Raises:
        RecipeError: neither a target nor an L1 coefficient is given.
    """
    if closing.l1 is None and closing.target is None:
        raise RecipeError("give --l1 X or --target SHARE: without either no gate would close")


def resolve(loop: FinetunePart, closing: ClosingPart, start: str, trained: bool) -> ClosingPart:
    """Fill in the settings that depend on the start, or on whether there is an original to learn from."""
    if closing.gate_lr is None:
        closing = replace(closing, gate_lr=0.0 if start == "data" else PAPERS_GATE_LR)
    if closing.ramp is None or not loop.epochs:
        closing = replace(closing, ramp=0.0 if trained or not loop.epochs else SCRATCH_RAMP)
    return closing


def _tell_of_frozen(gated: nn.Module, on_progress: OnProgress) -> None:
    """Say how much of the network stays as it is because its owner froze it."""
    own = [p for name, p in gated.named_parameters() if not is_gate_key(name)]
    frozen = sum(not p.requires_grad for p in own)
    if frozen:
        text = f"{frozen} of the network's {len(own)} parameter tensors are frozen (requires_grad=False) and stay so"
        on_progress(Progress("fine-tune", 0, 0, message=text))


@contextmanager
def _gates_frozen(gated: nn.Module, frozen: bool) -> Iterator[None]:
    """Take the gates out of the training for a while, where `frozen` says so."""
    gates = [p for gate in gates_of(gated).values() for fc in gate.layers for p in fc.parameters()]
    changed = [p for p in gates if p.requires_grad and frozen]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


def train_dense(
    model: nn.Module,
    images: ImageSet,
    spec: InputSpec,
    settings: FinetunePart,
    *,
    seed: int = 0,
    on_progress: OnProgress = silent,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> list[Epoch]:
    """Train a dense network on labels, in place: the baseline of a recipe. Raises as `finetune` does."""
    trainer = Trainer(model, images, spec, settings, stage="baseline", seed=seed, on_progress=on_progress)
    return trainer.run(checkpoint, resume)
