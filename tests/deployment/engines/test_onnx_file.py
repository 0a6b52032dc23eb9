"""ONNX files without control flow."""

import pytest
import torch
from deployed import gated_network, same
from networks import images

import gatefit
from gatefit.deployment.engines.onnx import OnnxNetwork, masked_onnx


def test_a_file_without_control_flow():
    pytest.importorskip("onnxruntime")
    import onnx

    gated = gated_network("basic", compensation=True)
    model = masked_onnx(gated, images(1))
    assert "If" not in {n.op_type for n in onnx.load_from_string(model).graph.node}
    with torch.no_grad():
        assert same(OnnxNetwork(model)(images(5, seed=3)), gated(images(5, seed=3)))
    with pytest.raises(gatefit.GatefitError, match=r"takes images of shape.*deploy anew"):
        OnnxNetwork(model)(torch.zeros(1, 3, 5, 5))
    with pytest.raises(gatefit.GatefitError, match="cannot read the file"):
        OnnxNetwork(model[: len(model) // 2])
