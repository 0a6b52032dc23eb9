"""Accuracy, agreement with the original, and what each image really runs."""

import copy
import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatefit.errors import DataError, GatefitWarning, ModelError
from gatefit.gating.cost import GateDecider
from gatefit.gating.info import image_spec
from gatefit.inputs.data import Source, as_images, normalise
from gatefit.inputs.loader import loader
from gatefit.inputs.models import logits_of, output_count
from gatefit.mode import evaluating
from gatefit.progress import OnProgress, Progress, silent

BATCH = 250
FEWEST_IMAGES = 20
"""With fewer, the accuracy does not tell guessing from knowing."""


@dataclass(frozen=True)
class GateUse:
    """How one block's gates behaved over a set of images."""

    name: str
    units: int
    block_open: float
    """Share of images that ran the block."""
    channel_open: float
    """Mean share of open channel units, among the images that ran the block."""
    distinct: int
    """Number of different (block, channels) masks."""
    always: int
    """Units that every image opened."""
    never: int
    """Units that no image opened."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of a gated network over a set of images; MACs are means per image, gates included."""

    images: int
    accuracy: float | None
    """Share classified right; None without labels that fit."""
    agreement: float | None
    """Share on which the top class is the original's; None without the original."""
    dense_accuracy: float | None
    dense_macs: int
    macs_sequential: float
    macs_parallel: float
    macs: Tensor
    """Sequential MACs of each image, (N,) float64."""
    paths: int
    """Number of different paths (all masks together) that the images took."""
    gates: tuple[GateUse, ...]
    answers: Tensor
    """Top class of each image, (N,) int64."""
    labels: Tensor | None
    """True class of each image, (N,) int64; None without labels that fit."""
    masks: dict[str, Tensor]
    """By block, (N, 1 + units) bool: whether each image ran the block, and which of its units."""

    @property
    def share(self) -> float:
        """Compute the share of the dense MACs that ran (sequential)."""
        return self.macs_sequential / self.dense_macs


@torch.no_grad()
def evaluate(
    gated: nn.Module,
    data: Source,
    teacher: nn.Module | None = None,
    on_progress: OnProgress = silent,
) -> Evaluation:
    """Run a gated network in eval mode over the test images of `data`.

    Args:
        gated: from `retrofit`, `finetune` or `load`; its mode is put back.
        data: see `gatefit.inputs.data.as_images`; labels that do not fit the head are not used.
        teacher: the original network, for agreement and the dense accuracy.
        on_progress: called after each batch, with the images done.

    Raises:
        DataError: there are no images, or pixels or the network's answers are not finite.
        ModelError: the teacher has other outputs than the gated network.
    """
    spec = image_spec(gated)
    images = as_images(data, spec).test
    if not len(images):
        raise DataError("there are no images to evaluate on")
    labelled = images.fits(output_count(gated, spec))
    device = next(gated.parameters()).device
    decider = GateDecider(gated)
    costs = decider.costs(spec.shape)
    teacher = copy.deepcopy(teacher).to(device).eval() if teacher is not None else None
    sequential, parallel, answers, dense_answers, truth = [], [], [], [], []
    opened_masks: dict[str, list[Tensor]] = {name: [] for name in costs.parents}
    indices = torch.arange(len(images)).split(BATCH)
    done = 0
    with evaluating(gated):
        for batch, labels, _ in loader(images, [i.tolist() for i in indices]):
            x = normalise(batch.to(device), spec)
            _check_finite(x, "pixels", done)
            logits = logits_of(gated(x))
            _check_finite(logits, "answers of the network", done)
            answers.append(logits.argmax(1).cpu())
            truth.append(labels)
            if teacher is not None:
                wanted = logits_of(teacher(x))
                _check_teacher(wanted, logits)
                dense_answers.append(wanted.argmax(1).cpu())
            decided = decider.decisions()
            sequential.append(costs.per_image(decided).cpu())
            parallel.append(costs.per_image(decided, "parallel").cpu())
            for name, parent in costs.parents.items():
                outer = opened_masks[parent][-1][:, :1] if parent else True  # what is skipped runs no inner block
                opened_masks[name].append(decided.blocks[name].mask.cpu() & outer)
            done += len(labels)
            on_progress(Progress("evaluate", done, len(images)))
    masks = {name: torch.cat(parts) for name, parts in opened_masks.items()}
    macs, answered, labels = torch.cat(sequential), torch.cat(answers), torch.cat(truth)
    dense_answered = torch.cat(dense_answers) if teacher is not None else None
    if labelled and dense_answered is not None:
        warn_of_chance(dense_answered, labels)
    return Evaluation(
        images=len(images),
        accuracy=_share_equal(answered, labels) if labelled else None,
        agreement=None if dense_answered is None else _share_equal(answered, dense_answered),
        dense_accuracy=_share_equal(dense_answered, labels) if labelled and dense_answered is not None else None,
        dense_macs=costs.dense,
        macs_sequential=float(macs.mean()),
        macs_parallel=float(torch.cat(parallel).mean()),
        macs=macs,
        paths=len(torch.unique(torch.cat(list(masks.values()), 1), dim=0)),
        gates=tuple(_use(name, mask) for name, mask in masks.items()),
        answers=answered,
        labels=labels if labelled else None,
        masks=masks,
    )


def warn_of_chance(answers: Tensor, labels: Tensor) -> None:
    """Warn where a trained network's accuracy is one that guessing reaches: its input or its classes are then wrong.

    Guessing is right as often as answers and labels would agree if they were independent (as in Cohen's kappa).

    Args:
        answers: top classes of the original network, (N,) int64.
        labels: true classes, (N,) int64.
    """
    count = len(labels)
    if count < FEWEST_IMAGES or len(labels.unique()) < 2:
        return
    classes = int(torch.maximum(answers, labels).max()) + 1
    shares = [torch.bincount(of, minlength=classes) / count for of in (answers, labels)]
    chance, accuracy = float(shares[0] @ shares[1]), _share_equal(answers, labels)
    if accuracy <= chance + 2 * math.sqrt(chance * (1 - chance) / count):
        warnings.warn(
            f"the original's accuracy on {count:,} labelled images is {100 * accuracy:.1f} %, that of guessing: either "
            "its input is another (check size, mean and std: --image-size, --mean, --std, or pretrained_cfg on the "
            "network), or the classes have another order (folders are numbered alphabetically)",
            GatefitWarning,
            stacklevel=3,
        )


def _share_equal(some: Tensor, others: Tensor) -> float:
    return int((some == others).sum()) / len(some)


def _check_finite(values: Tensor, what: str, done: int) -> None:
    if not (ok := values.isfinite().flatten(1).all(1)).all():
        raise DataError(
            f"{what} are NaN or infinite for image {done + int((~ok).nonzero()[0])}; check data and weights"
        )


def _check_teacher(wanted: Tensor, logits: Tensor) -> None:
    if wanted.shape != logits.shape:
        raise ModelError(
            f"the teacher gives {tuple(wanted.shape[1:])} outputs and the gated network {tuple(logits.shape[1:])}; "
            "pass the network that it was made from"
        )


def _use(name: str, masks: Tensor) -> GateUse:
    ran, channels = masks[:, 0], masks[:, 1:]
    units = channels.shape[1]
    among = channels[ran]
    return GateUse(
        name=name,
        units=units,
        block_open=float(ran.double().mean()),
        channel_open=float(among.double().mean()) if among.numel() else (1.0 if not units else 0.0),
        distinct=len(torch.unique(masks, dim=0)),
        always=int(channels.all(0).sum()),
        never=int((~channels.any(0)).sum()),
    )
