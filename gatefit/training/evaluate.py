"""Accuracy, agreement with the original, and what each image really runs."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from gatefit.errors import DataError
from gatefit.gating.cost import GateDecider
from gatefit.gating.info import image_spec
from gatefit.inputs.data import Source, as_images, normalise
from gatefit.inputs.loader import loader
from gatefit.inputs.models import output_count
from gatefit.mode import evaluating
from gatefit.progress import OnProgress, Progress, silent

BATCH = 250


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
    gated: fx.GraphModule,
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
        DataError: there are no images.
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
    same = dense_right = 0
    sequential, parallel, answers, truth = [], [], [], []
    opened_masks: dict[str, list[Tensor]] = {name: [] for name in costs.parents}
    indices = torch.arange(len(images)).split(BATCH)
    done = 0
    with evaluating(gated):
        for batch, labels, _ in loader(images, [i.tolist() for i in indices]):
            x = normalise(batch.to(device), spec)
            answer = gated(x).argmax(1).cpu()
            answers.append(answer)
            truth.append(labels)
            if teacher is not None:
                wanted = teacher(x).argmax(1).cpu()
                same += int((answer == wanted).sum())
                dense_right += int((wanted == labels).sum())
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
    return Evaluation(
        images=len(images),
        accuracy=int((answered == labels).sum()) / len(images) if labelled else None,
        agreement=same / len(images) if teacher is not None else None,
        dense_accuracy=dense_right / len(images) if labelled and teacher is not None else None,
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
