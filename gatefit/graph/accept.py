"""What a network has to be before it can be traced: unwrapped, copyable, and without hooks that a graph would lose."""

import functools
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatefit.errors import ConversionError

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside `nn.DataParallel` or `torch.compile`, and any other network as it is.

    Raises:
        ConversionError: it is no network, or one whose layers are no modules any more.
    """
    while isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):
        inner = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        assert isinstance(inner, nn.Module)
        model = inner
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ConversionError(f"{model.__name__} is a class; pass a network that it makes, such as {model.__name__}()")
    if not isinstance(model, nn.Module):
        raise ConversionError(f"a network has to be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError("a scripted or jit-traced network cannot be gated; pass what it was made from")
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    if any(isinstance(node.target, torch._ops.OpOverload) for node in nodes):
        raise ConversionError("a network from torch.export cannot be gated; pass the network that was exported")
    return model


def of_library(module: str) -> bool:
    """Tell whether a Python module, by its name, is of PyTorch, timm or torchvision, and not of the user."""
    return module.partition(".")[0] in ("torch", "timm", "torchvision")


def check_copyable(model: nn.Module) -> None:
    """Refuse a network that holds tensors which PyTorch cannot copy.

    Raises:
        ConversionError: a layer computes its weight in a hook.
    """
    for name, module in model.named_modules():
        if any(isinstance(value, Tensor) and not value.is_leaf for value in vars(module).values()):
            raise ConversionError(
                f"'{name}' computes its weight in a hook (old-style weight_norm, spectral_norm or prune), which cannot "
                "be copied; call torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove first"
            )


def check_hooks(model: nn.Module, is_leaf: Callable[[nn.Module, str], bool]) -> None:
    """Refuse hooks on modules that do not survive tracing: their arithmetic would be frozen and all else lost.

    Args:
        model: the network.
        is_leaf: whether tracing keeps a module, by its qualified name, as one node; hooks on those stay.

    Raises:
        ConversionError: there are such hooks; PyTorch's and timm's own are let pass.
    """
    hooks = [f"'{name}' ({_name(hook)})" for name, module in _opened(model, is_leaf) for hook in _own_hooks(module)]
    if hooks:
        more = f" and {len(hooks) - 3} more" if len(hooks) > 3 else ""
        raise ConversionError(
            f"hooks on {', '.join(hooks[:3])}{more} would be lost in a graph; remove them (handle.remove()), or put "
            "them on layers such as convolutions, which keep theirs"
        )


def _opened(module: nn.Module, is_leaf: Callable[[nn.Module, str], bool], name: str = "") -> Iterator[Any]:
    """Give each module whose forward is followed, by its qualified name."""
    yield name or type(module).__name__, module
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if not is_leaf(child, path):
            yield from _opened(child, is_leaf, path)


def _own_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = chain.from_iterable(getattr(module, kind).values() for kind in kinds)
    return [hook for hook in hooks if not of_library(_home(hook))]


def _home(hook: Any) -> str:
    function = _function(hook)
    return str(getattr(function, "__module__", None) or type(function).__module__)


def _name(hook: Any) -> str:
    function = _function(hook)
    return str(getattr(function, "__qualname__", type(function).__name__))


def _function(hook: Any) -> Any:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook
