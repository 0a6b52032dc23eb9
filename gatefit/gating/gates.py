"""The two gates of a block and how their saliences are applied (LC-Net, arXiv 2007.15151)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gatefit.errors import GatefitError
from gatefit.graph.blocks import ResidualBlock

GateForm = Literal["relu1", "step"]
"""Form of the saliences: the paper's ReLU-1, or 0/1 (a step, trained straight-through)."""

PREFIX = "gatefit"
"""Every parameter that a retrofit adds stands under a part of this name: of the network, or of its traced parts."""

LEAK = 0.01
"""Slope of the leaky ReLU-1 outside [0, 1]."""


def relu1(x: Tensor, leak: float = 0.0) -> Tensor:
    """Compute min(max(x, 0), 1), with slope `leak` outside [0, 1]. At 0 and 1 themselves the gradient is whole."""
    # Not clamp: its gradient at the very corner, where a fresh gate stands, differs between torch versions.
    nearest = x.detach().clamp(0, 1)
    return torch.where((x >= 0) & (x <= 1), x, nearest + leak * (x - nearest))


def step(x: Tensor) -> Tensor:
    """Return 1 where x > 0, else 0; in the backward pass the gradient passes with slope 1/2 for |x| <= 1."""
    hard = (x > 0).to(x.dtype)
    soft = torch.where(x.abs() <= 1, x / 2, x.detach())
    return hard + (soft - soft.detach()) if x.requires_grad else hard


@dataclass(frozen=True)
class GateOutputs:
    """What a gate computed in its last forward; each tensor has the gradient of that forward."""

    block: Tensor | None
    """Pre-activation of the block gate, (B, 1), float."""
    channel: Tensor | None
    """Pre-activations of the channel gate, (B, units), float."""


class GateResult(NamedTuple):
    """What a gate gives to the graph. The graph picks the parts by their place, so the order is part of it."""

    block: Tensor | None
    """Salience of the block, (B, 1), in [0, 1]; None: no block gate."""
    channel: Tensor | None
    """Saliences of the channel units, (B, units), in [0, 1]; None: no channel gate."""
    compensation: Tensor | None
    """What closed units leave behind in the layer that reads them, (B, channels); None: nothing."""


class Gate(nn.Module):
    """Gates one block: L-Net and C-Net on one shared pooling, S = ReLU1(FC(GAP(x))).

    A fresh gate is the identity: weight 0 and bias 1, so that every salience is exactly 1.

    Example: the input of a block has 16 channels, and conv1 makes 32 of them, which conv2 reads. The gate pools the
    input to 16 numbers. L-Net, a layer of 16 x 1 weights, turns them into the salience of the block; C-Net, a layer of
    16 x 32 weights, into the saliences of the 32 units.

    A closed unit can leave its prediction behind (compensation; not in the paper). The layer that reads the units then
    adds compensation((1 - S_C) * max(z + threshold, 0) / 8) to each position, where z are C-Net's pre-activations. It
    is 0 at the start.

    Args:
        of: the block that it gates.
        gates: "lc" for both gates, "l" for the block gate alone, "c" for the channel gate alone.
        form: see `GateForm`.
        compensation: whether closed units leave their prediction behind.
    """

    threshold: Tensor
    """How far each pre-activation was moved down since the initialisation, (units,) float; only with a compensation."""

    def __init__(
        self, of: ResidualBlock, gates: str = "lc", form: GateForm = "relu1", compensation: bool = False
    ) -> None:
        super().__init__()
        self.of = of
        self.form = form
        self.block = _identity_fc(of.features, 1) if "l" in gates else None
        self.channel = _identity_fc(of.features, of.units) if "c" in gates and of.units else None
        self.compensation: nn.Linear | None = None
        consumer = of.channel_units.consumer if of.channel_units else None
        if compensation and self.channel is not None and consumer is not None:
            self.compensation = nn.Linear(of.units, consumer.channels, bias=False)
            nn.init.zeros_(self.compensation.weight)
            self.register_buffer("threshold", torch.zeros(of.units))
        self.outputs: GateOutputs | None = None

    @property
    def layers(self) -> list[nn.Linear]:
        """List the layers of L-Net and C-Net, which learn at a rate of their own (`gate_lr`)."""
        return [fc for fc in (self.block, self.channel) if fc is not None]

    @property
    def macs(self) -> int:
        """Count the MACs of the gate itself, per image."""
        compensations = [] if self.compensation is None else [self.compensation]
        return sum(fc.in_features * fc.out_features for fc in self.layers + compensations)

    def pool(self, x: Tensor) -> Tensor:
        """Average the block's input, (B, ...), over all axes but batch and channels: (B, features)."""
        axes = [a for a in range(1, x.dim()) if a != self.of.entry_axis]
        return x.mean(axes) if axes else x

    def forward(self, x: Tensor) -> GateResult:
        """Compute saliences and compensation from the block's input, (B, ...)."""
        # Straight-through slopes teach the gate; passed on to the layers before it they were noise that cost points.
        pooled = self.pool(x.detach() if self.form == "step" else x)
        block = None if self.block is None else _linear(self.block, pooled)
        channel = None if self.channel is None else _linear(self.channel, pooled)
        self.outputs = GateOutputs(block, channel)
        block_salience = None if block is None else self.salience(block)
        if channel is None:
            return GateResult(block_salience, None, None)
        salience = self.salience(channel)
        if self.compensation is None:
            return GateResult(block_salience, salience, None)
        left_behind = _linear(self.compensation, self._closed_predictions(channel, salience))
        return GateResult(block_salience, salience, left_behind)

    def opened(self, x: Tensor) -> GateResult:
        """Give what `forward` would if every unit and the block were open: saliences 1, compensation 0."""
        one, zero = x.new_ones(x.shape[0], 1), x.new_zeros(x.shape[0], 1)
        block, channel = (None if fc is None else one.expand(-1, fc.out_features) for fc in (self.block, self.channel))
        return GateResult(
            block, channel, None if self.compensation is None else zero.expand(-1, self.compensation.out_features)
        )

    def never_ran(self, like: Tensor) -> GateOutputs:
        """Give outputs of a forward that did not come to this gate: for each image of `like`, (B, ...), all closed."""
        block, channel = (
            None if fc is None else like.new_full((len(like), fc.out_features), -1.0)
            for fc in (self.block, self.channel)
        )
        return GateOutputs(block, channel)

    def closed_predictions(self, x: Tensor) -> Tensor:
        """Predict the closed units from the block's input, 0 for open ones: what the compensation reads, (B, units)."""
        assert self.channel is not None
        logits = _linear(self.channel, self.pool(x))
        return self._closed_predictions(logits, self.salience(logits))

    def _closed_predictions(self, logits: Tensor, salience: Tensor) -> Tensor:
        return (1 - salience) * self.predicted(logits)

    def predicted(self, logits: Tensor) -> Tensor:
        """Turn pre-activations into predictions of the units, open or closed, (B, units).

        They are scaled so that the compensation learns as fast as other layers do.
        """
        return (logits + self.threshold).clamp_min(0) / 8

    def salience(self, logits: Tensor) -> Tensor:
        """Turn pre-activations into saliences; leaky in training."""
        if self.form == "step":
            return step(logits)
        return relu1(logits, LEAK if self.training else 0.0)

    def __getstate__(self) -> dict[str, Any]:
        # The last outputs hang on an autograd graph, which can neither be copied nor pickled.
        return {**self.__dict__, "outputs": None}

    def extra_repr(self) -> str:
        """Describe the gate in print(model)."""
        return f"of={self.of.name!r}, form={self.form!r}"


def _identity_fc(features: int, outputs: int) -> nn.Linear:
    fc = nn.Linear(features, outputs)
    nn.init.zeros_(fc.weight)
    nn.init.ones_(fc.bias)
    return fc


def _linear(fc: nn.Linear, x: Tensor) -> Tensor:
    # Without autocast: at bf16 the many values near 0 would open and close at random.
    device = x.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        result: Tensor = fc(x.to(fc.weight.dtype))
    return result


def gates_of(gated: nn.Module) -> dict[str, Gate]:
    """Find the gates of a retrofitted network by block name, in order of execution.

    Raises:
        GatefitError: the network has none.
    """
    found = {m.of.name: m for m in gated.modules() if isinstance(m, Gate)}
    if not found:
        raise GatefitError("this network has no gates; call gatefit.retrofit(model) first")
    return found


@contextmanager
def opened_gates(gated: nn.Module) -> Iterator[None]:
    """Let a retrofitted network run as if every gate were open."""
    gates = gates_of(gated).values()
    try:
        for gate in gates:
            gate.forward = gate.opened  # type: ignore[method-assign]
        yield
    finally:
        for gate in gates:
            del gate.forward


def before_gates(gated: nn.Module, images: Tensor, call: Callable[[Gate, tuple[Tensor, ...]], None]) -> None:
    """Run a retrofitted network once, and `call` with each gate and its inputs right before it runs."""
    hooks = [gate.register_forward_pre_hook(call) for gate in gates_of(gated).values()]
    try:
        gated(images)
    finally:
        for hook in hooks:
            hook.remove()


def outputs_of(gated: nn.Module) -> Iterator[tuple[Gate, GateOutputs]]:
    """Give each gate of `gated` with what it computed in the last forward.

    Raises:
        GatefitError: no forward has been run.
    """
    gates = gates_of(gated)
    ran = [gate.outputs for gate in gates.values() if gate.outputs is not None]
    if not ran:
        name = next(iter(gates))
        raise GatefitError(f"the gate of block '{name}' has not run; call the network on a batch first")
    some = next(x for x in (ran[0].block, ran[0].channel) if x is not None)
    for gate in gates.values():
        yield gate, gate.outputs or gate.never_ran(some)


def forget_outputs(gated: nn.Module, *_: Any) -> None:
    """Drop what all gates computed: Python around the parts of a network may leave some out in the next forward."""
    for gate in gates_of(gated).values():
        gate.outputs = None


def is_gate_key(key: str) -> bool:
    """Tell whether a retrofit added the parameter or buffer of that key."""
    return PREFIX in key.split(".")
