"""Packed convolutions."""

import copy

import pytest
import torch
from deployed import gated_network, same
from networks import images, make

import gatefit
from gatefit.deployment.dynamic import DynamicBlock
from gatefit.deployment.engines.prepack import PackedConv
from gatefit.deployment.engines.pytorch import packed
from gatefit.graph.fold import fold_batch_norms


@pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted", "squeeze-excite"])
def test_packed_convolutions(name):
    """With their activation, and what they are added to; and again after a copy, which packs anew."""
    model = make(name).eval()
    network = packed(fold_batch_norms(model, images()))
    convs = [m for m in network.modules() if isinstance(m, PackedConv)]
    x = images(3, seed=4)
    with torch.no_grad():
        wanted = model(x)
        assert same(network(x), wanted) and same(copy.deepcopy(network)(x), wanted)
        assert convs and all(c.packed.is_mkldnn for c in convs)
        with torch.backends.mkldnn.flags(enabled=False):
            assert same(copy.deepcopy(network)(x), wanted)
    deployed = gatefit.deploy(gated_network(name), images(8), tuned=False)
    variants = [n for m in deployed.modules() if isinstance(m, DynamicBlock) for w in m.variants for n in w.graph.nodes]
    assert not any(n.target is torch.add for n in variants) or name == "squeeze-excite"
