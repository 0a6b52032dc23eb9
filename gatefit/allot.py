"""Share the MACs out among the gates: which blocks close more and which less, at the same sum.

One threshold for all gates takes the scores of different blocks at their word, but they are estimates. Here each
gate gets an offset of its own, found by an evolution strategy: of a population of offsets, each with the common
threshold that meets the sum, those live on whose predictions are nearest to those with all gates open. (Gates are
steps, so the divergence is jagged, and a search along one gate at a time soon gets stuck.)
"""

import torch
from torch import Tensor, fx, nn

from gatefit.control import lower, lower_layer, threshold_for
from gatefit.cost import Costs
from gatefit.distill import distillation
from gatefit.gates import Gate, gates_of
from gatefit.start import Tick, predictions

GENERATIONS = 14
POPULATION = 10
PARENTS = 3
SPREAD = 1.0
"""Standard deviation of the first offsets, in units of pre-activations (see `gatefit.start.SPREAD`)."""
NARROWING = 0.88
"""Of the spread, from one generation to the next."""
TEMPERATURE = 4.0


@torch.no_grad()
def allot(
    gated: fx.GraphModule,
    images: Tensor,
    costs: Costs,
    target: float,
    keep: float = 0.0,
    seed: int = 0,
    tick: Tick = lambda done, of: None,
) -> float:
    """Move the gates' biases so that the share `target` of the MACs is better spent, in place; leaves eval mode.

    Args:
        gated: its gates set by `gatefit.start`, its layers not yet refitted.
        images: (B, C, H, W), normalised; no labels are needed.
        costs: of `gated`.
        target: share of the dense MACs to keep to.
        keep: see `gatefit.control.lower`.
        seed: of the offsets that are tried.

    Returns:
        By what part the divergence from the predictions with all gates open has fallen.
    """
    gated.eval()
    wanted = predictions(gated, images)
    layers = [(gate, fc) for gate in gates_of(gated).values() for fc in gate.layers]
    before = _thresholds(gated)

    def divergence(offsets: Tensor) -> float:
        _restore(before)
        for (gate, fc), offset in zip(layers, offsets.tolist(), strict=True):
            lower_layer(gate, fc, offset)
        for _ in range(2):  # later gates see what earlier ones have closed
            gated(images)
            lower(gated, threshold_for(gated, costs, target, keep), keep)
        return float(distillation(gated(images), wanted, TEMPERATURE))

    generator = torch.Generator().manual_seed(seed)
    middle = torch.zeros(len(layers))
    first = divergence(middle)
    living = [(first, middle)]
    for generation in range(GENERATIONS):
        spread = SPREAD * NARROWING**generation
        born = middle + spread * torch.randn(POPULATION, len(layers), generator=generator)
        living = sorted([*living, *((divergence(o), o) for o in born)], key=lambda pair: pair[0])[:PARENTS]
        middle = torch.stack([offsets for _, offsets in living]).mean(0)
        tick(generation + 1, GENERATIONS)
    return 1 - divergence(living[0][1]) / first


def _thresholds(gated: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """All that a threshold moves, each with a copy of it."""
    gates: list[Gate] = list(gates_of(gated).values())
    moved = [fc.bias for gate in gates for fc in gate.layers] + [g.lowered for g in gates if g.fill is not None]
    return [(tensor, tensor.clone()) for tensor in moved]


def _restore(thresholds: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, before in thresholds:
        tensor.copy_(before)
