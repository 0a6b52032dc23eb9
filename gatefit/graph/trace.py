"""Trace a network into a torch.fx graph that is safe to analyse and to rewrite."""

import copy
import inspect
import operator
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatefit.errors import ConversionError, UntraceableError, first_line
from gatefit.graph.accept import check_copyable, check_hooks
from gatefit.graph.call import call_of, with_call
from gatefit.graph.example import Example, named_inputs, on_meta
from gatefit.graph.network import RewrittenNetwork
from gatefit.graph.tracer import ShapeTracer

Network = TypeVar("Network", bound=nn.Module)
_OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    F.relu_: F.relu,
    torch.relu_: F.relu,
}


def trace(model: nn.Module, example: Example | None = None) -> fx.GraphModule:
    """Return a traced deep copy of `model`: out-of-place, without dead nodes, with all original state.

    Every tensor node carries `meta["shape"]` (torch.Size, for the batch size of `example`) when an
    example is given. The copy has the weights, buffers and train/eval mode of `model`.

    Args:
        model: any module that torch.fx can trace; untouched.
        example: what it is called with; only shapes and dtypes are used, and floats count as of the network's dtype.

    Raises:
        ConversionError: the network cannot be traced, or does not take the example.
    """
    if _is_variadic(model) and (example is None or isinstance(example, Tensor)):
        model = _with_one_input(model, example)
    modes = {name: module.training for name, module in model.named_modules()}
    inputs = None if example is None else named_inputs(model, on_meta(model, example))
    tracer = ShapeTracer(inputs)
    check_copyable(model)
    check_hooks(model, tracer.is_leaf_module)
    analysed = out_of_place(_on_meta(model))
    try:
        graph = tracer.trace(analysed, concrete_args=_defaults(model, inputs))
    except ConversionError:
        raise
    except Exception as error:
        raise UntraceableError(
            f"{type(model).__name__} cannot be traced by torch.fx{_where(error)}: {first_line(error)}{_advice(error)}"
        ) from error
    root = out_of_place(copy.deepcopy(model))
    _take_constants(graph, analysed, root)
    _drop_frozen_inputs(graph, inputs)
    _functionalise(graph)
    traced = RewrittenNetwork(root, graph, class_name=type(model).__name__)
    traced.graph.eliminate_dead_code()
    _modularise_dropout(traced)
    _keep_unused_state(traced, root)
    traced.recompile()
    for name, module in traced.named_modules():  # one by one: parts of a network may be frozen in eval mode
        module.training = modes.get(name, model.training)
    return traced


def _where(error: BaseException) -> str:
    """Name the line of the network's own code at which tracing ended."""
    frames = traceback.extract_tb(error.__traceback__)
    homes = (Path(torch.__file__).parent, Path(__file__).parents[1])
    own = [f for f in frames if f.line and not any(home in Path(f.filename).parents for home in homes)]
    return f" at {Path(own[-1].filename).name}, line {own[-1].lineno} (`{own[-1].line}`)" if own else ""


def _advice(error: BaseException) -> str:
    """Say what to do about code that hangs on values in a tensor."""
    hangs = isinstance(error, fx.proxy.TraceError) or "or a real number, not '_Shaped" in str(error)
    return "; what runs must not hang on values in a tensor: use torch.where, or decide by shapes" if hangs else ""


def out_of_place(network: Network) -> Network:
    """Let no module of `network` write into what it reads; return it."""
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    return network


def _on_meta(network: Network) -> Network:
    """Make a deep copy on the meta device, without copying the weights first."""
    replaced: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        replaced[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(network, replaced)


def propagate_shapes(traced: fx.GraphModule, example: Tensor) -> None:
    """Run `traced` on the meta device, or where values decide on its own, and note each tensor's `meta["shape"]`."""
    try:
        try:
            shapes = _ShapeInterpreter(_on_meta(traced).eval())
            shapes.run(torch.empty_like(example, device="meta"))
        except Exception:
            shapes = _ShapeInterpreter(copy.deepcopy(traced).eval())
            device = next(traced.parameters()).device
            with torch.no_grad():
                shapes.run(torch.zeros(example.shape, dtype=example.dtype, device=device))
    except Exception as error:
        raise ConversionError(
            f"the network does not take an input of shape {tuple(example.shape)}: {first_line(error)}; "
            "pass an example of the size that it was built for"
        ) from error
    for node in traced.graph.nodes:
        if node.name in shapes.found:
            node.meta["shape"] = shapes.found[node.name]


class _ShapeInterpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n.name] = value.shape
        return value


def shape_of(node: object) -> torch.Size | None:
    """Give the shape of a node's tensor value, or None where it is no tensor."""
    return node.meta.get("shape") if isinstance(node, fx.Node) else None


def module_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Give the module that a call_module node calls, else None."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def call_counts(traced: fx.GraphModule) -> Counter[str]:
    """Count how often each module is called, by its qualified name; what reads the same parameters counts as a call."""
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    parameters = {name: list(traced.get_submodule(name).parameters()) for name in calls}
    reads = Counter(id(p) for name, count in calls.items() for p in parameters[name] for _ in range(count))
    for node in traced.graph.find_nodes(op="get_attr"):
        reads[id(operator.attrgetter(str(node.target))(traced))] += 1
    return Counter({name: max([n, *(reads[id(p)] for p in parameters[name])]) for name, n in calls.items()})


def reads_size(node: fx.Node) -> bool:
    """Tell whether a node asks a tensor for its size only, not for its values."""
    return node.target in (getattr, "size", "dim") and shape_of(node) is None


def path_of(node: fx.Node) -> str:
    """Give the qualified name of the innermost module in whose forward the node was recorded; '' at the root."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack))) if stack else ""


def _is_variadic(model: nn.Module) -> bool:
    """Tell whether forward takes any number of inputs, as in `forward(self, x, *args, **kwargs)`."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for p in parameters)


def _with_one_input(model: nn.Module, example: Tensor | None) -> nn.Module:
    """Let a network of any number of inputs take one, where it can be called so."""
    call = call_of(model, (torch.zeros(1) if example is None else example,), {})
    return model if call is None else with_call(model, call[0])


def _defaults(root: nn.Module, inputs: dict[str, Any] | None) -> dict[str, Any]:
    """Bake in the default of every argument of forward that is no input; of unknown inputs there is one, the first."""
    parameters = list(inspect.signature(root.forward).parameters.values())
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = {p.name for p in parameters[:1]} if inputs is None else inputs.keys()
    named = [p for p in parameters if p.kind not in variadic and p.name not in given]
    needed = [p.name for p in named if p.default is inspect.Parameter.empty]
    if needed:
        raise ConversionError(
            f"{type(root).__name__} takes more than one input ({', '.join(needed)}); pass an example of all: a "
            "tuple, or a dictionary by their names"
        )
    return {p.name: p.default for p in named}


def _take_constants(graph: fx.Graph, analysed: nn.Module, root: nn.Module) -> None:
    """Keep tensors that forward made out of nothing with the network."""
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name.startswith("_tensor_constant") and not hasattr(root, name):
            value = getattr(analysed, name)
            if value.is_meta:
                raise ConversionError(f"'{node.name}' is computed from weights in a way that torch.fx does not see")
            setattr(root, name, value)


def _drop_frozen_inputs(graph: fx.Graph, inputs: dict[str, Any] | None) -> None:
    """Erase the placeholders that concrete_args leave behind, with a check each."""
    placeholders = graph.find_nodes(op="placeholder")
    names = {str(placeholders[0].target)} if inputs is None else inputs.keys()
    frozen = {n for n in placeholders if str(n.target).lstrip("*") not in names}
    for node in graph.nodes:
        if any(i in frozen for i in node.all_input_nodes):
            frozen.add(node)
    for node in reversed(graph.nodes):
        if node in frozen:
            graph.erase_node(node)


def _functionalise(graph: fx.Graph) -> None:
    """Replace in-place operations by their plain forms; later readers of the target read the result."""
    for node in list(graph.nodes):
        if node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
            if not hasattr(Tensor, str(node.target)[:-1]):
                raise ConversionError(f"'{node.name}' writes into a tensor ({node.target}), which a graph cannot hold")
            node.target = str(node.target)[:-1]
        elif node.op == "call_function" and node.target in _OUT_OF_PLACE:
            node.target = _OUT_OF_PLACE[node.target]
        elif node.op == "call_function" and node.kwargs.get("inplace") is True:
            node.kwargs = {**node.kwargs, "inplace": False}
        else:
            continue
        target = node.args[0]
        if isinstance(target, fx.Node):
            later = {n for n in graph.nodes if node < n}
            target.replace_all_uses_with(node, delete_user_cb=lambda n: n in later)  # noqa: B023


def _modularise_dropout(traced: fx.GraphModule) -> None:
    """Give F.dropout(x, p, self.training), frozen at tracing, a module, which follows train()."""
    modules = {F.dropout: nn.Dropout, F.dropout2d: nn.Dropout2d, F.alpha_dropout: nn.AlphaDropout}
    for node in list(traced.graph.nodes):
        if node.op != "call_function" or node.target not in modules:
            continue
        p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        name = f"{node.name}_module"
        traced.add_submodule(name, modules[node.target](float(p)))
        with traced.graph.inserting_after(node):
            replacement = traced.graph.call_module(name, (node.args[0],))
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        traced.graph.erase_node(node)


def _keep_unused_state(traced: fx.GraphModule, root: nn.Module) -> None:
    """Keep the state that the graph does not use, which a GraphModule drops, so that the keys stay the same."""
    held = {*dict(traced.named_parameters(remove_duplicate=False)), *dict(traced.named_buffers(remove_duplicate=False))}
    for owner_name, owner in root.named_modules(remove_duplicate=False):
        own = [*owner._parameters.items(), *owner._buffers.items()]
        for name, value in own:
            path = f"{owner_name}.{name}" if owner_name else name
            if value is None or path in held:
                continue
            target: nn.Module = traced
            for part in owner_name.split(".") if owner_name else []:
                if not hasattr(target, part):
                    target.add_module(part, nn.Module())
                target = getattr(target, part)
            if isinstance(value, nn.Parameter):
                target.register_parameter(name, value)
            else:
                target.register_buffer(name, value, name not in owner._non_persistent_buffers_set)
