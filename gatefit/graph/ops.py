"""Functions that gatefit inserts into a graph: products with saliences, and constants for each channel."""

from torch import Tensor


def scale(value: Tensor, salience: Tensor, axis: int, per_unit: int = 1) -> Tensor:
    """Multiply `value` (B, ...) by a salience (B, units); unit u covers `per_unit` entries on `axis`."""
    if per_unit > 1:
        salience = salience.repeat_interleave(per_unit, 1)
    shape = [value.shape[0]] + [1] * (value.dim() - 1)
    shape[axis] = salience.shape[1]
    return value * salience.view(shape).to(value.dtype)


def harden(salience: Tensor) -> Tensor:
    """Return 1 where a salience is above 0, else 0; same shape and dtype."""
    return (salience > 0).to(salience.dtype)


def add_compensation(value: Tensor, compensation: Tensor, axis: int) -> Tensor:
    """Add a compensation (B, channels) to every position of `value` (B, ...), whose channels stand on `axis`."""
    shape = [value.shape[0]] + [1] * (value.dim() - 1)
    shape[axis] = compensation.shape[1]
    return value + compensation.view(shape).to(value.dtype)
