"""Set the gates' weights from data: predict from the pooled input what each unit does for the loss.

For each unit u the salience's pre-activation becomes k * (score_u(x) - threshold). score_u(x) is the least-squares
prediction, from the pooled input, of (activation of u on x) * w_u / sqrt(cost_u), where w_u scales activations to the
Fisher information of the salience, E[(dL/dS_u)^2]. So score^2 / 2 is the expected rise of the loss per MAC when u is
closed (optimal brain damage), and one threshold serves the whole network. A whole block is too much for that
second-order estimate: for blocks `gatefit.gating.measure.block_damage` measures the rise by skipping them one by one.
To each pre-activation is added what the pooled input says of how hard the image is: hard images open more.

All of it is measured on the network as it runs. So the gates of a network that has learnt to do without some of its
units can be initialised again, from what the others do for it now.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatefit.gating.gates import Gate, gates_of
from gatefit.gating.measure import BlockMeasures, Measures, block_damage, measure
from gatefit.gating.penalty import unit_weights
from gatefit.inputs.data import ImageSet
from gatefit.mode import evaluating
from gatefit.progress import OnProgress, silent

RIDGE = 1e-3
SPREAD = 4.0
"""Standard deviation of the pre-activations: 1 is the width of the window in which gates learn."""
EMPHASIS = 2.0
"""What is added to the pre-activations of an image that is harder than the mean by one standard deviation."""


@dataclass(frozen=True)
class _Linear:
    """A linear function of a pooled input: weight (units, features), bias (units,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, pooled: Tensor) -> Tensor:
        return pooled @ self.weight.T + self.bias


@dataclass(frozen=True)
class _Fit:
    """What one gate layer becomes."""

    layer: nn.Linear
    score: _Linear
    hardness: _Linear


def initialise_from_data(
    gated: nn.Module,
    images: ImageSet,
    count: int = 5000,
    batch: int = 50,
    seed: int = 0,
    on_progress: OnProgress = silent,
    stage: str = "initialise",
) -> float:
    """Set the gates' weights from `count` images; the threshold goes back to 0, where the gates are open.

    Args:
        gated: from `retrofit`; changed in place, its mode is put back. Gates that are closed stay so while it measures.
        images: training images; labels are not used.
        count: images that are measured, drawn by `seed`.
        batch: images at once.
        seed: of the choice of images and of the labels that are drawn from the predictions.
        on_progress: called after each batch, as `stage`.

    Returns:
        k, the factor between scores and pre-activations.

    Raises:
        TrainingError: the network's outputs are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[:count]
    with evaluating(gated):
        measures = measure(gated, images, [b.tolist() for b in chosen.split(batch)], generator, on_progress, stage)
        damage = block_damage(gated, images, chosen[: count // 16], batch)
        fits, spread = _fit(gated, measures, damage)
        k = SPREAD / float(spread.std().clamp_min(1e-12))
        _write(gated, measures, fits, k)
    return k


def _fit(gated: nn.Module, measures: Measures, damage: dict[str, float]) -> tuple[list[_Fit], Tensor]:
    """Fit the layers of all gates; also return the scores of all units (of blocks only where they have no units)."""
    fits: list[_Fit] = []
    spread: list[Tensor] = []
    weights = unit_weights(gated)
    for name, gate in gates_of(gated).items():
        measured = measures.blocks[name]
        pooled = measured.pooled.double()
        hardness = _guess(pooled, measures.hardness[measures.reached[name], None])
        for fc, units, weight in zip(
            (gate.block, gate.channel), (measured.block, measured.channel), weights[name], strict=True
        ):
            if fc is None:
                continue
            assert units is not None
            activation = units.activation.double()
            if fc is gate.block:
                rise = torch.tensor(2 * damage[name], dtype=torch.float64, device=pooled.device)
            else:
                rise = units.slope.double().square().mean(0)
            fisher = (rise / activation.square().mean(0).clamp_min(1e-12)).sqrt()
            score = _ridge(pooled, activation * fisher / weight**0.5)
            fits.append(_Fit(fc, score, hardness))
            if fc is gate.channel or gate.channel is None:
                spread.append(score(pooled).flatten())
    return fits, torch.cat(spread)


@torch.no_grad()
def _write(gated: nn.Module, measures: Measures, fits: list[_Fit], k: float) -> None:
    """Give the gates their weights, and closed units their compensation."""
    for fit in fits:
        fit.layer.weight.copy_(k * fit.score.weight + EMPHASIS * fit.hardness.weight)
        fit.layer.bias.copy_(k * fit.score.bias + EMPHASIS * fit.hardness.bias)
    for name, gate in gates_of(gated).items():
        if gate.compensation is not None and gate.channel is not None:
            gate.threshold.zero_()
            _compensate(gated, gate, measures.blocks[name])


def _compensate(gated: nn.Module, gate: Gate, measured: BlockMeasures) -> None:
    """Set a gate's compensation to what the layer that reads the units would have made of their mean activations."""
    consumer = gate.of.channel_units.consumer if gate.of.channel_units is not None else None
    assert gate.compensation is not None and gate.channel is not None and consumer is not None
    assert measured.mean is not None
    predicted = gate.predicted(gate.channel(measured.pooled))
    slope = (measured.mean * predicted).sum(0) / predicted.square().sum(0).clamp_min(1e-12)
    weight = gated.get_submodule(consumer.name).get_parameter("weight").detach()
    summed = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    gate.compensation.weight.copy_(summed.unflatten(1, (gate.of.units, -1)).sum(2) * slope)


def _guess(inputs: Tensor, wanted: Tensor) -> _Linear:
    """Fit like `_ridge` what the inputs say little of, `wanted` of mean 0; keep as much as holds for other images.

    The slope of the truth over a guess from one half of the images is measured on the other half; a fit to all of
    them has half of its noise.
    """
    half = len(inputs) // 2
    guess = _ridge(inputs[:half], wanted[:half])(inputs[half:])
    guess = guess - guess.mean(0)
    slope = float((guess * wanted[half:]).sum() / guess.square().sum().clamp_min(1e-12))
    kept = 2 / (1 + 1 / min(1.0, slope)) if slope > 0 else 0.0
    fit = _ridge(inputs, wanted)
    return _Linear(kept * fit.weight, kept * fit.bias)


def _ridge(inputs: Tensor, wanted: Tensor) -> _Linear:
    """Solve least squares with a small ridge: inputs (N, features), wanted (N, units)."""
    middle, goal = inputs.mean(0), wanted.mean(0)
    centred = inputs - middle
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(gram, centred.T @ (wanted - goal)).T
    return _Linear(weight, goal - weight @ middle)
