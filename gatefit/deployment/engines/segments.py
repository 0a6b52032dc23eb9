"""Runs what lies between a deployed network's blocks, which is dense: each segment in its fastest engine."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.nn.modules.conv import _ConvNd

from gatefit.deployment.dynamic import DynamicBlock
from gatefit.deployment.engines.chain import ChainBlocks
from gatefit.deployment.engines.gathered import GatheredBlock
from gatefit.deployment.engines.join import join_chains
from gatefit.deployment.engines.onnx import Session, export, has_onnx, need_onnx
from gatefit.deployment.kernels.native import torch_alone
from gatefit.deployment.tune import milliseconds
from gatefit.errors import DeployError
from gatefit.graph.trace import module_of
from gatefit.graph.tracer import WEIGHTED

TORCH, ONNX = "torch", "onnxruntime"


class TorchSegment(nn.Module):
    """Runs a segment in PyTorch; what gatefit's own kernels leave of it runs on one thread."""

    def __init__(self, segment: fx.GraphModule) -> None:
        super().__init__()
        self.segment = segment
        self.heavy = any(isinstance(m, _ConvNd) for m in segment.modules())
        """Whether PyTorch has convolutions left to run: all threads for these."""

    def forward(self, *inputs: Tensor) -> Any:
        """Run the segment."""
        with nullcontext() if self.heavy else torch_alone():
            return self.segment(*inputs)


class OnnxSegment(nn.Module):
    """Runs a segment in ONNX Runtime, for batches of images of one size; other sizes run in PyTorch.

    Args:
        segment: from tensors to one tensor or several.
        inputs: float32, on the CPU, of a batch size above 1.
        content: the segment as an ONNX file, where it was exported before.

    Raises:
        DeployError: it cannot be exported.
    """

    def __init__(self, segment: fx.GraphModule, inputs: tuple[Tensor, ...], content: bytes | None = None) -> None:
        super().__init__()
        if not all(isinstance(t, Tensor) and t.dtype == torch.float32 for t in inputs):
            raise DeployError("a segment takes something else than float32 tensors")
        self.segment = segment
        self.shapes = [t.shape[1:] for t in inputs]
        if content is None:
            batch = torch.export.Dim("batch", min=1)
            content = export(_Bare(segment).eval(), inputs, dynamic_shapes=(tuple({0: batch} for _ in inputs),))
        self.content = content
        self.session = Session(content, spins=False)

    def forward(self, *inputs: Tensor) -> Any:
        """Run the segment."""
        if [t.shape[1:] for t in inputs] != self.shapes:
            return self.segment(*inputs)
        results = self.session.all(*inputs)
        return results if len(results) > 1 else results[0]


class _Bare(nn.Module):
    """Takes any number of tensors: what is exported needs no names."""

    def __init__(self, segment: nn.Module) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, *inputs: Tensor) -> Any:
        return self.segment(*inputs)


@torch.no_grad()
def with_fast_segments(
    deployed: fx.GraphModule,
    batches: Sequence[Tensor],
    engines: Sequence[str] | None = None,
    contents: Sequence[bytes] = (),
) -> tuple[fx.GraphModule, tuple[str, ...], tuple[bytes, ...]]:
    """Run each segment by gatefit's own kernels, in one call with the blocks around it; or by ONNX Runtime if faster.

    Args:
        deployed: from `gatefit.deployment.dynamic.assemble`, on the CPU; changed.
        batches: (B, C, H, W) each, to time by.
        engines: of each segment, where they were chosen before.
        contents: the ONNX files of those that ONNX Runtime runs, where they were exported before.

    Returns:
        The network; the engine of each segment, `TORCH` or `ONNX`; and the ONNX files of the latter.

    Raises:
        DeployError: `engines` names one that is not installed.
    """
    split = _split(deployed)
    seen = _inputs(split, batches)
    pairs = _inputs(split, [torch.cat([batches[0][:1]] * 2)])
    wanted = engines or [TORCH if not has_onnx() else ""] * len(seen)
    chosen, exported, known = [], [], list(contents)
    for (name, given), engine in zip(seen.items(), wanted, strict=True):
        if engine == TORCH:
            chosen.append(TORCH)
            continue
        need_onnx()
        segment = split.get_submodule(name)
        assert isinstance(segment, fx.GraphModule)
        forms: dict[str, nn.Module] = {}
        if engine != ONNX:
            forms[TORCH] = TorchSegment(join_chains(copy.deepcopy(segment)))
        forms |= _in_onnx(segment, pairs[name][0], known.pop(0) if known else None)
        times = milliseconds(list(forms.values()), given) if len(forms) > 1 else [0.0]
        chosen.append(min(zip(times, forms, strict=True))[1])
        best = forms[chosen[-1]]
        if isinstance(best, OnnxSegment):
            split.set_submodule(name, best)
            exported.append(best.content)
    joined = _split(join_chains(_inlined(split)))
    for name, part in joined.named_children():
        if isinstance(part, fx.GraphModule) and not any(isinstance(m, _RUNS) for m in part.modules()):
            joined.set_submodule(name, TorchSegment(part))
    return joined, tuple(chosen), tuple(exported)


def _in_onnx(segment: fx.GraphModule, inputs: tuple[Any, ...], content: bytes | None) -> dict[str, nn.Module]:
    """Export a segment; give it by its engine's name, nothing where it cannot be exported."""
    try:
        return {ONNX: OnnxSegment(segment, inputs, content)}
    except DeployError:
        return {}


_RUNS = (ChainBlocks, GatheredBlock, DynamicBlock, OnnxSegment)
"""What runs by itself; a segment is all that lies between two of these."""


def _split(network: fx.GraphModule) -> fx.GraphModule:
    """Split a network into segments, and the blocks that run by themselves between them."""
    parts: dict[fx.Node, int] = {}
    number = 0
    for node in network.graph.nodes:
        runs = isinstance(module_of(network, node), _RUNS)
        number += runs
        parts[node] = number
        number += runs
    return split_module(network, network, parts.__getitem__)


def _inlined(split: fx.GraphModule) -> fx.GraphModule:
    """Undo `_split`, in place."""
    graph = split.graph
    for node in list(graph.nodes):
        part = module_of(split, node)
        if not isinstance(part, fx.GraphModule):
            continue
        inputs = [n for n in part.graph.nodes if n.op == "placeholder"]
        copied = dict(zip(inputs, node.args, strict=True))
        with graph.inserting_before(node):
            result = graph.graph_copy(part.graph, copied)
        for inner in part.graph.nodes:
            if inner.op in ("call_module", "get_attr"):
                copied[inner].target = f"{node.target}.{inner.target}"
        if isinstance(result, tuple):
            for user in list(node.users):
                user.replace_all_uses_with(result[user.args[1]])
                graph.erase_node(user)
        else:
            node.replace_all_uses_with(result)
        graph.erase_node(node)
    split.recompile()
    return split


def _inputs(split: fx.GraphModule, images: Sequence[Tensor]) -> dict[str, list[tuple[Any, ...]]]:
    """Run the network, and note what each segment is given for each of `images`."""
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
