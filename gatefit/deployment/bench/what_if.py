"""Gates that close a wanted share without any training: what a conversion could gain, before it is paid for."""

import torch
from torch import Tensor, nn

from gatefit.gating.cost import costs_of, decisions_of
from gatefit.gating.gates import Gate, before_gates

ALIVE = 0.5
"""Part of the channels that some images open and others close."""
ROUNDS = 10


@torch.no_grad()
def set_share(gated: nn.Module, images: Tensor, share: float, masks: int = 4, seed: int = 0) -> float:
    """Give a freshly retrofitted network (form "step") gates that let through the share `share` of its MACs.

    In each block the images of the set are told apart along a random direction of its pooled input: every block is
    skipped by as many as close each channel, and no block has more than `masks` masks. What the network then
    answers means nothing; what it costs does.

    Args:
        gated: in place.
        images: (B, C, H, W); the more, the nearer to the share.
        share: of the dense MACs, gates included.

    Returns:
        The share that was reached.
    """
    costs = costs_of(gated, tuple(images.shape[1:]))

    def reached(closed: float) -> float:
        _close(gated, images, closed, masks, seed)
        return float(costs.per_image(decisions_of(gated)).mean()) / costs.dense

    low, high = 0.0, 1.0
    for _ in range(ROUNDS):
        closed = (low + high) / 2
        low, high = (closed, high) if reached(closed) > share else (low, closed)
    return reached(high)


@torch.no_grad()
def keep_open(gated: nn.Module, images: Tensor, seed: int = 0) -> None:
    """Make a placebo: give a freshly retrofitted network gates that read their input and close for none of `images`."""
    generator = torch.Generator().manual_seed(seed)

    def set_gate(gate: Gate, args: tuple[Tensor, ...]) -> None:
        value, weight = _direction(gate.pool(args[0]), generator)
        for fc in gate.layers:
            _set(fc, weight.expand_as(fc.weight), (1 - value.min()).expand_as(fc.bias))

    before_gates(gated, images, set_gate)


def _close(gated: nn.Module, images: Tensor, closed: float, masks: int, seed: int) -> None:
    """Set each gate right before it runs, so that it sees what the ones before it left, and run the images."""
    generator = torch.Generator().manual_seed(seed)

    def set_gate(gate: Gate, args: tuple[Tensor, ...]) -> None:
        pooled = gate.pool(args[0])
        if gate.block is not None:
            value, weight = _direction(pooled, generator)
            _set(gate.block, weight[None], -_between(value, closed)[None])
        if gate.channel is not None:
            value, weight = _direction(pooled, generator)
            _set_channels(gate, value, weight, closed, masks, generator)

    before_gates(gated, images, set_gate)


def _direction(pooled: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a random direction, (features,), in which images differ by about 1; tell where each stands on it, (B,)."""
    weight = torch.randn(pooled.shape[1], generator=generator) / pooled.std(0).clamp_min(1e-6)
    weight /= (pooled @ weight).std().clamp_min(1e-6)
    return pooled @ weight, weight


def _between(values: Tensor, share: float) -> Tensor:
    """Find a threshold above about `share` of the values, halfway between two of them: rounding moves none across."""
    ordered = values.sort().values
    region = min(max(1, round(share * len(values))), len(values) - 1)
    return ordered[region - 1 : region + 1].mean()


def _set_channels(
    gate: Gate, value: Tensor, weight: Tensor, closed: float, masks: int, generator: torch.Generator
) -> None:
    """Choose the channels that are open above, or below, one of a few thresholds; the rest are constant."""
    assert gate.channel is not None
    units = gate.of.units
    order = torch.randperm(units, generator=generator)
    alive = min(ALIVE, 2 * closed, 2 * (1 - closed))
    some = order[: round(units * alive)]
    always = order[len(some) : len(some) + round(units * (1 - closed - alive / 2))]
    rows, biases = torch.zeros(units, len(weight)), torch.full((units,), -1.0)
    biases[always] = 1.0
    kinds = max(2, masks - 1)  # with the mask of all channels, as many as a codebook holds
    thresholds = torch.stack([_between(value, i / kinds) for i in range(1, kinds)])
    for i, unit in enumerate(some.tolist()):
        sign = 1 - 2 * (i % 2)
        rows[unit], biases[unit] = sign * weight, -sign * thresholds[i // 2 % len(thresholds)]
    _set(gate.channel, rows, biases)


def _set(fc: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    fc.weight.copy_(weight)
    fc.bias.copy_(bias)
