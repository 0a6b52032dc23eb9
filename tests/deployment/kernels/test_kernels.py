"""The compiled kernels, called by hand."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from deployed import running_on, same
from torch import nn

from gatefit.deployment.engines.chain import ChainBlocks, PlainBlock, Pooling
from gatefit.deployment.engines.gathered import GatheredConv
from gatefit.deployment.kernels.native import kernels


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "shape",
    [
        (6, 16, 24, 3),
        (5, 9, 11, 3),
        (7, 4, 4, 3),
        (13, 5, 8, 1),
        (8, 14, 14, 1),
        (6, 7, 7, 5),
        (700, 7, 7, 1),
        (9, 9, 9, 1),
        (5, 7, 1, 3),
    ],
)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_gathered_convolution(shape, stride):
    """Of some rows and some columns, two images at once, with a shortcut; and with no column at all."""
    channels, height, width, size = shape
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(channels, 20, size, stride, size // 2)
    rows, columns = torch.tensor([0, 3, 4, 7, 11, 12, 19]), torch.tensor([0, 2, 4])
    x = torch.randn(2, channels, height, width)
    with torch.no_grad():
        whole = conv(x)
        assert same(GatheredConv(conv)(x), whole)
        conv.weight.data[:, [c for c in range(channels) if c not in columns.tolist()]] = 0
        some = conv(x)[:, rows]
        added = torch.randn(some.shape)
        gathered = GatheredConv(conv, "relu")
        assert same(gathered(x[:, columns], added, rows, columns), (some + added).relu())
        none = gathered(x[:, :0], None, rows, columns[:0])
        assert same(none, conv.bias[rows, None, None].relu().expand_as(none))


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("size", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("image", [(9, 21), (7, 7), (40, 33)])
def test_a_gathered_depthwise_convolution(size, stride, image):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(12, 12, size, stride, size // 2, groups=12)
    rows, x = torch.tensor([1, 2, 5, 11]), torch.randn(2, 12, *image)
    with torch.no_grad():
        whole = conv(x).clamp(0, 6)
        assert same(GatheredConv(conv, "hardtanh")(x), whole)
        assert same(GatheredConv(conv, "hardtanh")(x[:, rows], None, rows), whole[:, rows])
        assert same(GatheredConv(conv, "swish")(x), torch.nn.functional.silu(conv(x)))


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("sizes", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)])
@pytest.mark.parametrize("image", [(9, 21), (7, 7), (40, 67)])
def test_max_pooling(sizes, image):
    torch.manual_seed(0)
    x = torch.randn(3, 5, *image) - 3.0  # below 0, which no border may be
    x[0, 1, 2, 3] = float("nan")
    with torch.no_grad():
        for threads in (1, 2):
            with running_on(threads):
                pooled = ChainBlocks([PlainBlock([Pooling(*sizes)])])(x)
                torch.testing.assert_close(pooled, nn.MaxPool2d(*sizes)(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
def test_kernels_called_from_several_threads_and_after_a_fork():
    conv = GatheredConv(nn.Conv2d(32, 32, 3, padding=1))
    x = torch.randn(1, 32, 24, 24)
    with torch.no_grad(), running_on(2):
        expected = conv(x)
        with ThreadPoolExecutor(4) as callers:
            assert all(torch.equal(y, expected) for y in callers.map(lambda _: conv(x), range(200)))
        child = os.fork()  # it has none of its parent's threads, and must not wait for them
        if not child:
            try:
                os._exit(0 if torch.equal(conv(x), expected) else 1)
            finally:
                os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
