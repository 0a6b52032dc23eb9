"""The formulas of abi.h, value by value in float64: what the compiled kernels are compared with."""

import math
from dataclasses import dataclass, field

import numpy as np

from gatefit.deployment.kernels.abi import (
    CLAMP,
    CONVOLUTION,
    DEPTHWISE,
    ELU,
    GELU,
    GELU_TANH,
    HARDSWISH,
    LEAKY_RELU,
    MAX_POOLING,
    SILU,
)

UNBOUNDED = (-np.inf, np.inf)


@dataclass(frozen=True)
class Step:
    """One layer of a branch, as `StepStruct` has it, with arrays for pointers."""

    kind: int
    kernel: int
    stride: int
    padding: int
    oc_total: int
    ic_total: int
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    open_oc: bool = False
    open_ic: bool = False
    compensated: bool = False
    bounds: tuple[float, float] = UNBOUNDED


@dataclass(frozen=True)
class Block:
    """A block and its gates, as `BlockStruct` has them."""

    channels: int
    steps: list[Step]
    adds_input: bool = False
    projection: Step | None = None
    has_block: bool = False
    n_units: int = 0
    gate_weight: np.ndarray | None = None
    gate_bias: np.ndarray | None = None
    compensation: np.ndarray | None = None
    threshold: np.ndarray | None = None
    bounds: tuple[float, float] = UNBOUNDED


@dataclass
class Decisions:
    """What the gates of all blocks decided, to see that a test has images of all sorts."""

    skipped: list[bool] = field(default_factory=list)
    share_open: list[float] = field(default_factory=list)


def output_size(size, kernel, stride, padding):
    return (size + 2 * padding - kernel) // stride + 1


def windows(image, kernel, stride, padding, border):
    """Yield y, x and what the kernel covers there, (C, KH, KW), for each output pixel."""
    around = ((0, 0), (padding, padding), (padding, padding))
    padded = np.pad(image.astype(np.float64), around, constant_values=border)
    _, height, width = image.shape
    for y in range(output_size(height, kernel, stride, padding)):
        for x in range(output_size(width, kernel, stride, padding)):
            yield y, x, padded[:, y * stride : y * stride + kernel, x * stride : x * stride + kernel]


def clamp(value, bounds):
    """`bounds` are the lowest and the highest value, and for another activation than CLAMP its code and parameter."""
    lowest, highest, *more = bounds
    activation, parameter = more or (CLAMP, 0.0)
    if activation == CLAMP:
        return min(max(value, lowest), highest)
    if activation == SILU:
        return value / (1 + math.exp(-value))
    if activation == HARDSWISH:
        return value * min(max(value + 3, 0), 6) / 6
    if activation == GELU:
        return value * (1 + math.erf(value / math.sqrt(2))) / 2
    if activation == GELU_TANH:
        return value * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))) / 2
    if value > 0:
        return value
    assert activation in (LEAKY_RELU, ELU)
    return parameter * (value if activation == LEAKY_RELU else math.exp(value) - 1)


def empty(image, channels, kernel, stride, padding):
    return np.empty((channels, *(output_size(s, kernel, stride, padding) for s in image.shape[1:])))


def convolution(image, weight, bias, oc, ic, residual, stride, padding, bounds):
    """CONVOLUTION of one image (n_in, H, W)."""
    kernel = weight.shape[2]
    out = empty(image, len(oc), kernel, stride, padding)
    read = [weight[c, list(ic)].astype(np.float64) for c in oc]  # (n_in, KH, KW) each
    for y, x, window in windows(image, kernel, stride, padding, 0.0):
        for i, c in enumerate(oc):
            value = 0.0 if bias is None else float(bias[c])
            value += float((read[i] * window).sum())
            if residual is not None:
                value += residual[i, y, x]
            out[i, y, x] = clamp(value, bounds)
    return out


def depthwise(image, weight, bias, oc, stride, padding, bounds):
    """DEPTHWISE of one image (n_out, H, W)."""
    kernel = weight.shape[2]
    out = empty(image, len(oc), kernel, stride, padding)
    for y, x, window in windows(image, kernel, stride, padding, 0.0):
        for i, c in enumerate(oc):
            value = 0.0 if bias is None else float(bias[c])
            value += float((weight[c, 0].astype(np.float64) * window[i]).sum())
            out[i, y, x] = clamp(value, bounds)
    return out


def max_pooling(image, kernel, stride, padding):
    """MAX_POOLING of one image (C, H, W)."""
    out = empty(image, len(image), kernel, stride, padding)
    for y, x, window in windows(image, kernel, stride, padding, -np.inf):
        out[:, y, x] = window.max((1, 2))  # NaN where there is one
    return out


def pack(weight, packed_oc):
    """`StepStruct.packed_weight` of a weight (OC, IC, KH, KW)."""
    oc_total, ic_total, height, width = weight.shape
    packed = np.empty((ic_total, oc_total // packed_oc, height * width, packed_oc), np.float32)
    for oc, ic, kh, kw in np.ndindex(weight.shape):
        packed[ic, oc // packed_oc, kh * width + kw, oc % packed_oc] = weight[oc, ic, kh, kw]
    return packed


def run_step(step, image, open_units, bias, residual):
    oc = open_units if step.open_oc else range(step.oc_total)
    ic = open_units if step.open_ic else range(step.ic_total)
    if step.kind == CONVOLUTION:
        return convolution(image, step.weight, bias, oc, ic, residual, step.stride, step.padding, step.bounds)
    if step.kind == DEPTHWISE:
        return depthwise(image, step.weight, bias, oc, step.stride, step.padding, step.bounds)
    assert step.kind == MAX_POOLING
    return max_pooling(image, step.kernel, step.stride, step.padding)


def run_block(block, image, residual, decisions):
    """One image (C, H, W) through a block; `residual` is what it is given, if it adds its input."""
    if block.projection is not None:
        residual = run_step(block.projection, image, [], block.projection.bias, None)
    open_units, closed_predictions = [], {}
    if block.gate_weight is not None:
        logits = block.gate_bias + block.gate_weight.astype(np.float64) @ image.astype(np.float64).mean((1, 2))
        decisions.skipped.append(bool(block.has_block and logits[0] <= 0))
        if decisions.skipped[-1]:
            return np.vectorize(lambda value: clamp(value, block.bounds))(residual)
        for u, z in enumerate(logits[int(block.has_block) :]):
            if z > 0:
                open_units.append(u)
            elif block.compensation is not None:
                closed_predictions[u] = max(z + block.threshold[u], 0.0) / 8
        decisions.share_open.append(len(open_units) / max(block.n_units, 1))
    for step in block.steps:
        bias = step.bias
        if step.compensated:
            bias = np.zeros(step.oc_total) if bias is None else bias.astype(np.float64)
            for u, prediction in closed_predictions.items():
                bias = bias + prediction * block.compensation[u]
        image = run_step(step, image, open_units, bias, residual if step is block.steps[-1] else None)
    return image


def run_blocks(blocks, images, residual):
    """Images (B, C, H, W) through blocks one behind the other, and what their gates decided."""
    decisions, results = Decisions(), []
    for b, image in enumerate(images):
        for k, block in enumerate(blocks):
            given = None
            if block.adds_input:
                given = image if k else residual[b]
            image = run_block(block, image, given, decisions)
        results.append(image)
    return np.stack(results), decisions
