"""Examples of what a network takes: one tensor, several inputs, or inputs by name."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from gatefit.errors import ConversionError

Example = Tensor | Sequence[Any] | Mapping[str, Any]
"""One input; a tuple of several; or a dictionary: of inputs by forward's names for them, or itself the one input.

Example: a network with forward(image, table) takes the example (image, table) or {"image": image, "table": table}.
"""


def named_inputs(network: nn.Module, example: Example) -> dict[str, Any]:
    """Give each argument of forward that an example gives, by its name.

    Raises:
        ConversionError: forward takes other arguments.
    """
    signature = inspect.signature(network.forward)
    try:
        if isinstance(example, Mapping):
            return dict(signature.bind_partial(**example).arguments)
        spread = example if isinstance(example, tuple | list) else (example,)
        return dict(signature.bind_partial(*spread).arguments)
    except TypeError as error:
        with suppress(TypeError):
            return dict(signature.bind(example).arguments)
        raise ConversionError(
            f"{type(network).__name__} does not take the example ({error}); its forward is {signature}"
        ) from error


def call(network: nn.Module, example: Example) -> Any:
    """Call a network on an example."""
    inputs = named_inputs(network, example)
    kinds = inspect.signature(network.forward).parameters
    several = [name for name in inputs if kinds[name].kind is inspect.Parameter.VAR_POSITIONAL]
    args = [value for name in several for value in inputs.pop(name)]
    return network(*args, **inputs)


def first_tensor(example: Example) -> Tensor:
    """Give the first tensor of an example.

    Raises:
        ConversionError: there is none.
    """
    tensors = [leaf for leaf in tree_leaves(_plain(example)) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ConversionError(f"the example holds no tensor, but {type(example).__name__}; pass what forward takes")
    return tensors[0]


def on_meta(network: nn.Module, example: Example) -> Example:
    """Give an example without numbers, its tensors of floats in the network's type where it has one only."""
    first_tensor(example)
    dtypes = {p.dtype for p in network.parameters() if p.is_floating_point()}
    only = dtypes.pop() if len(dtypes) == 1 else None

    def empty(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_like(value, device="meta", dtype=only if value.is_floating_point() else None)

    return tree_map(empty, _plain(example))  # type: ignore[no-any-return]


def random_like(network: nn.Module, example: Example) -> Example:
    """Fill an example with random numbers, always the same; whole numbers stay. One tensor becomes a batch of two."""
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    wanted = iter(t.dtype for t in tree_leaves(on_meta(network, example)) if isinstance(t, Tensor))

    def fill(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = next(wanted)
        rows = 2 if isinstance(example, Tensor) else len(value)
        if value.is_floating_point():
            return torch.randn(rows, *value.shape[1:], generator=generator).to(device, dtype)
        values = torch.zeros(value.shape, dtype=dtype) if value.is_meta else value.cpu()
        return values[torch.arange(rows) % len(values)].to(device)

    return tree_map(fill, _plain(example))  # type: ignore[no-any-return]


def takes_one_tensor(traced: fx.GraphModule) -> bool:
    """Tell whether a traced network takes one tensor alone."""
    inputs = traced.graph.find_nodes(op="placeholder")
    return len(inputs) == 1 and inputs[0].meta.get("shape") is not None


def _plain(example: Example) -> Any:
    """Turn a mapping of any kind into a dictionary."""
    return dict(example) if isinstance(example, Mapping) else example
