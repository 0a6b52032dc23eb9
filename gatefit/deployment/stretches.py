"""What lies between a deployed network's blocks is dense: each stretch of it in the engine that is fastest here."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.nn.modules.conv import _ConvNd

from gatefit.deployment.dynamic import HOLDER
from gatefit.deployment.engines import Session, has_onnx, need_onnx
from gatefit.deployment.gathered import with_gathered_convs
from gatefit.deployment.native import torch_alone
from gatefit.deployment.tune import milliseconds
from gatefit.errors import DeployError
from gatefit.graph import module_of
from gatefit.tracer import WEIGHTED

TORCH, ONNX = "torch", "onnxruntime"


class TorchStretch(nn.Module):
    """A stretch in PyTorch, its convolutions by gatefit's own kernels; what they leave of it runs on one thread.

    Args:
        stretch: changed.
    """

    def __init__(self, stretch: fx.GraphModule) -> None:
        super().__init__()
        self.stretch = with_gathered_convs(stretch)
        self.heavy = any(isinstance(m, _ConvNd) for m in stretch.modules())
        """Whether PyTorch has convolutions left to run: all threads for these."""

    def forward(self, *inputs: Tensor) -> Any:
        """As the stretch."""
        with nullcontext() if self.heavy else torch_alone():
            return self.stretch(*inputs)


class OnnxStretch(nn.Module):
    """A stretch in ONNX Runtime, for batches of images of one size; others are run as given.

    Args:
        stretch: tensors to one tensor or several.
        inputs: float32, on the CPU, of a batch size above 1.

    Raises:
        DeployError: it cannot be exported.
    """

    def __init__(self, stretch: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        if not all(isinstance(t, Tensor) and t.dtype == torch.float32 for t in inputs):
            raise DeployError("a stretch takes something else than float32 tensors")
        self.stretch = stretch
        self.shapes = [t.shape[1:] for t in inputs]
        batch = torch.export.Dim("batch", min=1)
        try:
            program = torch.onnx.export(
                _Bare(stretch).eval(),
                inputs,
                dynamo=True,
                verbose=False,
                dynamic_shapes=(tuple({0: batch} for _ in inputs),),
            )
        except Exception as error:
            raise DeployError(f"the network cannot be exported to ONNX: {str(error).splitlines()[0]}") from error
        assert program is not None
        self.session = Session(program.model_proto.SerializeToString(), spins=False)

    def forward(self, *inputs: Tensor) -> Any:
        """As the stretch."""
        if [t.shape[1:] for t in inputs] != self.shapes:
            return self.stretch(*inputs)
        results = self.session.all(*inputs)
        return results if len(results) > 1 else results[0]


class _Bare(nn.Module):
    """Takes any number of tensors: what is exported needs no names."""

    def __init__(self, stretch: nn.Module) -> None:
        super().__init__()
        self.stretch = stretch

    def forward(self, *inputs: Tensor) -> Any:
        return self.stretch(*inputs)


@torch.no_grad()
def with_fast_stretches(
    deployed: fx.GraphModule, batches: Sequence[Tensor], engines: Sequence[str] | None = None
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Run each stretch by gatefit's own kernels, or where that is faster, by ONNX Runtime.

    Args:
        deployed: from `gatefit.deployment.dynamic.assemble`, on the CPU; changed.
        batches: (B, C, H, W) each, to time by.
        engines: of each stretch, where they were chosen before.

    Returns:
        The network, and the engine of each stretch: `TORCH` or `ONNX`.

    Raises:
        DeployError: `engines` names one that is not installed.
    """
    split = _split(deployed)
    seen = _inputs(split, batches)
    pairs = _inputs(split, [torch.cat([batches[0][:1]] * 2)])
    wanted = engines or [TORCH if not has_onnx() else ""] * len(seen)
    chosen = []
    for (name, given), engine in zip(seen.items(), wanted, strict=True):
        stretch = split.get_submodule(name)
        assert isinstance(stretch, fx.GraphModule)
        forms: dict[str, nn.Module] = {}
        if engine != ONNX:
            forms[TORCH] = TorchStretch(copy.deepcopy(stretch))
        if engine != TORCH:
            need_onnx()
            forms |= _in_onnx(stretch, pairs[name][0])
        times = milliseconds(list(forms.values()), given) if len(forms) > 1 else [0.0]
        chosen.append(min(zip(times, forms, strict=True))[1])
        split.set_submodule(name, forms[chosen[-1]])
    for name, part in list(split.named_children()):
        if isinstance(part, fx.GraphModule) and not any(n.startswith(HOLDER) for n, _ in part.named_children()):
            split.set_submodule(name, TorchStretch(part))
    return split, tuple(chosen)


def _in_onnx(stretch: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[str, nn.Module]:
    """By its engine's name; empty where it cannot be exported."""
    try:
        return {ONNX: OnnxStretch(stretch, inputs)}
    except DeployError:
        return {}


def _split(deployed: fx.GraphModule) -> fx.GraphModule:
    """Each stretch as one module, between blocks."""
    parts: dict[fx.Node, int] = {}
    number = 0
    for node in deployed.graph.nodes:
        block = str(node.target).startswith(f"{HOLDER}.")
        number += block
        parts[node] = number
        number += block
    return split_module(deployed, deployed, parts.__getitem__)


def _inputs(split: fx.GraphModule, images: Sequence[Tensor]) -> dict[str, list[tuple[Any, ...]]]:
    """What each stretch is given for each of `images`."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for image in images:
        interpreter = fx.Interpreter(split, garbage_collect_values=False)
        interpreter.run(image)
        for node in split.graph.nodes:
            part = module_of(split, node)
            if isinstance(part, fx.GraphModule) and any(isinstance(m, WEIGHTED) for m in part.children()):
                given = fx.map_arg(node.args, interpreter.env.__getitem__)
                found.setdefault(str(node.target), []).append(given)
    return found
