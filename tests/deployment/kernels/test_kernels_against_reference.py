"""Each exported kernel against its formula, called as abi.h says; it must not touch the memory around its result."""

from dataclasses import replace

import kernel_reference as reference
import numpy as np
import pytest
import torch
from kernel_reference import UNBOUNDED, Block, Step

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
    PACKED_OC,
    SILU,
    BlockStruct,
    StepStruct,
    pack_weight,
)
from gatefit.deployment.kernels.native import kernels, processor

pytestmark = pytest.mark.skipif(kernels() is None, reason="no C++ compiler")

RELU, RELU6, SWISH = (0.0, np.inf), (0.0, 6.0), (*UNBOUNDED, SILU, 0.0)
GUARD = 64
"""Values before and behind a result."""


def address(array):
    return None if array is None else array.ctypes.data


def floats(random, *shape, scale=1.0):
    return (random.standard_normal(shape) * scale).astype(np.float32)


def guarded(shape):
    """An array of NaN, and the memory that it lies in: also NaN, before and behind it."""
    memory = np.full(int(np.prod(shape)) + 2 * GUARD, np.nan, np.float32)
    return memory[GUARD:-GUARD].reshape(shape), memory


def check(result, memory, expected):
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5 * largest)
    assert np.isnan(memory[:GUARD]).all() and np.isnan(memory[-GUARD:]).all()


def result_shape(images, channels, kernel, stride, padding):
    sizes = (reference.output_size(s, kernel, stride, padding) for s in images.shape[2:])
    return (len(images), channels, *sizes)


CHANNELS = {"all": slice(None), "some": slice(0, None, 3), "one": slice(2, 3), "none": slice(0, 0)}
"""Which output channels, or input channels, are open."""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("open_ic", CHANNELS)
@pytest.mark.parametrize("open_oc", ["all", "some", "one"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((5, 18), 3, 1, 1),
        ((4, 4), 3, 1, 1),  # a small map, which is packed
        ((7, 9), 3, 2, 1),
        ((6, 6), 5, 3, 0),
        ((3, 11), 1, 1, 0),  # 33 pixels: the last one has a vector to itself
        ((6, 5), 1, 2, 0),
    ],
)
def test_conv(size, kernel, stride, padding, open_oc, open_ic, threads):
    random = np.random.default_rng(0)
    weight, bias = floats(random, 15, 6, kernel, kernel), floats(random, 15)
    oc, ic = np.arange(15)[CHANNELS[open_oc]].copy(), np.arange(6)[CHANNELS[open_ic]].copy()
    images = floats(random, 2, len(ic), *size)
    shape = result_shape(images, len(oc), kernel, stride, padding)
    residual = floats(random, *shape)
    for its_bias, its_residual, bounds in ((bias, residual, RELU), (None, None, UNBOUNDED), (bias, None, RELU6)):
        out, memory = guarded(shape)
        operands = (images, weight, its_bias, oc, ic, its_residual, out)
        sizes = (2, len(ic), *size, len(oc), 6, kernel, stride, padding)
        kernels().conv(*map(address, operands), *sizes, *bounds, threads)
        expected = [
            reference.convolution(
                images[b],
                weight,
                its_bias,
                oc,
                ic,
                None if its_residual is None else its_residual[b],
                stride,
                padding,
                bounds,
            )
            for b in range(2)
        ]
        check(out, memory, np.stack(expected))


def test_conv_of_many_input_channels():
    """So many that they are summed chunk by chunk."""
    random = np.random.default_rng(0)
    weight, ic, oc = floats(random, 13, 900, 1, 1), np.arange(0, 900, 1), np.array([0, 3, 12])
    images = floats(random, 1, 900, 7, 7)
    out, memory = guarded((1, 3, 7, 7))
    operands = (images, weight, None, oc, ic, None, out)
    kernels().conv(*map(address, operands), 1, 900, 7, 7, 3, 900, 1, 1, 0, *UNBOUNDED, 1)
    check(out, memory, reference.convolution(images[0], weight, None, oc, ic, None, 1, 0, UNBOUNDED)[None])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("open_oc", CHANNELS)
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((9, 21), 3, 1, 1),
        ((8, 33), 3, 2, 1),
        ((9, 18), 5, 1, 2),
        ((7, 7), 5, 2, 2),
        ((7, 7), 7, 1, 3),
        ((9, 17), 4, 3, 1),
        ((5, 5), 2, 2, 0),
    ],
)
def test_depthwise(size, kernel, stride, padding, open_oc, threads):
    random = np.random.default_rng(0)
    weight, bias, oc = floats(random, 9, 1, kernel, kernel), floats(random, 9), np.arange(9)[CHANNELS[open_oc]].copy()
    images = floats(random, 2, len(oc), *size)
    for its_bias, bounds in ((bias, RELU6), (None, UNBOUNDED)):
        out, memory = guarded(result_shape(images, len(oc), kernel, stride, padding))
        sizes = (2, len(oc), *size, kernel, stride, padding)
        kernels().depthwise(*map(address, (images, weight, its_bias, oc, out)), *sizes, *bounds, threads)
        expected = [reference.depthwise(x, weight, its_bias, oc, stride, padding, bounds) for x in images]
        check(out, memory, np.stack(expected))


def test_narrow_says_where_weights_are_packed():
    widths = {4, 7, 8, 14, 16, 28, 32, 42, 48, 56, 64}
    wanted = widths if "avx512f" in processor("flags").split() else set()
    assert {w for w in range(66) if kernels().narrow(w)} == wanted


@pytest.mark.parametrize("shape", [(16, 1), (32, 2), (48, 5)])
def test_packed_weights(shape):
    weight = floats(np.random.default_rng(0), *shape, 3, 3)
    packed = pack_weight(torch.from_numpy(weight))
    assert packed.is_contiguous()
    np.testing.assert_array_equal(packed, reference.pack(weight, PACKED_OC))
    assert pack_weight(torch.zeros(PACKED_OC + 1, 2, 3, 3)) is None


def conv(random, oc_total, ic_total, kernel, stride=1, **settings):
    weight = floats(random, oc_total, ic_total, kernel, kernel, scale=(ic_total * kernel**2) ** -0.5)
    sizes = (kernel, stride, kernel // 2, oc_total, ic_total)
    return Step(CONVOLUTION, *sizes, weight, floats(random, oc_total), **settings)


def depthwise(random, channels, kernel, stride=1, **settings):
    weight = floats(random, channels, 1, kernel, kernel)
    return Step(DEPTHWISE, kernel, stride, kernel // 2, channels, 1, weight, floats(random, channels), **settings)


def pooling(channels, kernel, stride, padding):
    return Step(MAX_POOLING, kernel, stride, padding, channels, channels)


def gated(random, channels, n_units, steps, has_block=True, compensated_oc=0, **settings):
    """A block whose gates open about half of what they can."""
    n_logits = n_units + has_block
    if compensated_oc:
        settings["compensation"] = floats(random, n_units, compensated_oc)
        settings["threshold"] = np.abs(floats(random, n_units, scale=4.0))
    gates = (floats(random, n_logits, channels), floats(random, n_logits, scale=0.1))
    return Block(channels, steps, True, None, has_block, n_units, *gates, bounds=RELU, **settings)


def basic(random, channels, hidden, has_block=True, compensated=True):
    first = conv(random, hidden, channels, 3, open_oc=True, bounds=RELU)
    last = conv(random, channels, hidden, 3, open_ic=True, compensated=compensated, bounds=RELU)
    return gated(random, channels, hidden, [first, last], has_block, channels * compensated)


def bottleneck(random):
    """With a stride, and a projection that makes the residual."""
    steps = [
        conv(random, 10, 6, 1, open_oc=True, bounds=RELU),
        conv(random, 12, 10, 3, 2, open_ic=True, compensated=True, bounds=RELU6),
        conv(random, 9, 12, 1, bounds=RELU),
    ]
    block = gated(random, 6, 10, steps, compensated_oc=12)
    return Block(**{**vars(block), "adds_input": False, "projection": conv(random, 9, 6, 1, 2)})


def inverted(random):
    """A convolution 1 x 1 and a depthwise one, which run as a pair."""
    steps = [
        conv(random, 20, 6, 1, open_oc=True, bounds=RELU6),
        depthwise(random, 20, 3, open_oc=True, bounds=RELU6),
        conv(random, 6, 20, 1, open_ic=True, bounds=RELU),
    ]
    return gated(random, 6, 20, steps)


def plain(random, bounds=RELU):
    return Block(3, [conv(random, 6, 3, 3, 2, bounds=bounds), pooling(6, 3, 2, 1), depthwise(random, 6, 5)])


def always_open(random):
    """A block without gates, which is added to its input."""
    return Block(6, [conv(random, 8, 6, 3, bounds=RELU), conv(random, 6, 8, 1, bounds=RELU)], adds_input=True)


def activated(random, kind, parameter=0.0):
    """Every place that an activation stands at: in a pair, narrow and wide, behind the sum, and where it is skipped."""
    bounds = (*UNBOUNDED, kind, parameter)
    pair = inverted(random)
    pair.steps[:] = [replace(step, bounds=bounds) for step in pair.steps]
    wide = basic(random, 6, 8)
    wide.steps[:] = [replace(step, bounds=bounds) for step in wide.steps]
    first = Block(6, [conv(random, 6, 6, 3, bounds=bounds)])
    return [replace(pair, bounds=bounds), first, replace(wide, bounds=bounds)]


ACTIVATIONS = {
    "SiLU": (SILU, 0.0),
    "Hardswish": (HARDSWISH, 0.0),
    "GELU": (GELU, 0.0),
    "GELU by tanh": (GELU_TANH, 0.0),
    "LeakyReLU": (LEAKY_RELU, 0.2),
    "ELU": (ELU, 0.7),
}

BLOCKS = {
    **{name: (lambda r, how=how: activated(r, *how), (6, 9, 7)) for name, how in ACTIVATIONS.items()},
    "SiLU, packed": (
        lambda r: [
            replace(block, bounds=SWISH, steps=[replace(s, bounds=SWISH) for s in block.steps])
            for block in [basic(r, 32, 24)]
        ],
        (32, 4, 4),
    ),
    "basic": (lambda r: [basic(r, 5, 12)], (5, 6, 9)),
    "no block gate": (lambda r: [basic(r, 5, 12, has_block=False)], (5, 6, 9)),
    "no compensation": (lambda r: [basic(r, 5, 12, compensated=False)], (5, 6, 9)),
    "bottleneck": (lambda r: [bottleneck(r)], (6, 9, 7)),
    "inverted": (lambda r: [inverted(r)], (6, 9, 7)),
    "no gates": (lambda r: [always_open(r)], (6, 5, 4)),
    "plain": (lambda r: [plain(r)], (3, 21, 18)),
    "several": (lambda r: [plain(r), inverted(r), basic(r, 6, 8), always_open(r), bottleneck(r)], (3, 21, 18)),
    "large": (lambda r: [basic(r, 144, 144), basic(r, 144, 8)], (144, 4, 4)),
    **{f"packed, {h} x {w}": (lambda r: [basic(r, 32, 24)], (32, h, w)) for h, w in ((4, 4), (1, 4), (3, 7), (2, 8))},
    **{
        f"packed, {h} x {w}": (lambda r: [basic(r, 16, 5)], (16, h, w)) for h, w in ((2, 14), (3, 16), (2, 28), (1, 32))
    },
    "large and packed": (lambda r: [basic(r, 352, 352, has_block=False)], (352, 4, 4)),
}
"""By name: what makes blocks of a random generator, and the shape of their images."""


def activation(bounds):
    """The fields of an activation, in their order."""
    lowest, highest, *more = bounds
    return (*(more or (CLAMP, 0.0)), lowest, highest)


class Described:
    """Blocks as C structs, and all that these point to."""

    def __init__(self, blocks, width):
        self.memory = []
        self.blocks = (BlockStruct * len(blocks))()
        for i, block in enumerate(blocks):
            self.blocks[i] = self.block(block, width)
            for step in block.steps:
                width = reference.output_size(width, step.kernel, step.stride, step.padding)

    def block(self, block, width):
        steps = (StepStruct * len(block.steps))()
        for i, step in enumerate(block.steps):
            steps[i] = self.step(step, width)
            width = reference.output_size(width, step.kernel, step.stride, step.padding)
        self.memory.append(steps)
        arrays = (block.gate_weight, block.gate_bias, block.compensation, block.threshold)
        counts = (block.channels, block.has_block, block.n_units, len(steps), block.adds_input)
        projection = None if block.projection is None else (StepStruct * 1)(self.step(block.projection, 0))
        self.memory.append(projection)
        return BlockStruct(*map(address, arrays), *counts, steps, projection, *activation(block.bounds))

    def step(self, step, width):
        packed = None
        geometry = (step.kind, step.kernel, step.stride, step.padding)
        if geometry == (CONVOLUTION, 3, 1, 1) and step.oc_total % PACKED_OC == 0 and kernels().narrow(width):
            packed = reference.pack(step.weight, PACKED_OC)
            self.memory.append(packed)
        sizes = (step.oc_total, step.ic_total, step.kernel, step.stride, step.padding, step.kind)
        marks = (step.open_oc, step.open_ic, step.compensated)
        return StepStruct(*map(address, (step.weight, step.bias, packed)), *sizes, *marks, *activation(step.bounds))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_over_all_numbers(name):
    """A convolution 1 x 1 with the weight 1 gives back what its activation makes of each value."""
    bounds = (*UNBOUNDED, *ACTIVATIONS[name])
    values = np.concatenate([np.linspace(-20, 20, 4001), [-1e4, -90.0, -1e-6, 0.0, 1e-6, 90.0, 1e4]])
    images = values.astype(np.float32).reshape(1, 1, 1, -1)
    step = Step(CONVOLUTION, 1, 1, 0, 1, 1, np.ones((1, 1, 1, 1), np.float32), bounds=bounds)
    described = Described([Block(1, [step])], images.shape[3])
    out = np.empty_like(images)
    kernels().blocks(described.blocks, 1, address(images), None, address(out), 1, *images.shape[2:], 1)
    with np.errstate(over="ignore"):
        expected = [_exact(float(value), bounds) for value in images.ravel()]
    np.testing.assert_allclose(out.ravel(), expected, rtol=2e-6, atol=1e-6)


def _exact(value, bounds):
    try:
        return reference.clamp(value, bounds)
    except OverflowError:  # exp of a large number below 1 / it
        return 0.0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_nan(name):
    images = np.full((1, 1, 1, 5), np.nan, np.float32)
    bounds = (*UNBOUNDED, *ACTIVATIONS[name])
    step = Step(CONVOLUTION, 1, 1, 0, 1, 1, np.ones((1, 1, 1, 1), np.float32), bounds=bounds)
    described = Described([Block(1, [step])], 5)
    out = np.zeros_like(images)
    kernels().blocks(described.blocks, 1, address(images), None, address(out), 1, 1, 5, 1)
    assert np.isnan(out).all()


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    random = np.random.default_rng(0)
    make, shape = BLOCKS[name]
    blocks = make(random)
    means = floats(random, shape[0], 1, 1) * np.array([1, -1, 2, -2, 1], np.float32)[:, None, None, None]
    images = means + floats(random, 5, *shape)  # so that some are skipped and others are not
    residual = images[:, ::-1].copy() if blocks[0].adds_input else None  # any will do for the first block
    expected, decisions = reference.run_blocks(blocks, images, residual)
    if decisions.share_open:
        assert any(0 < share < 1 for share in decisions.share_open)
    if blocks[0].has_block:
        assert len(set(decisions.skipped)) == 2
    described = Described(blocks, shape[2])
    for batch in (5, 1, 0):
        for threads in (1, 2):
            out, memory = guarded((batch, *expected.shape[1:]))
            operands = map(address, (images, residual, out))
            kernels().blocks(described.blocks, len(blocks), *operands, batch, *shape[1:], threads)
            check(out, memory, expected[:batch])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(9, 21), (7, 7), (5, 40)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)])
def test_max_pooling(kernel, stride, padding, size, threads):
    images = floats(np.random.default_rng(0), 2, 3, *size) - 3.0  # below 0, which no border may be
    images[0, 1, 2, 3] = np.nan
    described = Described([Block(3, [pooling(3, kernel, stride, padding)])], size[1])
    out, memory = guarded(result_shape(images, 3, kernel, stride, padding))
    kernels().blocks(described.blocks, 1, address(images), None, address(out), 2, *size, threads)
    expected = np.stack([reference.max_pooling(image, kernel, stride, padding) for image in images])
    assert np.isnan(expected).sum() >= 1
    np.testing.assert_array_equal(out, expected)
    assert np.isnan(memory[:GUARD]).all() and np.isnan(memory[-GUARD:]).all()
