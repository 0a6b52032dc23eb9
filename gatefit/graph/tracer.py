"""A torch.fx tracer that knows shapes while it traces.

Each proxy carries the value that its node has on the meta device, so that code that branches on shapes or loops over
them is followed as it runs, and no part of a network with convolutions in it has to stay opaque. Sizes are integers
that remember their node: control flow sees the number, the graph gets the node, and so takes other sizes too.
"""

import inspect
import math
import operator
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from math import prod
from typing import Any

from timm.layers import get_notrace_functions, get_notrace_modules
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from gatefit.errors import UntraceableError, first_line

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
"""Modules whose multiply-accumulates are counted."""

_COMPOSED = (
    nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)  # fmt: skip
"""PyTorch's own modules that have residual branches in them."""

_LAYOUT = {"is_nested", "is_sparse", "is_quantized"}
"""What PyTorch asks a tensor, and no values or devices change."""
_UNKNOWN = object()
_VALUE = "value"


class ShapeTracer(fx.Tracer):
    """Keeps as one node only what has no convolution or linear layer in it, and most of PyTorch's own modules.

    Args:
        inputs: what forward will be given, by argument, on the meta device; None: shapes stay unknown, as in torch.fx.
    """

    proxy_buffer_attributes = True

    def __init__(self, inputs: dict[str, Any] | None) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.inputs = inputs
        self.computing = False
        self._leaves = (*get_notrace_modules(), GlobalResponseNorm)

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """Trace a network on the meta device; where inputs are given, tensor nodes get a shape and dtype in `meta`."""
        with _Recording(self), _recorded_numbers(root):
            graph = super().trace(root, concrete_args)
        for node in graph.nodes:
            value = node.meta.pop(_VALUE, None)
            if isinstance(value, Tensor):
                node.meta |= {"shape": value.shape, "dtype": value.dtype}
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is kept as one node."""
        if isinstance(m, _COMPOSED) and self.inputs is not None:
            return False
        if super().is_leaf_module(m, module_qualified_name) or isinstance(m, WEIGHTED):
            return True
        if any(isinstance(s, WEIGHTED) for s in m.modules()):
            return self.inputs is None and isinstance(m, self._leaves)
        return isinstance(m, self._leaves) or any(_branches_on_training(type(s)) for s in m.modules())

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call of a module, unless a value is being computed."""
        return forward(*args, **kwargs) if self.computing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Record a read of a parameter or buffer, unless a value is being computed."""
        return attr_val if self.computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Make proxies that know their value."""
        return _ShapedProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """Turn sizes, and what is computed from them, into nodes."""
        if isinstance(a, Size):
            return a.node
        if isinstance(a, _Real):
            node = self.create_node("call_function", a.function, tuple(self.create_arg(x) for x in a.arguments), {})
            node.meta[_VALUE] = float(a)
            return node
        if isinstance(a, _Shape):
            return tuple(self.create_arg(x) for x in a)
        if isinstance(a, dict) and is_dataclass(a):  # such as the outputs of Hugging Face's networks
            return self.create_node("call_function", type(a), (), {k: self.create_arg(v) for k, v in a.items()})
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """Record a node and compute its value; numbers are given back as such."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if self.inputs is None:
            return proxy
        value = self._compute(proxy.node)
        proxy.node.meta[_VALUE] = value
        if isinstance(value, bool):
            return value
        return Size(value, proxy.node, self) if isinstance(value, int) else proxy

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":  # others are arguments with a default, which is baked in
            return self.inputs.get(str(node.target).lstrip("*"), _UNKNOWN) if self.inputs else _UNKNOWN
        sources = node.all_input_nodes
        if any(s.meta.get(_VALUE, _UNKNOWN) is _UNKNOWN for s in sources):
            return _UNKNOWN
        args: Any = fx.map_arg(node.args, lambda n: n.meta[_VALUE])
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: n.meta[_VALUE])
        args, kwargs = tree_map(_on_meta, (args, kwargs))
        self.computing = True
        try:
            if node.op == "get_attr":
                return operator.attrgetter(str(node.target))(self.root)
            if node.op == "call_module":
                return self.root.get_submodule(str(node.target)).forward(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)
        except Exception as error:
            tensors = [leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor)]
            shapes = " and ".join(str(tuple(t.shape)) for t in tensors)
            raise UntraceableError(
                f"the network does not take an input of shape {shapes}: {first_line(error)}; "
                "pass an example of the size and type that it was built for"
            ) from error
        finally:
            self.computing = False


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _branches_on_training(cls: type[nn.Module]) -> bool:
    try:
        return "self.training" in textwrap.dedent(inspect.getsource(cls.forward))
    except (OSError, TypeError):
        return False


class _Recording(TorchFunctionMode):
    """Records functions that are given sizes but no tensor of the network, such as torch.arange(height)."""

    def __init__(self, tracer: ShapeTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.tracer.computing or any(issubclass(t, fx.Proxy) for t in types):
            return func(*args, **kwargs)
        if not any(isinstance(leaf, Size | fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if inspect.ismethoddescriptor(func):
            return self.tracer.create_proxy("call_method", func.__name__, args, kwargs)
        return self.tracer.create_proxy("call_function", func, args, kwargs)


@contextmanager
def _recorded_numbers(root: nn.Module) -> Iterator[None]:
    """Let `len`, `int` and `float` in the network's own code give numbers that remember their nodes.

    Python itself turns what `__len__`, `__int__` and `__float__` give into plain numbers. PyTorch's code keeps its own.
    """
    packages = {type(m).__module__.partition(".")[0] for m in root.modules()} - {"torch"}
    spaces = [vars(m) for name, m in list(sys.modules.items()) if m is not None and name.partition(".")[0] in packages]
    before = [{k: space[k] for k in _NUMBERS if k in space} for space in spaces]
    for space in spaces:
        space.update({k: v for k, v in _NUMBERS.items() if k not in space})
    try:
        yield
    finally:
        for space, own in zip(spaces, before, strict=True):
            for name in _NUMBERS.keys() - own.keys():
                del space[name]


class _ShapedProxy(fx.Proxy):
    """A proxy that knows its value on the meta device, unless it is unknown."""

    @property
    def _value(self) -> Any:
        return self.node.meta.get(_VALUE, _UNKNOWN)

    def __getattr__(self, k: str) -> Any:
        value = self._value
        if isinstance(value, Tensor):
            if k == "shape":
                return _Shape(_sizes(self, value))
            if k == "ndim":
                return value.dim()
            if k in _LAYOUT:
                return bool(getattr(value, k))
        return _ShapedAttribute(self, k)

    def size(self, dim: int | None = None) -> Any:
        """Do as Tensor.size."""
        if not isinstance(self._value, Tensor):
            return self.tracer.create_proxy("call_method", "size", (self,) if dim is None else (self, dim), {})
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> Any:
        """Do as Tensor.dim."""
        value = self._value
        return value.dim() if isinstance(value, Tensor) else self.tracer.create_proxy("call_method", "dim", (self,), {})

    def numel(self) -> Any:
        """Do as Tensor.numel."""
        if not isinstance(self._value, Tensor):
            return self.tracer.create_proxy("call_method", "numel", (self,), {})
        return prod(self.shape)

    def __bool__(self) -> bool:
        value = self._value
        return super().__bool__() if value is _UNKNOWN or isinstance(value, Tensor) else bool(value)

    def __len__(self) -> int:
        value = self._value
        return super().__len__() if value is _UNKNOWN else len(value)

    def __iter__(self) -> Iterator[Any]:
        value = self._value
        if isinstance(value, Tensor | tuple | list):
            return iter([operator.getitem(self, i) for i in range(len(value))])  # type: ignore[call-overload]
        return iter(super().__iter__())


class _ShapedAttribute(fx.proxy.Attribute, _ShapedProxy):
    """Like fx's: becomes a node only when it is used as a value, not when it is called."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        super().__init__(root, attr)


class _Shape(tuple[Any, ...]):
    """The shape of a proxy."""

    def numel(self) -> Any:
        """Multiply the sizes."""
        return prod(self)

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        return _Shape(part) if isinstance(index, slice) else part


def _sizes(proxy: _ShapedProxy, value: Tensor) -> list["Size"]:
    tracer = proxy.tracer
    assert isinstance(tracer, ShapeTracer)
    shape = tracer.create_node("call_function", getattr, (proxy.node, "shape"), {})
    sizes = []
    for i, size in enumerate(value.shape):
        node = tracer.create_node("call_function", operator.getitem, (shape, i), {})
        node.meta[_VALUE] = size
        sizes.append(Size(size, node, tracer))
    return sizes


class Size(int):
    """An integer that remembers the node that computes it."""

    node: fx.Node
    tracer: ShapeTracer

    def __new__(cls, value: int, node: fx.Node, tracer: ShapeTracer) -> "Size":  # noqa: D102
        size = super().__new__(cls, value)
        size.node, size.tracer = node, tracer
        return size

    def __deepcopy__(self, memo: Any) -> "Size":
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)


def _recorded(name: str) -> Callable[[Size, Any], Any]:
    plain = getattr(int, name)
    swapped = name.startswith("__r")
    function = getattr(operator, f"__{name[3:]}" if swapped else name)

    def method(self: Size, other: Any) -> Any:
        value = plain(self, other)
        if not isinstance(other, int) or isinstance(other, bool) or self.tracer.computing:
            return value
        mine, theirs = self.node, other.node if isinstance(other, Size) else other
        pair = (theirs, mine) if swapped else (mine, theirs)
        node = self.tracer.create_node("call_function", function, pair, {})
        node.meta[_VALUE] = value
        return Size(value, node, self.tracer)

    return method


class _Real(float):
    """A float that sizes went into: where a tensor meets it, what computes it is recorded."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __new__(cls, function: Callable[..., Any], *arguments: Any) -> "_Real":
        real = super().__new__(cls, function(*(_plain(a) for a in arguments)))
        real.function, real.arguments = function, arguments
        return real

    @property
    def _is_quotient(self) -> bool:
        """Tell whether rounding it is a whole division, which remembers its node again."""
        kinds = [isinstance(a, of) for a, of in zip(self.arguments, (Size, int), strict=False)]
        return self.function is operator.truediv and all(kinds)

    @property
    def tracer(self) -> ShapeTracer:
        """Give the tracer that records its sizes."""
        tracer: ShapeTracer = next(a.tracer for a in self.arguments if isinstance(a, Size | _Real))
        return tracer

    def __ceil__(self) -> int:
        return -(-self.arguments[0] // self.arguments[1]) if self._is_quotient else math.ceil(float(self))

    def __floor__(self) -> int:
        return self.arguments[0] // self.arguments[1] if self._is_quotient else math.floor(float(self))

    def __deepcopy__(self, memo: Any) -> "_Real":
        return self

    def __reduce__(self) -> Any:
        return float, (float(self),)


def _plain(number: Any) -> Any:
    return int(number) if isinstance(number, Size) else float(number) if isinstance(number, _Real) else number


def _real(name: str, function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """Make a method of Size or _Real whose result is no integer."""
    swapped = name.startswith("__r")

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        pair = (other, self) if swapped else (self, other)
        if isinstance(self, Size) and self.tracer.computing:
            return function(*(_plain(a) for a in pair))
        return _Real(function, *pair)

    return method


for _name in ("add", "sub", "mul", "truediv", "pow"):
    _function = getattr(operator, f"__{_name}__")
    for _side in ("", "r"):
        setattr(_Real, f"__{_side}{_name}__", _real(f"__{_side}{_name}__", _function))
for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Size, f"__{_name}__", _recorded(f"__{_name}__"))
    setattr(Size, f"__r{_name}__", _recorded(f"__r{_name}__"))
Size.__neg__ = lambda self: self * -1  # type: ignore[assignment]
Size.__truediv__ = _real("__truediv__", operator.truediv)  # type: ignore[assignment]
Size.__rtruediv__ = _real("__rtruediv__", operator.truediv)  # type: ignore[assignment]


_whole_power, _real_power = _recorded("__pow__"), _real("__pow__", operator.pow)


def _power(self: Size, other: Any) -> Any:
    return (_whole_power if isinstance(other, int) and other >= 0 else _real_power)(self, other)


Size.__pow__ = _power  # type: ignore[assignment]


def _length(x: Any) -> int:
    return x.shape[0] if isinstance(x, _ShapedProxy) and isinstance(x._value, Tensor) else len(x)


def _whole(number: Size | _Real) -> Size:
    if isinstance(number, Size):
        return number
    node = number.tracer.create_node("call_function", int, (number.tracer.create_arg(number),), {})
    node.meta[_VALUE] = int(number)
    return Size(int(number), node, number.tracer)


def _number(plain: type, recorded: Callable[[Any], Any]) -> type:
    """Make a type that stands for `plain`: the same, but for sizes and what is computed from them."""

    class Kind(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            known = args and isinstance(args[0], Size | _Real)
            return recorded(args[0]) if known else plain(*args, **kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, plain)

        def __eq__(cls, other: object) -> bool:
            return other is cls or other is plain

        def __hash__(cls) -> int:
            return hash(plain)

    return Kind(plain.__name__, (plain,), {})


_NUMBERS = {
    "len": _length,
    "int": _number(int, _whole),
    "float": _number(float, lambda number: _Real(float, number) if isinstance(number, Size) else number),
}
