"""The closed loop on the penalty: one threshold for all gates, moved by the MACs that really run.

Lowering every pre-activation by d is the proximal step of an L1 penalty on the saliences (soft thresholding).
For a target, the loop finds the d at which the batch would run the wanted share, and goes part of the way.
For a fixed L1 coefficient c, a unit pays while score^2 / 2 > c per mean unit's MACs (see `gatefit.gating.initialise`),
so the threshold on the score is sqrt(2 c).
"""

import math

import torch
from torch import nn

from gatefit.decisions import BlockDecision, Decisions
from gatefit.gating.cost import GateCosts
from gatefit.gating.gates import outputs_of

GAIN = 0.1
"""Part of the way to the batch's threshold that one step goes: batches are small samples."""
STEPS = 18


def lower(gated: nn.Module, shift: float, min_open: float = 0.0) -> None:
    """Lower every pre-activation by `shift`; a block keeps `min_open` of its gates open in the last batch."""
    with torch.no_grad():
        for gate, out in outputs_of(gated):
            for fc, logits in ((gate.block, out.block), (gate.channel, out.channel)):
                if fc is not None and logits is not None:
                    by = min(shift, _most(logits, min_open))
                    fc.bias.sub_(by)
                    if fc is gate.channel and gate.compensation is not None:
                        gate.threshold.add_(by)


def threshold_for(gated: nn.Module, costs: GateCosts, target: float, min_open: float = 0.0) -> float:
    """Find the shift at which the last batch would run the share `target` of the dense network's MACs.

    Example: two units cost the same, and their pre-activations are 0.3 and 0.8 on the one image of the batch. A
    target that leaves one of them is met by each shift from 0.3 to just below 0.8: the first unit closes.
    """
    outputs = {gate.of.name: out for gate, out in outputs_of(gated)}
    most = {
        (name, kind): _most(x, min_open)
        for name, out in outputs.items()
        for kind, x in (("block", out.block), ("channel", out.channel))
        if x is not None
    }

    def share(shift: float) -> float:
        decisions = {
            name: BlockDecision(
                None if o.block is None else o.block.detach()[:, 0] > min(shift, most[name, "block"]),
                None if o.channel is None else o.channel.detach() > min(shift, most[name, "channel"]),
            )
            for name, o in outputs.items()
        }
        return float(costs.per_image(Decisions(decisions)).mean()) / costs.dense

    every = [x.detach() for o in outputs.values() for x in (o.block, o.channel) if x is not None]
    low = min(float(x.min()) for x in every) - 1
    high = max(float(x.max()) for x in every) + 1
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > target else (low, middle)
    return (low + high) / 2


def price_threshold(l1: float, factor: float) -> float:
    """Find the pre-activations' threshold for an L1 coefficient; `factor` is what `initialise_from_data` returned."""
    return factor * math.sqrt(2 * l1)


def smallest_share(costs: GateCosts, min_open: float) -> float:
    """Compute the share of MACs that remains when all gates close as far as `min_open` lets them."""
    least = float(costs.base)
    running: dict[str, float] = {}
    for b in costs.blocks:
        reached = running.get(b.parent or "", 1.0)
        runs = running[b.name] = reached * (min_open if b.has_block_gate else 1.0)
        closing = min_open if b.scaled or b.first_scaled else 1.0
        first = b.first * (closing if b.first_scaled else 1)
        least += reached * b.gate + runs * (b.fixed + closing * b.scaled + first)
    return least / costs.dense


def _most(logits: torch.Tensor, min_open: float) -> float:
    """Find the largest shift that leaves the share `min_open` of these gates open."""
    if not min_open:
        return float("inf")
    flat = logits.detach().flatten()
    rank = max(1, int((1 - min_open) * flat.numel()))
    return float(flat.kthvalue(rank).values)
