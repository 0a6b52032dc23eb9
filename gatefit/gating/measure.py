"""Measure, on a gated network as it runs, what each block and each channel unit does for the loss.

Labels are drawn from the network's own predictions, so the squared gradients of the saliences give the true Fisher
information, and no labels of a data set are needed.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatefit.errors import TrainingError
from gatefit.gating.gates import Gate, GateResult, gates_of
from gatefit.gating.info import info_of
from gatefit.graph.ops import harden, scale
from gatefit.graph.partial import traced_forwards
from gatefit.inputs.data import ImageSet, normalise
from gatefit.inputs.loader import loader
from gatefit.inputs.models import logits_of
from gatefit.progress import OnProgress, Progress, silent

SOFTNESS = 4.0
"""Temperature of the predictions whose entropy says how hard an image is: at 1 a network is sure of what it knows."""

GateForward = Callable[[Gate, Tensor], GateResult]
"""Stands in for `Gate.forward`."""


@dataclass(frozen=True)
class UnitMeasures:
    """What the units behind one gate did for N images; the block counts as the one unit of a block gate."""

    activation: Tensor
    """(N, units): mean absolute activation over positions."""
    slope: Tensor
    """(N, units): derivative of an image's loss with respect to the salience."""


@dataclass(frozen=True)
class BlockMeasures:
    """What one block did for N images."""

    pooled: Tensor
    """(N, features): what the gates read."""
    block: UnitMeasures | None
    """None: no block gate."""
    channel: UnitMeasures | None
    """None: no channel gate."""
    mean: Tensor | None
    """(N, units): mean activation of each channel unit, with its sign; None: no channel gate."""


@dataclass(frozen=True)
class Measures:
    """What a network's blocks did for N images, and how hard the images are."""

    blocks: dict[str, BlockMeasures]
    hardness: Tensor
    """(N,) float64: entropy of the softened predictions, in standard deviations from the mean."""
    reached: dict[str, Tensor]
    """By block, (N,) bool: whether an image came to it. Python around the parts of a network may leave some out."""


def measure(
    gated: nn.Module,
    images: ImageSet,
    batches: list[list[int]],
    generator: torch.Generator,
    on_progress: OnProgress = silent,
    stage: str = "initialise",
) -> Measures:
    """Run `gated`, in eval mode, on batches of images by their indices, and measure all of its gates.

    Args:
        gated: gates that are closed stay so.
        images: labels are not used.
        batches: the indices of each batch.
        generator: draws the labels.
        on_progress: called after each batch, as `stage`.

    Raises:
        TrainingError: the network's outputs are not finite, or no image came to a block.
    """
    device = next(gated.parameters()).device
    rows: dict[str, list[BlockMeasures]] = {name: [] for name in gates_of(gated)}
    reached: dict[str, list[Tensor]] = {name: [] for name in rows}
    entropies: list[Tensor] = []
    for done, (pixels, _, _) in enumerate(loader(images, batches), 1):
        probe = Probe(gated)
        logits = logits_of(probe.run(normalise(pixels.to(device), info_of(gated).input)))
        if not bool(logits.isfinite().all()):
            raise TrainingError("the network's outputs are not finite; check its weights, or lower the learning rate")
        labels = torch.multinomial(logits.detach().float().softmax(1).cpu(), 1, generator=generator)[:, 0].to(device)
        soft = (logits.detach().double() / SOFTNESS).log_softmax(1)
        entropies.append(-(soft.exp() * soft).sum(1))
        for name, block in probe.measures(nn.functional.cross_entropy(logits, labels, reduction="sum")):
            rows[name].append(block)
        for name, batches_reached in reached.items():
            batches_reached.append(torch.full((len(logits),), name in probe.saliences, device=device))
        on_progress(Progress(stage, done, len(batches)))
    never = [name for name, parts in rows.items() if not parts]
    if never:
        raise TrainingError(f"no image came to the block '{never[0]}'; the Python around it leaves it out")
    hardness = torch.cat(entropies)
    hardness = (hardness - hardness.mean()) / hardness.std(correction=0).clamp_min(1e-12)
    joined = {name: _joined(parts) for name, parts in rows.items()}
    return Measures(joined, hardness, {name: torch.cat(parts) for name, parts in reached.items()})


def _joined(parts: list[BlockMeasures]) -> BlockMeasures:
    """Join the measures of several batches."""

    def units(level: str) -> UnitMeasures | None:
        given = [m for m in (getattr(p, level) for p in parts) if m is not None]
        if not given:
            return None
        return UnitMeasures(torch.cat([m.activation for m in given]), torch.cat([m.slope for m in given]))

    means = [p.mean for p in parts if p.mean is not None]
    pooled = torch.cat([p.pooled for p in parts])
    return BlockMeasures(pooled, units("block"), units("channel"), torch.cat(means) if means else None)


@torch.no_grad()
def block_damage(gated: nn.Module, images: ImageSet, chosen: Tensor, batch: int) -> dict[str, float]:
    """Measure the damage of skipping each block that has a block gate.

    Args:
        chosen: indices of images, (N,) int64.
        batch: images at once.

    Returns:
        By block, the mean KL divergence between the network's predictions with the block run and with it skipped.
    """
    names = [name for name, gate in gates_of(gated).items() if gate.block is not None]
    damage = dict.fromkeys(names, 0.0)
    if not names:
        return damage
    device = next(gated.parameters()).device
    for pixels, _, _ in loader(images, [b.tolist() for b in chosen.split(batch)]):
        x = normalise(pixels.to(device), info_of(gated).input)
        probe = Probe(gated)
        as_it_is = probe.run(x)
        for name in names:
            if name not in probe.saliences:
                continue
            opened = probe.saliences[name].block
            assert opened is not None
            skipped = Probe(gated, functools.partial(_forced, name, 0.0)).run(x)
            everywhere = bool((opened == 1).all())  # as at a first start: one run serves all blocks
            run = as_it_is if everywhere else Probe(gated, functools.partial(_forced, name, 1.0)).run(x)
            log_skipped, log_run = (logits_of(x).double().log_softmax(1) for x in (skipped, run))
            divergence = nn.functional.kl_div(log_skipped, log_run, log_target=True, reduction="sum")
            damage[name] += float(divergence) / len(chosen)
    return damage


def _forced(name: str, salience: float, gate: Gate, x: Tensor) -> GateResult:
    """Run a gate, but give the block `name` that salience."""
    result: GateResult = gate(x)
    if gate.of.name != name or result.block is None:
        return result
    return result._replace(block=torch.full_like(result.block, salience))


class Probe:
    """Runs a gated network with saliences that record gradients, and notes what they multiply."""

    def __init__(self, gated: nn.Module, forward: GateForward = Gate.__call__) -> None:
        self.gated = gated
        self.forward = forward
        self.saliences: dict[str, GateResult] = {}
        """By block: leaves of the autograd graph."""
        self.pooled: dict[str, Tensor] = {}
        self.activations: dict[tuple[str, str], Tensor] = {}
        """By block and level ("block", "channel"), see `UnitMeasures.activation`."""
        self.means: dict[str, Tensor] = {}
        """By block, see `BlockMeasures.mean`."""

    def measures(self, loss: Tensor) -> Iterator[tuple[str, BlockMeasures]]:
        """Give what was measured, by block; `loss` is a scalar made from the outputs of the run."""
        leaves = [s for both in self.saliences.values() for s in (both.block, both.channel) if s is not None]
        slopes = iter(torch.autograd.grad(loss, leaves))
        for name, both in self.saliences.items():
            block, channel = (
                None if salience is None else UnitMeasures(self.activations[name, level], next(slopes))
                for level, salience in (("block", both.block), ("channel", both.channel))
            )
            yield name, BlockMeasures(self.pooled[name], block, channel, self.means.get(name))

    def run(self, x: Tensor) -> Any:
        """Run the network on images, (B, C, H, W), once; return what it returns."""
        if isinstance(self.gated, fx.GraphModule):
            return _ProbedPart(self.gated, self).run(x)
        forwards = traced_forwards(self.gated).values()
        try:
            for forward in forwards:
                forward.instead = _ProbedPart(forward.view(), self).run
            return self.gated(x)
        finally:
            for forward in forwards:
                forward.instead = None


class _ProbedPart(fx.Interpreter):
    """Runs a traced network for a probe, and notes there what it sees."""

    def __init__(self, traced: fx.GraphModule, probe: Probe) -> None:
        super().__init__(traced)
        self.probe = probe

    def run_node(self, n: fx.Node) -> object:
        """Run a node; a gate gives saliences that record gradients, a product with one is noted."""
        if n.op == "call_module" and isinstance(gate := self.fetch_attr(str(n.target)), Gate):
            return self._run_gate(gate, self.fetch_args_kwargs_from_env(n)[0][0])
        if n.op == "call_function" and n.target is scale:
            salience = n.args[1]
            assert isinstance(salience, fx.Node)
            if salience.target is not harden:  # else a second mask on units that were noted at the first
                self._note(salience, *self.fetch_args_kwargs_from_env(n)[0])
        return super().run_node(n)

    def _note(self, salience: fx.Node, value: Tensor, given: Tensor, axis: int, per_unit: int = 1) -> None:
        source, index = salience.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        name, level = self.fetch_attr(str(source.target)).of.name, GateResult._fields[index]
        self.probe.activations[name, level] = _mean(value.detach().abs(), given, axis, per_unit)
        if level == "channel":
            self.probe.means[name] = _mean(value.detach(), given, axis, per_unit)

    def _run_gate(self, gate: Gate, x: Tensor) -> GateResult:
        name = gate.of.name
        self.probe.pooled[name] = gate.pool(x).detach()
        with torch.no_grad():
            result = self.probe.forward(gate, x)
        block, channel = (None if s is None else s.clone().requires_grad_() for s in (result.block, result.channel))
        self.probe.saliences[name] = GateResult(block, channel, result.compensation)
        return self.probe.saliences[name]


def _mean(value: Tensor, salience: Tensor, axis: int, per_unit: int = 1) -> Tensor:
    """Take the mean of each image and unit over positions: (B, units)."""
    if salience.shape[1] == 1 and value.shape[axis] != per_unit:
        return value.flatten(1).mean(1, keepdim=True)
    value = value.movedim(axis, 1).flatten(2) if value.dim() > 2 else value.unsqueeze(2)
    units: Tensor = value.mean(2).unflatten(1, (-1, per_unit)).mean(2)
    return units
