"""Trace the largest parts of a network whose forward cannot be traced as a whole.

The network stays as it is, with its classes, attributes and hooks. A part is one of its submodules, whose forward is
replaced by its graph. What the Python around a part gives it is seen by running the example through the network.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from gatefit.errors import ConversionError, GatefitError, first_line
from gatefit.graph.blocks import FoundBlocks, ResidualBlock, Skipped
from gatefit.graph.call import Call, call_of, same_but, with_call
from gatefit.graph.macs import module_macs
from gatefit.graph.pairs import find_gatable
from gatefit.graph.trace import out_of_place, trace
from gatefit.graph.tracer import WEIGHTED
from gatefit.mode import evaluating


class TracedForward:
    """Stands in for the forward of a part: runs its graph on the part's own modules.

    Args:
        name: of the part in its network.
        module: the part; holds all that the graph calls and reads.
        graph: takes one tensor.
        call: how the part is called.
    """

    def __init__(self, name: str, module: nn.Module, graph: fx.Graph, call: Call) -> None:
        self.name, self.module, self.graph, self.call = name, module, graph, call
        self.instead: Callable[[Tensor], Any] | None = None
        """Runs in place of the graph, while a measurement is under way."""
        self.calls: int | None = None
        """In the forward of the network that is under way; None: none is."""
        self._function: Callable[[nn.Module, Tensor], Any] | None = None
        """Made of the graph at the first call: while it is copied, the module is not whole."""

    @property
    def __signature__(self) -> inspect.Signature:
        return self.call.signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the part as its own forward would.

        Raises:
            GatefitError: with other arguments than at the conversion, or for the second time for one batch.
        """
        if self.calls is not None:
            self.calls += 1
            if self.calls > 1:
                raise GatefitError(
                    f"{self.name} runs more than once for a batch, which its gates cannot count; at the conversion it "
                    "ran once"
                )
        x = self.call.tensor(self.name, args, kwargs)
        if self.instead is not None:
            return self.instead(x)
        if self._function is None:
            self._function = type(self.view()).forward
        return self._function(self.module, x)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedForward":
        module, graph = copy.deepcopy(self.module, memo), copy.deepcopy(self.graph)
        return TracedForward(self.name, module, graph, self.call)

    def __reduce__(self) -> Any:
        raise GatefitError("a network that was traced in parts cannot be pickled; call gatefit.save(gated, folder)")

    def view(self) -> fx.GraphModule:
        """Return the part as a traced network, which shares its modules."""
        return fx.GraphModule(self.module, self.graph)


@dataclass(frozen=True)
class TracedPart:
    """A submodule that can be traced, and the blocks in it."""

    path: str
    """Its qualified name in the network."""
    traced: fx.GraphModule
    """A copy of it."""
    call: Call
    found: FoundBlocks
    """Names of blocks and layers are those of the network, names of nodes those of the part's graph."""


def parts_of(network: nn.Module) -> dict[str, fx.GraphModule]:
    """Return all traced graphs of a network by the names of their modules; '' alone where it was traced whole.

    They share their modules with the network. Changes of a graph itself have no effect on it.
    """
    if isinstance(network, fx.GraphModule):
        return {"": network}
    return {path: forward.view() for path, forward in traced_forwards(network).items()}


def traced_forwards(network: nn.Module) -> dict[str, TracedForward]:
    """Return the forwards that stand in for those of a network's parts, by the parts' names."""
    pairs = ((path, module.__dict__.get("forward")) for path, module in network.named_modules())
    return {path: forward for path, forward in pairs if isinstance(forward, TracedForward)}


def count_calls(network: nn.Module) -> None:
    """Let each part of `network` refuse to run twice in one forward: what its gates decide would be counted once."""
    network.register_forward_pre_hook(_begin)
    network.register_forward_hook(_end)


def _begin(network: nn.Module, args: Any) -> None:
    for forward in traced_forwards(network).values():
        forward.calls = 0


def _end(network: nn.Module, args: Any, output: Any) -> None:
    for forward in traced_forwards(network).values():
        forward.calls = None


def put_part(network: nn.Module, part: TracedPart) -> None:
    """Let a submodule of `network`, a copy of the original, run the graph of `part`; what is new in it comes along."""
    module = out_of_place(network.get_submodule(part.path))
    for name, child in part.traced.named_children():
        if name not in module._modules:
            module.add_module(name, child)
    for name, buffer in part.traced.named_buffers(recurse=False):
        if not hasattr(module, name):  # a constant that forward makes: it is made again when the network is built again
            module.register_buffer(name, buffer, persistent=False)
    module.forward = TracedForward(part.path, module, part.traced.graph, part.call)  # type: ignore[method-assign]


def trace_parts(model: nn.Module, example: Tensor) -> list[TracedPart]:
    """Trace the largest submodules of `model` that can be traced and hold a block.

    A part is called once for each image batch, with one tensor per image and constants. Its weights are used nowhere
    else.

    Args:
        model: untouched.
        example: input (B, C, H, W), of which random values of the same shape are made.

    Raises:
        ConversionError: the network does not take the example.
    """
    calls = _calls(model, example)
    private = _private(model)
    parts: list[TracedPart] = []
    names: set[str] = set()

    def visit(path: str, module: nn.Module) -> None:
        part = None
        if path in calls and path in private and not isinstance(module, WEIGHTED):
            part = _trace_part(path, module, *calls[path])
        if part is None:
            for name, child in module.named_children():
                visit(f"{path}.{name}" if path else name, child)
        elif part.found.blocks:
            parts.append(part)
            names.update(b.name for b in part.found.blocks)

    for name, child in model.named_children():
        visit(name, child)
    return parts


def blocks_of(parts: list[TracedPart], model: nn.Module, example: Tensor) -> FoundBlocks:
    """Join the blocks of all parts; MACs are those of the whole network, as the example runs it."""
    blocks = tuple(block for part in parts for block in part.found.blocks)
    skipped = tuple(s for part in parts for s in part.found.skipped)
    around = macs_around(model, {part.path for part in parts}, example)
    macs = around + sum(part.found.macs for part in parts)
    return FoundBlocks(blocks, skipped, macs, tuple(part.path for part in parts))


def inputs_of(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Run `network` on images and return what each of its parts is given; a part that does not run is left out."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for path, forward in traced_forwards(network).items():

        def note(_: nn.Module, args: Any, kwargs: Any, path: str = path, call: Call = forward.call) -> None:
            seen[path] = call.tensor(path, args, kwargs).detach()

        hooks.append(forward.module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def macs_around(network: nn.Module, parts: set[str], images: Tensor) -> int:
    """Count the MACs per image of the convolutions and linear layers that lie in no part, by running `network`."""
    macs = 0
    hooks = []

    def count(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal macs
        macs += module_macs(layer, args[0].shape, output.shape) * args[0].shape[0] // len(images)

    subject = copy.deepcopy(network)
    for path, module in subject.named_modules():
        if isinstance(module, WEIGHTED) and not any(_within(part, path) for part in parts):
            hooks.append(module.register_forward_hook(count))
    with torch.no_grad(), evaluating(subject), same_kernels():
        subject(images)
    return macs


@contextmanager
def same_kernels() -> Iterator[None]:
    """Let nn.TransformerEncoderLayer compute in eval mode as it does in training: its fast path cannot be traced."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _calls(model: nn.Module, example: Tensor) -> dict[str, tuple[Call, Tensor]]:
    """See how each submodule is called, and with which tensor; leave out those that cannot be parts.

    Two batches of other sizes tell which tensors have a row for each image.
    """
    batches = [_random(model, example, size) for size in (2, 3)]
    first, second = (_run_and_see(model, images) for images in batches)
    calls = {}
    for path, seen in first.items():
        again = second.get(path, [])
        if len(seen) != 1 or len(again) != 1:
            continue
        (call, x), (other, y) = seen[0], again[0]
        same = call is not None and call.shape == other.shape and same_but(call.index, call.leaves, other.leaves)
        if same and x.dim() > 1 and (len(x), len(y)) == (2, 3) and x.shape[1:] == y.shape[1:]:
            calls[path] = call, x
    return calls


def _run_and_see(model: nn.Module, images: Tensor) -> dict[str, list[tuple[Any, Any]]]:
    """Run a copy of the model, and return what each submodule was called with: None twice where it is no part."""
    subject = copy.deepcopy(model).eval()
    seen: dict[str, list[tuple[Any, Any]]] = {}
    for path, module in subject.named_modules():

        def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            seen.setdefault(path, []).append(call_of(module, args, kwargs) or (None, None))

        module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), torch.random.fork_rng(), same_kernels():
            subject(images)
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__} does not take an input of shape {tuple(images.shape)}: {first_line(error)}; "
            "pass an example of the size that it was built for"
        ) from error
    return seen


def _random(model: nn.Module, example: Tensor, size: int) -> Tensor:
    parameter = next(model.parameters())
    images = torch.randn(size, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    return images.to(parameter.device, parameter.dtype)


def _private(model: nn.Module) -> set[str]:
    """Name the submodules that share no weight or buffer with what lies outside of them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    holders: dict[int, set[str]] = {}
    for path, module in modules.items():
        for value in (*module._parameters.values(), *module._buffers.values()):
            if value is not None:
                holders.setdefault(id(value), set()).add(path)
    shared = [paths for paths in holders.values() if len(paths) > 1]
    return {p for p in modules if all(sum(_within(p, s) for s in paths) in (0, len(paths)) for paths in shared)}


def _within(path: str, inner: str) -> bool:
    return f"{inner}.".startswith(f"{path}.")


def _trace_part(path: str, module: nn.Module, call: Call, x: Tensor) -> TracedPart | None:
    """Trace a submodule; None where that fails, or where its graph gives something else than it does."""
    try:
        traced = trace(with_call(module, call), x)
        with torch.no_grad(), torch.random.fork_rng(), same_kernels():
            args, kwargs = call.arguments(x)
            wanted, shape = tree_flatten(copy.deepcopy(module).eval()(*args, **kwargs))
            mine, my_shape = tree_flatten(copy.deepcopy(traced).eval()(x))
        found = find_gatable(traced)
    except Exception:  # the code of a stranger in the hands of a tracer: whatever it raises, smaller parts are tried
        return None
    if shape != my_shape or not all(_same(a, b) for a, b in zip(wanted, mine, strict=True)):
        return None
    blocks = tuple(_qualified(block, path) for block in found.blocks)
    skipped = tuple(Skipped(f"{path}.{s.node}", s.reason) for s in found.skipped)
    return TracedPart(path, traced, call, FoundBlocks(blocks, skipped, found.macs))


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and bool(a == b)


def _qualified(block: ResidualBlock, path: str) -> ResidualBlock:
    """Return a block of a part with the names that its modules have in the network."""
    units = block.channel_units
    if units is not None:
        consumer = units.consumer
        units = replace(
            units,
            target=f"{path}.{units.target}",
            slices=tuple(replace(piece, tensor=f"{path}.{piece.tensor}") for piece in units.slices),
            scaled=frozenset(f"{path}.{name}" for name in units.scaled),
            consumer=None if consumer is None else replace(consumer, name=f"{path}.{consumer.name}"),
        )
    return replace(
        block,
        name=f"{path}.{block.name}",
        parent=None if block.parent is None else f"{path}.{block.parent}",
        layers=tuple(replace(layer, name=f"{path}.{layer.name}") for layer in block.layers),
        channel_units=units,
    )
