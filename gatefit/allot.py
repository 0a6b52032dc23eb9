"""Share the MACs out among the gates: which blocks close more and which less, at the same sum.

One threshold for all gates takes the scores of different blocks at their word, but they are estimates. Here each
gate gets an offset of its own, found along one gate at a time: move its pre-activations, let the common threshold
meet the sum again, and keep the move if the predictions come nearer to those with all gates open.
"""

import torch
from torch import Tensor, fx, nn

from gatefit.control import lower, lower_layer, threshold_for
from gatefit.cost import Costs
from gatefit.distill import distillation
from gatefit.gates import Gate, gates_of
from gatefit.start import predictions

SWEEPS = 3
STEP = 1.0
"""Size of a move, in units of pre-activations (see `gatefit.start.SPREAD`); halved when no gate has moved."""
GAIN = 1e-3
"""A move must lower the divergence by this part of it."""
TEMPERATURE = 4.0


@torch.no_grad()
def allot(gated: fx.GraphModule, images: Tensor, costs: Costs, target: float, keep: float) -> float:
    """Move the gates' biases so that the share `target` of the MACs is better spent, in place; leaves eval mode.

    Args:
        gated: its gates set by `gatefit.start`, its layers not yet refitted.
        images: (B, C, H, W), normalised; no labels are needed.
        costs: of `gated`.
        target: share of the dense MACs to keep to.
        keep: see `gatefit.control.lower`.

    Returns:
        By what part the divergence from the predictions with all gates open has fallen.
    """
    gated.eval()
    wanted = predictions(gated, images)

    def divergence() -> float:
        gated(images)
        lower(gated, threshold_for(gated, costs, target, keep), keep)
        return float(distillation(gated(images), wanted, TEMPERATURE))

    first = best = divergence()
    layers = [(gate, fc) for gate in gates_of(gated).values() for fc in gate.layers]
    signs = [1.0] * len(layers)
    size = STEP
    for _ in range(SWEEPS):
        moved = False
        for i, (gate, fc) in enumerate(layers):
            for _ in range(2):
                before = _thresholds(gated)
                lower_layer(gate, fc, -signs[i] * size)
                now = divergence()
                if now < (1 - GAIN) * best:
                    best, moved = now, True
                    break
                _restore(before)
                signs[i] = -signs[i]
        if not moved:
            size /= 2
    return 1 - best / first


def _thresholds(gated: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """All that a threshold moves, each with a copy of it."""
    gates: list[Gate] = list(gates_of(gated).values())
    moved = [fc.bias for gate in gates for fc in gate.layers] + [g.lowered for g in gates if g.fill is not None]
    return [(tensor, tensor.clone()) for tensor in moved]


def _restore(thresholds: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, before in thresholds:
        tensor.copy_(before)
