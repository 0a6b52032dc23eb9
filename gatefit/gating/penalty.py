"""The L1 penalty on the saliences, and what each unit weighs in it."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from gatefit.gating.gates import Gate, gates_of, outputs_of

Weighting = Literal["macs", "plain"]


def salience_penalty(gated: nn.Module, weighting: Weighting = "macs") -> Tensor:
    """Compute the L1 norm of all saliences of an image, mean over the batch of the last forward: a scalar >= 0.

    Multiply it by an L1 coefficient and add it to the loss. Its scale is the number of units: a fresh network, all of
    whose saliences are 1, has the sum of the weights, such as 672. Coefficients of 1e-4 to 1e-3 are usual.

    Args:
        gated: a retrofitted network, after a forward in train mode.
        weighting: "macs": a channel salience weighs as its unit's MACs (mean weight 1 over the network), a
            block salience as all of its block's. "plain": every salience weighs 1, as in the paper.

    Raises:
        GatefitError: the network has no gates, or no forward has been run.

    Source: arXiv 2007.15151, L1 on S_L and S_C of every block.
    """
    return _weighted_sum(gated, weighting, Tensor.abs)


def signed_salience_penalty(gated: nn.Module, weighting: Weighting = "macs") -> Tensor:
    """Compute `salience_penalty` with the sign of what the leaky ReLU-1 gives closed gates in training.

    The recipes were measured with it: it goes on pushing closed gates down, at a hundredth of the strength.
    """
    return _weighted_sum(gated, weighting, lambda salience: salience)


def _weighted_sum(gated: nn.Module, weighting: Weighting, size: Callable[[Tensor], Tensor]) -> Tensor:
    """Add up the weighted sizes of all saliences of an image, mean over the batch."""
    weights = unit_weights(gated) if weighting == "macs" else {}
    total: Tensor | None = None
    for gate, out in outputs_of(gated):
        block, channel = weights.get(gate.of.name, (1.0, 1.0))
        for logits, weight in ((out.block, block), (out.channel, channel)):
            if logits is not None:
                term = weight * size(gate.salience(logits)).sum(1).mean()
                total = term if total is None else total + term
    assert total is not None
    return total


def unit_weights(gated: nn.Module) -> dict[str, tuple[float, float]]:
    """Weigh the whole block and one channel unit of each block by their MACs, relative to the network's mean unit."""
    gates = gates_of(gated).values()
    units = sum(g.of.units for g in gates if g.channel is not None)
    mean = sum(_scaled(g) for g in gates) / units if units else sum(g.of.macs for g in gates) / len(gates)
    return {g.of.name: (g.of.macs / mean, _scaled(g) / g.of.units / mean if g.of.units else 1.0) for g in gates}


def _scaled(gate: Gate) -> int:
    if gate.channel is None:
        return 0
    return sum(layer.macs for layer in gate.of.layers if layer.scaled)
