"""Gates that follow: while the network trains, each channel gate is kept to what its units do by now.

A gate that was set from data knows what its units did when it was set; soon they do something else. A forward pass of
the training computes all units, closed ones too. So least squares from what the gate reads to what its units did, over
the last few thousand images (recursive least squares with forgetting), need no pass and no learning rate of their own.
What a unit is worth, the guess at the hardness and the threshold stay as `start_from_data` and the closed loop have
set them.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, fx

from gatefit.gates import Gate, gates_of
from gatefit.start import Start, ridge_from_moments

HALF_LIFE = 4400
"""Images after which one weighs half."""
WARM_UP = 3000
"""Images that have to be seen before a gate is moved."""


@dataclass
class _Followed:
    """One channel gate: the shares of its pre-activations that stay, and moments of what it reads and of its units."""

    scale: Tensor
    """Pre-activation for each mean activation of a unit, (units,)."""
    hard_weight: Tensor
    """Share of the guess at the hardness, (1, features)."""
    hard_bias: Tensor
    """(1,)"""
    bias: Tensor
    """The bias as it would be had the threshold stayed at 0, (units,)."""
    gram: Tensor
    """Of (features + 1) inputs, the last of them 1; float64."""
    cross: Tensor
    """Of inputs and activations, (features + 1, units); float64."""
    images: Tensor
    """How many have been seen."""


class Follower:
    """Moves the channel gates of a network as what their units do changes."""

    def __init__(self, gated: fx.GraphModule) -> None:
        self.gates = {name: gate for name, gate in gates_of(gated).items() if gate.channel is not None}
        self.followed: dict[str, _Followed] = {}

    def begin(self, start: Start) -> None:
        """Take what a start has just set; to be called before the threshold is moved."""
        for name, gate in self.gates.items():
            assert gate.channel is not None
            units, features = gate.channel.weight.shape
            bias = gate.channel.bias.detach().clone()
            stays = start.scales[name], *start.hardness[name], bias
            before = self.followed.get(name)
            if before is not None:
                self.followed[name] = _Followed(*stays, before.gram, before.cross, before.images)
            else:
                gram, cross = (bias.new_zeros(features + 1, n, dtype=torch.float64) for n in (features + 1, units))
                self.followed[name] = _Followed(*stays, gram, cross, bias.new_zeros(()))

    @torch.no_grad()
    def note(self, activations: dict[str, Tensor]) -> None:
        """Take in the mean absolute activations, (B, units), of the last forward pass, by block name."""
        for name, given in activations.items():
            outputs, followed = self.gates[name].outputs, self.followed[name]
            assert outputs is not None
            read = torch.cat([outputs.pooled, outputs.pooled.new_ones(len(given), 1)], 1).double()
            followed.images += len(given)
            new = max(1 - 0.5 ** (len(given) / HALF_LIFE), len(given) / float(followed.images))
            followed.gram.lerp_(read.T @ read / len(read), new)
            followed.cross.lerp_(read.T @ given.double() / len(read), new)

    @torch.no_grad()
    def apply(self) -> None:
        """Set each gate to what it has seen lately."""
        for name, gate in self.gates.items():
            followed = self.followed[name]
            if followed.images >= WARM_UP:
                _set(gate, followed)

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs to go on."""
        return {
            f"{name}/{f.name}": getattr(followed, f.name)
            for name, followed in self.followed.items()
            for f in fields(_Followed)
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for name, gate in self.gates.items():
            device = next(gate.parameters()).device
            saved = (state[f"{name}/{f.name}"] for f in fields(_Followed))
            self.followed[name] = _Followed(*(tensor.to(device, copy=True) for tensor in saved))


def _set(gate: Gate, followed: _Followed) -> None:
    assert gate.channel is not None
    weight, bias = ridge_from_moments(followed.gram, followed.cross)
    lowered = followed.bias - gate.channel.bias
    scale = followed.scale
    followed.bias = (scale * bias + followed.hard_bias).to(gate.channel.bias.dtype)
    gate.channel.weight.copy_(scale[:, None] * weight + followed.hard_weight)
    gate.channel.bias.copy_(followed.bias - lowered)
