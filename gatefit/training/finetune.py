"""The fine-tune: train a gated network until the MACs that really run are those that were asked for."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from gatefit.errors import RecipeError
from gatefit.gating.cost import costs_of, decisions_of
from gatefit.gating.gates import gates_of
from gatefit.gating.info import info_of
from gatefit.gating.initialise import Tick, initialise_from_data
from gatefit.gating.penalty import salience_penalty
from gatefit.gating.reconstruct import images_that_fit, reconstruct
from gatefit.gating.threshold import GAIN, lower, price_threshold, smallest_share, threshold_for
from gatefit.inputs.data import ImageSet, Source, as_images, normalise
from gatefit.inputs.loader import augment, generator, loader
from gatefit.inputs.models import InputSpec, output_count
from gatefit.recipe import FinetunePart
from gatefit.training.trainer import Epoch, Progress, Report, Trainer, check_batches, recalibrate

MEETING_IMAGES = 2000
MEETING_ROUNDS = 3
"""Training images, and passes over them, on which the final threshold is found."""
SETTLING_BATCH = 100
RENEWING = 2 / 3
"""Part of the training in which gates are set anew; the rest of it is for what reads them."""
PAPERS_GATE_LR = 1e-5
SCRATCH_RAMP = 0.2
"""Of a network without an original to keep to: what its units do is not known before it has learnt."""


def finetune(
    gated: fx.GraphModule,
    data: Source,
    teacher: nn.Module | None = None,
    l1: float | None = None,
    target: float | None = None,
    *,
    settings: FinetunePart | None = None,
    start: str = "data",
    seed: int = 0,
    report: Report | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> list[Epoch]:
    """Train a gated network so that its gates close, in place; leave it in eval mode.

    Args:
        gated: from `retrofit`.
        data: see `gatefit.inputs.data.as_images`; without labels that fit the head, distillation alone trains it.
        teacher: the original network, to distil from; None: labels alone.
        l1: L1 coefficient on the saliences of an image.
        target: share of the dense MACs to end at, instead of `l1`.
        settings: all other settings.
        start: "data" (see `gatefit.gating.initialise`) or "identity", the paper's.
        seed: of the order of images, augmentation and dropout.
        report: called after each step, of the start too.
        checkpoint: a file that is written as training goes.
        resume: go on from `checkpoint` if it is there; the end is then the same as without the break.

    Raises:
        RecipeError: contradictory settings, or a target that cannot be reached.
        TrainingError: the loss is not finite.
        CheckpointError: `checkpoint` is damaged or cannot be written.
    """
    images = as_images(data, info_of(gated).input, seed).train
    if not images.fits(output_count(gated, info_of(gated).input)):
        images = images.unlabelled()
    settings = _resolved(settings or FinetunePart(), l1, target, start, teacher is not None)
    check_settings(gated, images, settings, start)
    report = report or (lambda _: None)
    closing = GateClosing(gated, images, settings, start, seed, report)
    gates = [p for gate in gates_of(gated).values() for fc in gate.layers for p in fc.parameters()]
    frozen = [p for p in gates if p.requires_grad and not settings.gate_lr]
    trainer = Trainer(
        gated,
        images,
        info_of(gated).input,
        settings,
        stage="fine-tune",
        seed=seed,
        report=report,
        teacher=teacher,
        closing=closing,
    )
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        history = trainer.run(checkpoint, resume)
        closing.settle()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return history


def check_settings(gated: fx.GraphModule, images: ImageSet, settings: FinetunePart, start: str) -> None:
    """Refuse settings with which no gate would close, or that contradict each other, before anything is trained.

    Raises:
        RecipeError: they are such.
    """
    if start not in ("data", "identity"):
        raise RecipeError(f"gates.start must be 'data' or 'identity', not '{start}'")
    if settings.l1 is None and settings.target is None:
        raise RecipeError("give --l1 X or --target SHARE: without either no gate would close")
    if start != "data" and not (settings.epochs and settings.gate_lr != 0):
        raise RecipeError(
            "with gates.start = 'identity' gates close by training alone: give epochs and a gate_lr, or use 'data'"
        )
    if start == "data" and settings.penalty == "plain" and not settings.gate_lr:
        raise RecipeError(
            "penalty = 'plain' is for gates that learn, and those from data do not: give a gate_lr, or use 'macs'"
        )
    check_batches(settings, images)
    if settings.target is not None:
        if start != "data":
            raise RecipeError("a target needs gates.start = 'data'; with 'identity' use l1")
        least = smallest_share(costs_of(gated, info_of(gated).input.shape), settings.min_open)
        if settings.target < least:
            raise RecipeError(
                f"target {settings.target} cannot be reached: {least:.3f} of the MACs are out of the gates' reach"
            )


def _resolved(
    settings: FinetunePart, l1: float | None, target: float | None, start: str, trained: bool
) -> FinetunePart:
    """The settings with everything that depends on the start, or on an original to keep to, filled in."""
    given = asdict(settings)
    if l1 is not None or target is not None:
        given |= {"l1": l1, "target": target}
    if settings.gate_lr is None:
        given["gate_lr"] = 0.0 if start == "data" else PAPERS_GATE_LR
    if settings.ramp is None or not settings.epochs:
        given["ramp"] = 0.0 if trained or not settings.epochs else SCRATCH_RAMP
    return FinetunePart(**given)


def train_dense(
    model: nn.Module,
    images: ImageSet,
    spec: InputSpec,
    settings: FinetunePart,
    *,
    seed: int = 0,
    report: Report | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> list[Epoch]:
    """Train a dense network on labels, in place: the baseline of a recipe. Raises as `finetune` does."""
    trainer = Trainer(model, images, spec, settings, stage="baseline", seed=seed, report=report or (lambda _: None))
    return trainer.run(checkpoint, resume)


class GateClosing:
    """Closes gates while the network trains: the closed loop for a target, the price for an L1 coefficient."""

    def __init__(
        self,
        gated: fx.GraphModule,
        images: ImageSet,
        settings: FinetunePart,
        start: str,
        seed: int,
        report: Report = lambda _: None,
    ) -> None:
        self.gated, self.images, self.settings = gated, images, settings
        self.start, self.seed, self.factor = start, seed, 1.0
        self.report = report
        self.ramp = settings.ramp or 0.0
        # Gates that learn keep what they have learnt, and a salience between 0 and 1 what reads it is used to.
        hard = all(gate.form == "step" for gate in gates_of(gated).values())
        self.reinits = settings.gate_reinits if start == "data" and hard and not settings.gate_lr else 0
        self.costs = costs_of(gated, info_of(gated).input.shape)

    def begin(self) -> None:
        """Set the gates' weights; without a ramp also close them, and refit what reads them."""
        s = self.settings
        if self.start != "data":
            return
        self.factor = initialise_from_data(self.gated, self.images, seed=self.seed, tick=self._ticking("start"))
        if self.ramp:
            return
        self.gated.eval()
        self._meet(price_threshold(s.l1 or 0.0, self.factor))
        if s.reconstruction_images:
            reconstruct(
                self.gated,
                self._some(min(s.reconstruction_images, images_that_fit(self.gated))),
                self._ticking("refit"),
            )
            self._meet()

    def _ticking(self, stage: str) -> Tick:
        return lambda step, steps: self.report(Progress(stage, step, steps))

    def share(self) -> float:
        """Share of the dense MACs that the last forward ran."""
        return float(self.costs.per_image(decisions_of(self.gated)).mean()) / self.costs.dense

    def penalty(self) -> Tensor | None:
        """The L1 term of the last forward."""
        s = self.settings
        return s.l1 * salience_penalty(self.gated, s.penalty) if s.l1 else None

    def step(self, step: int, steps: int, average: Callable[[float], float]) -> None:
        """Move the threshold: towards the ramp of the target, or along the ramp of the price."""
        s = self.settings
        before, now = (min(1.0, t / steps / self.ramp) if self.ramp else 1.0 for t in (step, step + 1))
        if s.target is not None:
            wanted = 1 - (1 - s.target) * now
            gain = 1.0 if step == 0 and self.ramp else GAIN
            lower(self.gated, gain * average(threshold_for(self.gated, self.costs, wanted, s.min_open)), s.min_open)
        elif self.start == "data" and s.l1:
            done = price_threshold(s.l1 * before**2, self.factor) if step or not self.ramp else 0.0
            lower(self.gated, price_threshold(s.l1 * now**2, self.factor) - done, s.min_open)
        reinits = [round(RENEWING * steps * i / self.reinits) for i in range(1, self.reinits + 1)]
        if step + 1 in reinits:
            self._reinitialise(self.seed + 1 + reinits.index(step + 1), now)

    def _reinitialise(self, seed: int, ramped: float) -> None:
        """Set the gates' weights anew, from what their units do for the network as it is by now."""
        s = self.settings
        self.factor = initialise_from_data(self.gated, self.images, seed=seed, tick=self._ticking("renew"))
        self._meet(price_threshold((s.l1 or 0.0) * ramped**2, self.factor), ramped)
        self.gated.train()

    @torch.no_grad()
    def settle(self) -> None:
        """BN statistics with the final hard gates, and the threshold that meets the target with them."""
        s = self.settings
        self._meet()
        if s.bn_recalibration_images and s.epochs:
            # As they were trained: statistics of whole images cost a network that learnt from crops points.
            recalibrate(self.gated, self._some(s.bn_recalibration_images, s.augment))
            self._meet()
        self.gated.eval()

    def _meet(self, shift: float = 0.0, ramped: float = 1.0) -> None:
        """Move the threshold to the target, the part `ramped` of the way there, or without a target by `shift`.

        In rounds, as later blocks see what earlier ones closed.
        """
        s = self.settings
        self.gated.eval()
        if s.target is None:
            for batch in self._some(SETTLING_BATCH):
                self.gated(batch)
                lower(self.gated, shift, s.min_open)
            return
        for _ in range(MEETING_ROUNDS):
            shifts = []
            for batch in self._some(MEETING_IMAGES):
                self.gated(batch)
                shifts.append(threshold_for(self.gated, self.costs, 1 - (1 - s.target) * ramped, s.min_open))
            lower(self.gated, sum(shifts) / len(shifts), s.min_open)

    def _some(self, count: int, augmented: bool = False) -> Iterator[Tensor]:
        """Batches of `count` training images, the same each time."""
        chosen = torch.randperm(len(self.images), generator=generator(self.seed, -1))[:count]
        batches = chosen.tensor_split(math.ceil(len(chosen) / SETTLING_BATCH))  # all alike, as each counts as much
        for pixels, _, index in loader(self.images, [b.tolist() for b in batches]):
            x = pixels.to(next(self.gated.parameters()).device)
            if augmented and pixels.dtype == torch.uint8:
                x = augment(x, index, len(self.images), self.seed, -1, self.settings.flip)
            yield normalise(x, info_of(self.gated).input)
