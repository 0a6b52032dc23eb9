"""Repair a gated network without training: reconstruct, layer by layer, what reads changed inputs.

Two runs of the network stand side by side on the same images, one as if every gate were open (the original), one
gated. Where a convolution or linear layer of the gated run reads other values than the original's, its weights
move to the ridge regression that gives the original's outputs best, and those of the compensation with them. Layers are
taken in order, so each sees what the repaired ones before it give. No labels, no learning rate.
(After channel pruning by least squares, He et al., arXiv 1707.06168; here the masks differ from image to image.)
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatefit.gating.gates import Gate, opened_gates
from gatefit.graph.ops import add_compensation
from gatefit.graph.partial import inputs_of, parts_of
from gatefit.graph.trace import call_counts, module_of, shape_of
from gatefit.progress import OnProgress, Progress, silent

PRIOR_IMAGES = 40
"""Pull of each weight towards its present value, as if so many images had spoken for it."""
POSITIONS = 1 << 16
"""Output positions of a batch that are used, about: more rows than that change nothing."""
MEMORY = 6 << 30
"""Bytes that the values of both runs may take, about."""
LIVE = 4
"""Large values that stand at once: what a layer reads and what it gives, in both runs."""


def images_that_fit(gated: nn.Module) -> int:
    """Tell how many images `reconstruct` can hold at once."""
    held, largest = 0, 1
    for path, part in parts_of(gated).items():
        sizes = [math.prod(s[1:]) for n in part.graph.nodes if (s := shape_of(n)) is not None and len(s) > 1]
        held += sizes[0] if path else 0  # what each part is given stands all the time
        largest = max(largest, *sizes)
    return max(1, MEMORY // (4 * (held + LIVE * largest)))


@torch.no_grad()
def reconstruct(gated: nn.Module, batches: Iterable[Tensor], on_progress: OnProgress = silent) -> int:
    """Reconstruct the layers of `gated` that read changed inputs, in place, its gates as they are; leaves eval mode.

    Example: a linear layer has the weight 2. With all gates open it reads 1 and gives 2; gated, it reads 0.5 and
    gives 1. Its weight moves towards 4, which gives 2 again; the ridge keeps it a little nearer to 2.

    Grouped convolutions keep their weights, and so do layers that are called more than once and frozen ones
    (`requires_grad=False`); BN statistics stay.

    Args:
        gated: from `retrofit`, its thresholds as they will be used.
        batches: normalised images, (B, C, H, W) each; all are held in memory at once.
        on_progress: called after each node.

    Returns:
        How many layers were reconstructed.
    """
    gated.eval()
    images = list(batches)
    if isinstance(gated, fx.GraphModule):
        steps = len(gated.graph.nodes)
        return _reconstruct_part(gated, images, images, lambda done: on_progress(Progress("reconstruct", done, steps)))
    parts = parts_of(gated)
    with opened_gates(gated):
        originals = [inputs_of(gated, x) for x in images]
    reconstructed = 0
    for done, (path, part) in enumerate(parts.items(), 1):
        wanted = [given[path] for given in originals if path in given]
        actual = [given[path] for given in (inputs_of(gated, x) for x in images) if path in given]
        if wanted and len(actual) == len(wanted):  # Python around a part may leave it out for some images
            same = all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))
            reconstructed += _reconstruct_part(part, wanted, wanted if same else actual)
        on_progress(Progress("reconstruct", done, len(parts)))
    return reconstructed


def _reconstruct_part(
    gated: fx.GraphModule, wanted: list[Tensor], actual: list[Tensor], tell: Callable[[int], None] = lambda done: None
) -> int:
    """Reconstruct the layers of one graph.

    Args:
        wanted: what the graph is given in the original, by batch.
        actual: what it is given now; the same list where that is the same.
        tell: called with the number of each node.
    """
    runs = _Runs(gated, wanted, actual)
    calls = call_counts(gated)
    reconstructed = 0
    for done, node in enumerate(gated.graph.nodes, 1):
        tell(done)
        if node.op == "output":
            break
        changed = runs.run_open(node)
        layer = module_of(gated, node)
        if changed and _can_be_reconstructed(node, layer) and calls[str(node.target)] == 1:
            _reconstruct_layer(gated, node, layer, runs)
            reconstructed += 1
        runs.run_gated(node, changed)
    return reconstructed


class _Runs:
    """The values of both runs, batch by batch, for as long as a later node reads them."""

    def __init__(self, gated: fx.GraphModule, wanted: list[Tensor], given: list[Tensor]) -> None:
        self.gated, self.wanted, self.given = gated, wanted, given
        self.interpreter = fx.Interpreter(gated)
        self.open: dict[fx.Node, list[Any]] = {}
        self.actual: dict[fx.Node, list[Any]] = {}
        """The same list as in `open` where no gate has changed anything yet."""
        self.read_last: dict[fx.Node, list[fx.Node]] = {}
        last = {source: node for node in gated.graph.nodes for source in (node, *_sources(node))}
        for source, node in last.items():
            self.read_last.setdefault(node, []).append(source)

    def run_open(self, node: fx.Node) -> bool:
        """Run a node as if all gates were open; return whether the gated run may give another value."""
        self.open[node] = [self._value(node, self.open, i) for i in range(len(self.given))]
        if node.op == "placeholder":
            return self.given is not self.wanted
        gate = isinstance(module_of(self.gated, node), Gate)
        return gate or any(self.open[n] is not self.actual[n] for n in node.all_input_nodes)

    def run_gated(self, node: fx.Node, changed: bool) -> None:
        """Run a node with the gates, if that differs, and drop what nobody reads any more."""
        self.actual[node] = self.open[node]
        if changed:
            values = [self._value(node, self.actual, i) for i in range(len(self.given))]
            if not isinstance(module_of(self.gated, node), Gate) or not _same(values, self.open[node]):
                self.actual[node] = values
        for done in self.read_last.get(node, ()):
            del self.open[done], self.actual[done]

    def _value(self, node: fx.Node, values: dict[fx.Node, list[Any]], i: int) -> Any:
        args: Any = fx.map_arg(node.args, lambda n: values[n][i])
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: values[n][i])
        if node.op == "placeholder":
            return (self.wanted if values is self.open else self.given)[i]
        module = module_of(self.gated, node)
        if isinstance(module, Gate) and values is self.open:
            return module.opened(args[0])
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)


def _sources(node: fx.Node) -> list[fx.Node]:
    """List what is read to run a node, or to reconstruct it: with its compensation, also what the gate read."""
    added = _added_compensation(node)
    return node.all_input_nodes + ([] if added is None else added.all_input_nodes[0].all_input_nodes)


def _added_compensation(node: fx.Node) -> fx.Node | None:
    """Find the compensation that is added to what a node gives."""
    return next((n.all_input_nodes[1] for n in node.users if n.target is add_compensation), None)


def _same(some: list[Any], others: list[Any]) -> bool:
    """Tell whether a gate gave the same in both runs."""
    pairs = ((a, b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True))
    return all(a is b or torch.equal(a, b) for a, b in pairs)


def _can_be_reconstructed(node: fx.Node, layer: nn.Module | None) -> bool:
    if not isinstance(layer, nn.Conv2d | nn.Linear) or "weight" not in layer._parameters:
        return False  # without a weight of its own it is computed from other parameters
    if not layer.weight.requires_grad and _added_compensation(node) is None:
        return False
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _reconstruct_layer(gated: fx.GraphModule, node: fx.Node, layer: Any, runs: _Runs) -> None:
    """Solve least squares on what is missing: weight += argmin |change . inputs - missing|^2 + prior |change|^2."""
    source = node.all_input_nodes[0]
    added = _added_compensation(node)
    compensation, kept = _compensation(gated, added, runs) if added is not None else (None, [])
    moves = layer.weight.requires_grad
    read = layer.weight[0].numel() if moves else 0
    size = read + (compensation.in_features if compensation is not None else 0)
    gram = torch.zeros(size, size, dtype=torch.float64, device=layer.weight.device)
    cross = torch.zeros(size, layer.weight.shape[0], dtype=torch.float64, device=layer.weight.device)
    images = sum(len(x) for x in runs.given)
    for i, x in enumerate(runs.actual[source]):
        missing = runs.open[node][i] - layer(x)
        inputs = [_inputs(layer, x)] if moves else []
        if compensation is not None:
            missing = add_compensation(missing, -compensation(kept[i]), 1 if isinstance(layer, nn.Conv2d) else -1)
        goal = missing.flatten(2) if isinstance(layer, nn.Conv2d) else _positions(missing)
        if compensation is not None:
            inputs.append(kept[i][:, :, None].expand(-1, -1, goal.shape[2]))
        rows, goals = torch.cat(inputs, 1).transpose(0, 1).flatten(1), goal.transpose(0, 1).flatten(1)
        if (every := rows.shape[1] // POSITIONS) > 1:
            rows, goals = rows[:, ::every], goals[:, ::every]
        gram += (rows @ rows.T).double()
        cross += (rows @ goals.T).double()
    gram.diagonal().mul_(1 + PRIOR_IMAGES / images).add_(1e-12 * gram.diagonal().max() + 1e-30)
    change = torch.linalg.solve(gram, cross).T.to(layer.weight.dtype)
    if moves:
        layer.weight.add_(change[:, :read].reshape(layer.weight.shape))
    if compensation is not None and added is not None:
        compensation.weight.add_(change[:, read:])
        runs.actual[added] = [compensation(k) for k in kept]  # what comes next must see the new one


def _compensation(gated: fx.GraphModule, added: fx.Node, runs: _Runs) -> tuple[nn.Linear, list[Tensor]]:
    """Find the compensation that `added` is the output of, and what it reads on each batch."""
    call = added.all_input_nodes[0]
    gate = module_of(gated, call)
    assert isinstance(gate, Gate) and gate.compensation is not None
    return gate.compensation, [gate.closed_predictions(x) for x in runs.actual[call.all_input_nodes[0]]]


def _inputs(layer: nn.Module, x: Tensor) -> Tensor:
    """Unfold what each output position reads: (B, inputs, positions)."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return _positions(x)


def _positions(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)
