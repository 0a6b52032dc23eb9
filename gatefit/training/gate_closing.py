"""Closes gates while a network trains, until the MACs that really run are those that were asked for."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gatefit.gating.cost import costs_of, decisions_of
from gatefit.gating.gates import gates_of
from gatefit.gating.info import info_of
from gatefit.gating.initialise import initialise_from_data
from gatefit.gating.penalty import signed_salience_penalty
from gatefit.gating.reconstruct import images_that_fit, reconstruct
from gatefit.gating.threshold import GAIN, lower, price_threshold, threshold_for
from gatefit.inputs.data import ImageSet, normalise
from gatefit.inputs.loader import augment, generator, loader
from gatefit.progress import OnProgress, silent
from gatefit.recipe import ClosingPart, FinetunePart
from gatefit.training.trainer import recalibrate

MEETING_IMAGES = 2000
MEETING_ROUNDS = 3
"""Training images, and passes over them, on which the final threshold is found."""
SETTLING_BATCH = 100
REINITIALISING = 2 / 3
"""Part of the training in which gates are initialised again; the rest of it is for the layers that read them."""


class GateClosing:
    """Closes gates: the closed loop for a target, the price for an L1 coefficient (a `Controller` of the trainer).

    Args:
        gated: the network; its gates move in place.
        images: training images.
        loop: settings of the training.
        closing: how far the gates close; `gate_lr` and `ramp` are set.
        start: "data" or "identity", see `gatefit.training.finetune.finetune`.
        seed: of the choice of images.
        on_progress: called after each step of long work between the training's own steps.
    """

    def __init__(
        self,
        gated: nn.Module,
        images: ImageSet,
        loop: FinetunePart,
        closing: ClosingPart,
        start: str,
        seed: int,
        on_progress: OnProgress = silent,
    ) -> None:
        self.gated, self.images, self.loop, self.closing = gated, images, loop, closing
        self.start, self.seed, self.on_progress = start, seed, on_progress
        self.factor = 1.0
        """From scores to pre-activations, see `gatefit.gating.initialise.initialise_from_data`."""
        self.ramp = closing.ramp or 0.0
        # Gates that learn keep what they have learnt, and a salience between 0 and 1 what reads it is used to.
        hard = all(gate.form == "step" for gate in gates_of(gated).values())
        self.reinits = closing.gate_reinits if start == "data" and hard and not closing.gate_lr else 0
        self.costs = costs_of(gated, info_of(gated).input.shape)

    def begin(self) -> None:
        """Set the gates' weights; without a ramp also close them, and reconstruct the layers that read them."""
        if self.start != "data":
            return
        self.factor = initialise_from_data(self.gated, self.images, seed=self.seed, on_progress=self.on_progress)
        if self.ramp:
            return
        self.gated.eval()
        self._meet_target(price_threshold(self.closing.l1 or 0.0, self.factor))
        if self.closing.reconstruction_images:
            count = min(self.closing.reconstruction_images, images_that_fit(self.gated))
            reconstruct(self.gated, self._some(count), self.on_progress)
            self._meet_target()

    def share(self) -> float:
        """Tell the share of the dense MACs that the last forward ran."""
        return float(self.costs.per_image(decisions_of(self.gated)).mean()) / self.costs.dense

    def penalty(self) -> Tensor | None:
        """Give the L1 term of the last forward, a scalar; None without an L1 coefficient."""
        c = self.closing
        return c.l1 * signed_salience_penalty(self.gated, c.penalty) if c.l1 else None

    def step(self, step: int, steps: int, average: Callable[[float], float]) -> None:
        """Move the threshold: towards the ramp of the target, or along the ramp of the price."""
        c = self.closing
        before, now = (min(1.0, t / steps / self.ramp) if self.ramp else 1.0 for t in (step, step + 1))
        if c.target is not None:
            wanted = 1 - (1 - c.target) * now
            gain = 1.0 if step == 0 and self.ramp else GAIN
            lower(self.gated, gain * average(threshold_for(self.gated, self.costs, wanted, c.min_open)), c.min_open)
        elif self.start == "data" and c.l1:
            done = price_threshold(c.l1 * before**2, self.factor) if step or not self.ramp else 0.0
            lower(self.gated, price_threshold(c.l1 * now**2, self.factor) - done, c.min_open)
        reinits = [round(REINITIALISING * steps * i / self.reinits) for i in range(1, self.reinits + 1)]
        if step + 1 in reinits:
            self._reinitialise(self.seed + 1 + reinits.index(step + 1), now)

    def state(self) -> dict[str, float]:
        """Give what a checkpoint has to keep."""
        return {"factor": self.factor}

    def restore(self, state: dict[str, float]) -> None:
        """Take back what a checkpoint kept."""
        self.factor = state["factor"]

    @torch.no_grad()
    def settle(self) -> None:
        """Find the BN statistics of the final hard gates, and the threshold that meets the target with them."""
        self._meet_target()
        if self.closing.bn_recalibration_images and self.loop.epochs:
            # As they were trained: statistics of whole images cost a network that learnt from crops points.
            recalibrate(self.gated, self._some(self.closing.bn_recalibration_images, self.loop.augment))
            self._meet_target()
        self.gated.eval()

    def _reinitialise(self, seed: int, ramped: float) -> None:
        """Set the gates' weights again, from what their units do for the network as it is by now."""
        self.factor = initialise_from_data(
            self.gated, self.images, seed=seed, on_progress=self.on_progress, stage="reinitialise"
        )
        self._meet_target(price_threshold((self.closing.l1 or 0.0) * ramped**2, self.factor), ramped)
        self.gated.train()

    def _meet_target(self, shift: float = 0.0, ramped: float = 1.0) -> None:
        """Move the threshold to the target, the part `ramped` of the way there, or without a target by `shift`.

        In rounds, as later blocks see what earlier ones closed.
        """
        c = self.closing
        self.gated.eval()
        if c.target is None:
            for batch in self._some(SETTLING_BATCH):
                self.gated(batch)
                lower(self.gated, shift, c.min_open)
            return
        for _ in range(MEETING_ROUNDS):
            shifts = []
            for batch in self._some(MEETING_IMAGES):
                self.gated(batch)
                shifts.append(threshold_for(self.gated, self.costs, 1 - (1 - c.target) * ramped, c.min_open))
            lower(self.gated, sum(shifts) / len(shifts), c.min_open)

    def _some(self, count: int, augmented: bool = False) -> Iterator[Tensor]:
        """Give batches of `count` training images, (B, C, H, W) normalised, the same each time."""
        spec = info_of(self.gated).input
        chosen = torch.randperm(len(self.images), generator=generator(self.seed, -1))[:count]
        batches = chosen.tensor_split(math.ceil(len(chosen) / SETTLING_BATCH))  # all alike, as each counts as much
        for pixels, _, index in loader(self.images, [b.tolist() for b in batches]):
            x = pixels.to(next(self.gated.parameters()).device)
            if augmented and pixels.dtype == torch.uint8:
                x = augment(x, index, len(self.images), self.seed, -1, self.loop.flip)
            yield normalise(x, spec)
