"""A start for the gates from data: predict from the pooled input what each unit does for the loss.

For each unit u the salience's pre-activation becomes k * (score_u(x) - threshold), where score_u(x) is the
least-squares prediction, from the pooled input, of (activation of u on x) * w_u / sqrt(cost_u), and w_u scales
activations to the Fisher information of the salience, E[(dL/dS_u)^2]. So score^2 / 2 is the expected rise of
the loss when u is closed (optimal brain damage), per MAC, and one threshold serves the whole network. A whole
block is too much for that second-order estimate: for blocks the rise is measured by closing them one by one.
To each pre-activation is added what the pooled input says of how hard the image is: hard images open more.

All of it is measured on the network as it runs, so the gates of a network that has learnt to do without some of its
units can be set anew from what the others do for it now.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from gatefit.errors import TrainingError
from gatefit.gating.gates import Gate, gates_of
from gatefit.gating.penalty import unit_weights
from gatefit.graph.ops import harden, scale
from gatefit.inputs.data import ImageSet, normalise
from gatefit.inputs.loader import loader

Tick = Callable[[int, int], None]
"""Told after each step of long work: steps done, and of how many."""
RIDGE = 1e-3
SPREAD = 4.0
"""Standard deviation of the pre-activations: 1 is the width of the window in which gates learn."""
EMPHASIS = 2.0
"""What is added to the pre-activations of an image that is harder than the mean by one standard deviation."""
SOFTNESS = 4.0
"""Temperature of the predictions whose entropy says how hard an image is: at 1 a network is sure of what it knows."""


GateForward = Callable[[Gate, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]
"""What stands for `Gate.forward`: saliences of block and units, and the fill."""


class _Probe(fx.Interpreter):
    """Runs a gated network with saliences that record gradients, and notes what they multiply."""

    def __init__(self, gated: fx.GraphModule, forward: GateForward = Gate.__call__) -> None:
        super().__init__(gated)
        self.forward = forward
        self.saliences: dict[str, list[Tensor | None]] = {}
        self.activations: dict[str, list[Tensor | None]] = {}
        self.means: dict[str, Tensor] = {}
        """Mean activation of each channel unit, with its sign."""
        self.pooled: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        if n.op == "call_module" and isinstance(gate := self.fetch_attr(str(n.target)), Gate):
            return self._probe(gate, self.fetch_args_kwargs_from_env(n)[0][0])
        if n.op == "call_function" and n.target is scale:
            args, _ = self.fetch_args_kwargs_from_env(n)
            source = n.args[1]
            assert isinstance(source, fx.Node) and isinstance(source.args[0], fx.Node)
            if source.target is harden:  # a second mask on units that were probed at the first
                return super().run_node(n)
            gate = self.fetch_attr(str(source.args[0].target))
            kind = source.args[1]
            assert isinstance(kind, int)
            value, salience, axis, *rest = args
            self.activations[gate.of.name][kind] = _mean(value.detach().abs(), salience, axis, *rest)
            if kind == 1:
                self.means[gate.of.name] = _mean(value.detach(), salience, axis, *rest)
        return super().run_node(n)

    def _probe(self, gate: Gate, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        name = gate.of.name
        self.pooled[name] = gate.pool(x).detach()
        with torch.no_grad():
            block, channel, compensation = self.forward(gate, x)
        given = [None if s is None else s.clone().requires_grad_() for s in (block, channel)]
        self.saliences[name] = given
        self.activations[name] = [None, None]
        return given[0], given[1], compensation


def _mean(value: Tensor, salience: Tensor, axis: int, per_unit: int = 1) -> Tensor:
    """Mean of each image and unit over positions: (B, units)."""
    if salience.shape[1] == 1 and value.shape[axis] != per_unit:
        return value.flatten(1).mean(1, keepdim=True)
    value = value.movedim(axis, 1).flatten(2) if value.dim() > 2 else value.unsqueeze(2)
    units: Tensor = value.mean(2).unflatten(1, (-1, per_unit)).mean(2)
    return units


def start_from_data(
    gated: fx.GraphModule,
    images: ImageSet,
    count: int = 5000,
    batch: int = 50,
    seed: int = 0,
    tick: Tick = lambda done, of: None,
) -> float:
    """Set the gates' weights from `count` images, no labels needed; the threshold goes back to 0, where they are open.

    Gates that are closed stay so while it measures. Labels are drawn from the network's own predictions, so that the
    Fisher information is the true one.

    Returns:
        k, the factor between scores and pre-activations.

    Raises:
        TrainingError: the network's outputs are not finite.
    """
    device = next(gated.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[:count]
    was_training = gated.training
    gated.eval()
    rows: dict[str, list[tuple[Tensor, list[Tensor | None], list[Tensor | None]]]] = {n: [] for n in gates_of(gated)}
    means: dict[str, list[Tensor]] = {n: [] for n in gates_of(gated)}
    entropies: list[Tensor] = []
    batches = [b.tolist() for b in chosen.split(batch)]
    for done, (pixels, _, _) in enumerate(loader(images, batches), 1):
        probe = _Probe(gated)
        logits = probe.run(normalise(pixels.to(device), gated.meta["input"]))
        if not bool(logits.isfinite().all()):
            raise TrainingError("the network's outputs are not finite; check its weights, or lower the learning rate")
        labels = torch.multinomial(logits.detach().float().softmax(1).cpu(), 1, generator=generator)[:, 0].to(device)
        soft = (logits.detach().double() / SOFTNESS).log_softmax(1)
        entropies.append(-(soft.exp() * soft).sum(1))
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        flat = [s for both in probe.saliences.values() for s in both if s is not None]
        slopes = iter(torch.autograd.grad(loss, flat))
        for name, mean in probe.means.items():
            means[name].append(mean)
        for name, both in probe.saliences.items():
            rows[name].append(
                (probe.pooled[name], probe.activations[name], [None if s is None else next(slopes) for s in both])
            )
        tick(done, len(batches))
    hardness = torch.cat(entropies)
    hardness = (hardness - hardness.mean()) / hardness.std(correction=0).clamp_min(1e-12)
    fits: list[tuple[nn.Linear, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []
    spread: list[Tensor] = []
    weights = unit_weights(gated)
    damage = _block_damage(gated, images, chosen[: count // 16], batch)
    for name, gate in gates_of(gated).items():
        pooled = torch.cat([r[0] for r in rows[name]]).double()
        hard = _guess(pooled, hardness[:, None])
        for kind, fc in enumerate((gate.block, gate.channel)):
            if fc is None:
                continue
            activation = torch.cat([r[1][kind] for r in rows[name]]).double()  # type: ignore[misc]
            if kind == 0:
                rise = torch.tensor(2 * damage[name], dtype=torch.float64, device=device)
            else:
                rise = torch.cat([r[2][kind] for r in rows[name]]).double().square().mean(0)  # type: ignore[misc]
            fisher = (rise / activation.square().mean(0).clamp_min(1e-12)).sqrt()
            wanted = activation * fisher / weights[name][kind] ** 0.5
            weight, bias = _ridge(pooled, wanted)
            fits.append((fc, (weight, bias), hard))
            if kind == 1 or gate.channel is None:
                spread.append((pooled @ weight.T + bias).flatten())
    k = SPREAD / float(torch.cat(spread).std().clamp_min(1e-12))
    with torch.no_grad():
        for fc, (weight, bias), (hard_weight, hard_bias) in fits:
            fc.weight.copy_(k * weight + EMPHASIS * hard_weight)
            fc.bias.copy_(k * bias + EMPHASIS * hard_bias)
        for name, gate in gates_of(gated).items():
            if gate.compensation is not None and gate.channel is not None:
                pooled = torch.cat([r[0] for r in rows[name]])
                gate.threshold.zero_()
                _initialise_compensation(gated, gate, gate.predicted(gate.channel(pooled)), torch.cat(means[name]))
    gated.train(was_training)
    return k


def _initialise_compensation(gated: fx.GraphModule, gate: Gate, predicted: Tensor, mean: Tensor) -> None:
    """What the reader would have made of each unit's mean activation, as predicted by the gate.

    Args:
        predicted: what the gate says of the images, (N, units).
        mean: true mean activations, (N, units).
    """
    assert (
        gate.compensation is not None
        and gate.of.channel_units is not None
        and gate.of.channel_units.consumer is not None
    )
    slope = (mean * predicted).sum(0) / predicted.square().sum(0).clamp_min(1e-12)
    weight = gated.get_submodule(gate.of.channel_units.consumer.name).get_parameter("weight").detach()
    summed = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    gate.compensation.weight.copy_(summed.unflatten(1, (gate.of.units, -1)).sum(2) * slope)


@torch.no_grad()
def _block_damage(gated: fx.GraphModule, images: ImageSet, chosen: Tensor, batch: int) -> dict[str, float]:
    """Mean KL divergence between the network's predictions with each gated block run and skipped."""
    names = [name for name, gate in gates_of(gated).items() if gate.block is not None]
    damage = dict.fromkeys(names, 0.0)
    if not names:
        return damage
    device = next(gated.parameters()).device
    for pixels, _, _ in loader(images, [b.tolist() for b in chosen.split(batch)]):
        x = normalise(pixels.to(device), gated.meta["input"])
        probe = _Probe(gated)
        as_it_is = probe.run(x)
        for name in names:
            opened = probe.saliences[name][0]
            assert opened is not None
            skipped = _Probe(gated, functools.partial(_forced, name, 0.0)).run(x)
            everywhere = bool((opened == 1).all())  # as at a first start: one run serves all blocks
            run = as_it_is if everywhere else _Probe(gated, functools.partial(_forced, name, 1.0)).run(x)
            log_skipped, log_run = (logits.double().log_softmax(1) for logits in (skipped, run))
            divergence = nn.functional.kl_div(log_skipped, log_run, log_target=True, reduction="sum")
            damage[name] += float(divergence) / len(chosen)
    return damage


def _forced(name: str, salience: float, gate: Gate, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What a gate gives, but for the block `name` that salience."""
    block, channel, compensation = gate(x)
    return (
        torch.full_like(block, salience) if gate.of.name == name and block is not None else block,
        channel,
        compensation,
    )


def _guess(inputs: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """`_ridge` for what the inputs say little of, `wanted` of mean 0: only as much of it as holds for other images.

    The slope of the truth over a guess from one half of the images is measured on the other half; a fit to all of
    them has half of its noise.
    """
    half = len(inputs) // 2
    weight, bias = _ridge(inputs[:half], wanted[:half])
    guess = inputs[half:] @ weight.T + bias
    guess = guess - guess.mean(0)
    slope = float((guess * wanted[half:]).sum() / guess.square().sum().clamp_min(1e-12))
    kept = 2 / (1 + 1 / min(1.0, slope)) if slope > 0 else 0.0
    weight, bias = _ridge(inputs, wanted)
    return kept * weight, kept * bias


def _ridge(inputs: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares with a small ridge: weight (units, features) and bias (units,)."""
    middle, goal = inputs.mean(0), wanted.mean(0)
    centred = inputs - middle
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(gram, centred.T @ (wanted - goal)).T
    return weight, goal - weight @ middle
