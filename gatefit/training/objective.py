"""What a network learns from: labels, and the original network's predictions and outputs of its blocks.

Predictions on images that the original has learnt by heart say little; what each block gives at each position says
much, and where gates close is where it goes wrong (FitNets, arXiv 1412.6550).
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatefit.errors import ConversionError
from gatefit.gating.gates import gates_of, is_gate_key
from gatefit.gating.info import info_of
from gatefit.graph.fold import fold_batch_norms
from gatefit.graph.partial import traced_forwards
from gatefit.inputs.models import logits_of
from gatefit.recipe import DistillationPart

COMPARED = 9
"""At most so many blocks are compared, evenly spaced up to the last: of more each is a little further, at the same
guidance, and comparing costs time."""


class Objective(nn.Module):
    """The loss of a network on a batch but for the penalty: one module, so that one compilation serves all of it.

    Args:
        network: the one that learns; its modules are shared.
        teacher: the original; None: labels alone.
        settings: weights of the terms.
        labelled: whether labels mean anything; if not, distillation has the whole weight.
    """

    def __init__(
        self, network: nn.Module, teacher: "Teacher | None", settings: DistillationPart, labelled: bool
    ) -> None:
        super().__init__()
        self.student = with_outputs_of(network, teacher.blocks if teacher is not None else ())
        self.teacher = teacher
        self.settings = settings
        self.weight = 0.0 if teacher is None else settings.weight if labelled else 1.0

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss, a scalar, and the predictions, (B, classes), for images (B, C, H, W) and labels (B,)."""
        result, outputs = self.student(x)
        logits = logits_of(result)
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.weight < 1:
            loss = loss + (1 - self.weight) * F.cross_entropy(logits.float(), labels)
        if self.teacher is not None and (self.weight > 0 or self.teacher.blocks):
            with torch.no_grad():
                wanted, wanted_outputs = self.teacher(x)
            if self.weight > 0:
                loss = loss + self.weight * distillation(logits.float(), wanted.float(), self.settings.temperature)
            if wanted_outputs:
                loss = loss + self.settings.feature_weight * feature_distance(outputs, wanted_outputs)
        return loss, logits


class Teacher(nn.Module):
    """A fast copy of the original, for inference only.

    Args:
        original: the network to learn from.
        student: the network that learns.
        features: whether to ask for outputs of blocks too; only a gated student of that very network can be
            compared with them, others learn from predictions alone (`blocks` is then empty).
    """

    def __init__(self, original: nn.Module, student: nn.Module, features: bool) -> None:
        super().__init__()
        self.blocks: tuple[str, ...] = ()
        try:
            if traced_forwards(student):  # what cannot be traced is not fast either
                raise ConversionError("the original cannot be traced as a whole")
            shape = info_of(student).input.shape if isinstance(student, fx.GraphModule) else None
            self.network: nn.Module = fold_batch_norms(original, None if shape is None else torch.zeros(2, *shape))
            if features and isinstance(student, fx.GraphModule) and _is_original(original, student):
                shown = tuple(gate.of.add for gate in gates_of(student).values() if gate.of.add)
                self.blocks = shown[:: -math.ceil(len(shown) / COMPARED)][::-1] if shown else ()
            self.network = with_outputs_of(self.network, self.blocks)
        except ConversionError:
            self.network = _PredictionsOnly(copy.deepcopy(original))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, whatever mode the network that learns is in."""
        return super().train(False)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Predictions, (B, classes), and the outputs of `blocks`, (B, ...) each."""
        result, outputs = self.network(x)
        return logits_of(result), outputs


class _PredictionsOnly(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        return self.network(x), ()


def with_outputs_of(network: nn.Module, blocks: tuple[str, ...]) -> nn.Module:
    """Make a network that shares the modules of `network` and returns its result and the values of some nodes."""
    if not isinstance(network, fx.GraphModule):
        return _PredictionsOnly(network)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(network.graph, copied)
    by_name = {node.name: new for node, new in copied.items()}
    graph.output((result, tuple(by_name[name] for name in blocks)))
    return fx.GraphModule(network, graph)


def distillation(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Compute the KL divergence to the teacher's softened predictions, times T^2 (Hinton et al., arXiv 1503.02531)."""
    student = F.log_softmax(logits / temperature, 1)
    teacher = F.log_softmax(wanted / temperature, 1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def feature_distance(outputs: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> Tensor:
    """Mean over blocks and images of the squared error of a block's output, in units of the wanted one's variance."""
    errors = []
    for mine, theirs in zip(outputs, wanted, strict=True):
        goal = theirs.float()
        axes = tuple(range(1, goal.dim()))  # reduced as they lie: to flatten them would copy
        variance = goal.square().mean(axes) - goal.mean(axes).square()
        errors.append((mine.float() - goal).square().mean(axes) / (variance + 1e-6))
    return torch.stack(errors).mean()


def _is_original(original: nn.Module, gated: nn.Module) -> bool:
    shapes = {k: v.shape for k, v in original.state_dict().items()}
    return shapes == {k: v.shape for k, v in gated.state_dict().items() if not is_gate_key(k)}
