"""How a module is called: with one tensor, and otherwise with constants that a graph of it can bake in."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gatefit.errors import GatefitError

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout)


@dataclass(frozen=True)
class Call:
    """How a module is called: with one tensor, and otherwise with what its graph has baked in."""

    signature: inspect.Signature
    shape: TreeSpec
    """Structure of all arguments, defaults included."""
    leaves: tuple[Any, ...]
    """The arguments in their order; None in place of the tensor."""
    index: int
    """Which of `leaves` is the tensor."""

    def arguments(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments of the call with the tensor `x`."""
        leaves = [x if i == self.index else leaf for i, leaf in enumerate(self.leaves)]
        args, kwargs = tree_unflatten(leaves, self.shape)
        return args, kwargs

    def tensor(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the one tensor that the part `name` is called with.

        Raises:
            GatefitError: the other arguments are not those that the part was traced with.
        """
        leaves, shape = _flat_arguments(self.signature, args, kwargs)
        x = leaves[self.index] if shape == self.shape else None
        if not isinstance(x, Tensor) or not same_but(self.index, leaves, self.leaves):
            raise GatefitError(
                f"{name} is called with other arguments than those that it was converted with; "
                "call the network as its example was given, or convert it anew"
            )
        return x


def call_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Tensor] | None:
    """Return how a module is called, and the tensor; None where it takes another number of tensors, or objects."""
    try:
        signature = inspect.signature(module.forward)
        leaves, shape = _flat_arguments(signature, args, kwargs)
    except (TypeError, ValueError):
        return None
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(tensors) != 1 or not all(isinstance(leaf, (*_PLAIN, Tensor)) for leaf in leaves):
        return None
    x = leaves[tensors[0]]
    if not x.is_floating_point():
        return None
    plain = inspect.Signature([p.replace(annotation=p.empty) for p in signature.parameters.values()])
    constants = tuple(None if i == tensors[0] else leaf for i, leaf in enumerate(leaves))
    return Call(plain, shape, constants, tensors[0]), x.detach().clone()


def _flat_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], TreeSpec]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return tree_flatten((bound.args, dict(bound.kwargs)))


def same_but(index: int, leaves: Any, others: Any) -> bool:
    """Tell whether two calls have the same arguments, all but the tensor."""
    pairs = enumerate(zip(leaves, others, strict=True))
    return all(i == index or (type(a) is type(b) and bool(a == b)) for i, (a, b) in pairs)


def with_call(module: nn.Module, call: Call) -> nn.Module:
    """Return `module`, its state shared, as a network that takes one tensor."""
    kind = type(module)

    def forward(self: nn.Module, x: Tensor) -> Any:
        args, kwargs = call.arguments(x)
        return kind.forward(self, *args, **kwargs)

    view = copy.copy(module)
    view.__class__ = type(kind.__name__, (_OneInput, kind), {"forward": forward, "__module__": kind.__module__})
    return view


class _OneInput:
    def __init_subclass__(cls, **options: Any) -> None:
        """Keep the classes of a network from registering or wrapping what is made for a trace."""
