"""A deployed network as one ONNX file: a nest of `If` for each block, the weights of each variant constants within it.

The network is cut into parts (what lies between blocks; each block's gates; each entry of each codebook). All parts
are exported at once, as one graph without connections, and put together by the names of their values.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper
from torch import Tensor, fx, nn

from gatefit.deployment.dynamic import DynamicBlock
from gatefit.errors import DeployError, first_line
from gatefit.graph.edit import extract_subgraph
from gatefit.graph.trace import module_of

INPUT, OUTPUT = "image", "logits"
_KINDS = ("runs", "fits", "whole", "channel", "closed_predictions")


@torch.no_grad()
def blocks_to_onnx(blocks: list[DynamicBlock], inputs: list[tuple[Tensor, Tensor]]) -> list[ModelProto]:
    """Make a file for each block alone: inputs "x" and "shortcut", of the shapes of `inputs`, batch size 1."""
    choices = [_Choice("sum", b, ("x", "shortcut"), *given) for b, given in zip(blocks, inputs, strict=True)]
    _export([part for choice in choices for part in choice.parts()])
    models = []
    for choice, given in zip(choices, inputs, strict=True):
        sources = [
            helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, list(t.shape))
            for n, t in zip(("x", "shortcut"), given, strict=True)
        ]
        models.append(_model(choice.assembled(), sources, choice.result("sum"), choice.gates.opset))
    return models


@torch.no_grad()
def to_onnx(deployed: fx.GraphModule, image: Tensor) -> ModelProto:
    """Build the file for images one at a time, (1, C, H, W) float32 -> (1, classes).

    Args:
        deployed: from `gatefit.deployment.dynamic.assemble`.
        image: of the shape that the file will take.

    Raises:
        DeployError: a part of the network cannot be exported.
    """
    steps = list(_steps(deployed, image))
    _export([part for step in steps for part in step.parts()])
    whole = _Piece()
    for step in steps:
        whole += step.assembled()
    result = next(p for p in steps[-1].parts() if OUTPUT in p.outputs)
    source = helper.make_tensor_value_info(INPUT, onnx.TensorProto.FLOAT, list(image.shape))
    return _model(whole, [source], result.info(OUTPUT), steps[0].parts()[0].opset)


def _model(whole: "_Piece", inputs: list[ValueInfoProto], output: ValueInfoProto, opset: int) -> ModelProto:
    graph = helper.make_graph(whole.nodes, "gatefit", inputs, [output], whole.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model)
    return model


@dataclass
class _Piece:
    """Nodes of an ONNX graph and the constants that they read."""

    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def __iadd__(self, other: "_Piece") -> "_Piece":
        self.nodes += other.nodes
        self.constants += other.constants
        return self


@dataclass
class _Part:
    """A part of the network and the names that its values have in the whole."""

    module: nn.Module
    examples: list[Tensor]
    inputs: list[str]
    outputs: list[str]
    results: list[Tensor] = field(default_factory=list)
    piece: _Piece = field(default_factory=_Piece)
    opset: int = 0

    def parts(self) -> list["_Part"]:
        return [self]

    def assembled(self) -> _Piece:
        return self.piece

    def info(self, name: str) -> ValueInfoProto:
        """Give type and shape of an output."""
        value = self.results[self.outputs.index(name)]
        kind = onnx.TensorProto.BOOL if value.dtype == torch.bool else onnx.TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, list(value.shape))

    def graph(self) -> GraphProto:
        """Make the graph that is a branch of an `If`."""
        return helper.make_graph(
            self.piece.nodes, self.outputs[0], [], [self.info(self.outputs[0])], self.piece.constants
        )


class _Choice:
    """The parts of one dynamic block, and the `If`s that choose among them."""

    def __init__(self, name: str, block: DynamicBlock, sources: tuple[str, str], x: Tensor, shortcut: Tensor) -> None:
        given = dict(zip(_KINDS, block.saliences(x), strict=True))
        passed = {k: v for k, v in given.items() if k in _KINDS[2:] and v is not None}
        self.name = name
        self.runs = f"{name}/runs" if given["runs"] is not None else ""
        count = len(block.variants)
        self.fits = [f"{name}/fits{i}" for i in range(count - 1)]
        outputs = [self.runs] if self.runs else []
        self.gates = _Part(_Gates(block), [x], [sources[0]], [*outputs, *(f"{name}/{k}" for k in passed), *self.fits])
        self.variants = [
            _Part(
                _Way(block, i, list(passed)),
                [x, shortcut, *passed.values()],
                [*sources, *(f"{name}/{k}" for k in passed)],
                [f"{name}/way{i}" if self.runs or count > 1 else name],
            )
            for i in range(count)
        ]
        self.skipped = _Part(_Skipped(block), [shortcut], [sources[1]], [f"{name}/skipped"])

    def parts(self) -> list[_Part]:
        return [self.gates, *self.variants, *([self.skipped] if self.runs else [])]

    def assembled(self) -> _Piece:
        piece = _Piece(list(self.gates.piece.nodes), list(self.gates.piece.constants))
        conditions = list(zip(self.fits, self.variants, strict=False))
        if not conditions and not self.runs:
            piece += self.variants[0].piece
            return piece
        graph = self.variants[-1].graph()
        for fits, variant in reversed(conditions):
            graph = self._if(fits, variant.graph(), graph)
        if self.runs:
            graph = self._if(self.runs, graph, self.skipped.graph())
        node = graph.node[0]
        node.output[0] = self.name
        piece.nodes.append(node)
        return piece

    def result(self, name: str) -> ValueInfoProto:
        """Give the result of the block under a name."""
        info = self.variants[0].info(self.variants[0].outputs[0])
        info.name = name
        return info

    def _if(self, condition: str, then: GraphProto, other: GraphProto) -> GraphProto:
        result = f"{condition}/chosen"
        node = helper.make_node("If", [condition], [result], then_branch=then, else_branch=other)
        return helper.make_graph([node], f"{condition}/graph", [], [self.result(result)])


class _Gates(nn.Module):
    def __init__(self, block: DynamicBlock) -> None:
        super().__init__()
        self.saliences = block.saliences

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        runs, fits, *rest = self.saliences(x)
        each = () if fits is None else fits.split(1, 1)
        return (*(t for t in (runs, *rest) if t is not None), *each)


class _Way(nn.Module):
    def __init__(self, block: DynamicBlock, index: int, passed: list[str]) -> None:
        super().__init__()
        self.variant, self.passed = block.variants[index], passed

    def forward(self, x: Tensor, shortcut: Tensor, *passed: Tensor) -> tuple[Tensor]:
        given = dict(zip(self.passed, passed, strict=True))
        return (self.variant(x, shortcut, *(given.get(k) for k in _KINDS[2:])),)


class _Skipped(nn.Module):
    def __init__(self, block: DynamicBlock) -> None:
        super().__init__()
        self.after = block.after

    def forward(self, shortcut: Tensor) -> tuple[Tensor]:
        return (self.after(shortcut),)


class _All(nn.Module):
    """All parts side by side."""

    def __init__(self, parts: list[_Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(p.module for p in parts)
        self.counts = [len(p.inputs) for p in parts]

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        start = 0
        for part, count in zip(self.parts, self.counts, strict=True):
            results += part(*values[start : start + count])
            start += count
        return tuple(results)


def _steps(deployed: fx.GraphModule, image: Tensor) -> Iterator[_Part | _Choice]:
    """Walk the network in order of execution: segments, and dynamic blocks between them."""
    interpreter = fx.Interpreter(deployed, garbage_collect_values=False)
    interpreter.run(image)
    values = interpreter.env
    names = {n: INPUT if n.op == "placeholder" else n.name for n in deployed.graph.nodes}
    result = next(n for n in deployed.graph.nodes if n.op == "output").args[0]
    if not isinstance(result, fx.Node) or not isinstance(values[result], Tensor):
        raise DeployError("the network does not return one tensor, which is all that a file can hold")
    names[result] = OUTPUT
    waiting: list[fx.Node] = []
    for node in deployed.graph.nodes:
        block = module_of(deployed, node)
        if isinstance(block, DynamicBlock):
            if waiting:
                yield _segment(deployed, waiting, values, names)
            waiting = []
            x, shortcut = (a for a in node.args if isinstance(a, fx.Node))
            yield _Choice(names[node], block, (names[x], names[shortcut]), values[x], values[shortcut])
        elif node.op not in ("placeholder", "output"):
            waiting.append(node)
    yield _segment(deployed, waiting, values, names)


def _segment(
    deployed: fx.GraphModule, nodes: list[fx.Node], values: dict[fx.Node, Any], names: dict[fx.Node, str]
) -> _Part:
    """Make a network of consecutive nodes; numbers that they read are those of the example."""
    inside = set(nodes)
    read = {source: values[source] for node in nodes for source in node.all_input_nodes if source not in inside}
    given = [source for source, value in read.items() if isinstance(value, Tensor)]
    outputs = [n for n in nodes if any(u not in inside for u in n.users) and isinstance(values[n], Tensor)]
    module = extract_subgraph(deployed, nodes, {**read, **{source: source.name for source in given}}, outputs)
    return _Part(module, [values[n] for n in given], [names[n] for n in given], [names[n] for n in outputs])


def _export(parts: list[_Part]) -> None:
    """Fill in what the exporter makes of each part."""
    for part in parts:
        part.results = list(part.module(*part.examples))
    inputs = [f"in/{i}/{j}" for i, p in enumerate(parts) for j in range(len(p.inputs))]
    outputs = [f"out/{i}/{j}" for i, p in enumerate(parts) for j in range(len(p.outputs))]
    examples = tuple(x.clone() for p in parts for x in p.examples)  # one tensor twice would become one input
    try:
        program = torch.onnx.export(
            _All(parts).eval(), examples, input_names=inputs, output_names=outputs, dynamo=True, verbose=False
        )
    except Exception as error:
        raise DeployError(f"the network cannot be exported to ONNX: {first_line(error)}") from error
    assert program is not None
    model = program.model_proto
    opset = next(o.version for o in model.opset_import if not o.domain)
    constants = {c.name: c for c in model.graph.initializer}
    for i, part in enumerate(parts):
        results = {f"out/{i}/{j}": name for j, name in enumerate(part.outputs)}
        names = results | {f"in/{i}/{j}": name for j, name in enumerate(part.inputs)}
        part.piece, part.opset = _extract(i, set(results), names, model.graph, constants), opset


def _extract(
    index: int, results: set[str], names: dict[str, str], graph: GraphProto, constants: dict[str, Any]
) -> _Piece:
    """Extract all that `results` are computed from; values are renamed by `names`, others get the part's number."""

    def renamed(values: Iterable[str]) -> list[str]:
        return [names.get(v, f"{index}:{v}" if v else "") for v in values]

    piece = _Piece()
    needed = set(results)
    for source in reversed(graph.node):
        if needed.isdisjoint(source.output):
            continue
        needed.update(source.input)
        node = NodeProto()
        node.CopyFrom(source)
        node.input[:], node.output[:] = renamed(source.input), renamed(source.output)
        node.name = f"{index}:{node.name}"
        piece.nodes.insert(0, node)
    for name in needed & constants.keys():
        constant = onnx.TensorProto()
        constant.CopyFrom(constants[name])
        constant.name = renamed([name])[0]
        piece.constants.append(constant)
    return piece
