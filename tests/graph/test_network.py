"""What pickles and what is copied of the networks that gatefit returns."""

import copy
import pickle

import pytest
import torch
from networks import images, make
from torch import nn

import gatefit


@pytest.fixture(scope="module")
def gated():
    return gatefit.retrofit(make("basic"), images(), "lc", "step").eval()


@pytest.mark.parametrize("form", ["gated", "codebooks", "tuned"])
def test_a_network_that_could_not_be_read_again_is_not_pickled(gated, form, tmp_path):
    network = gated if form == "gated" else gatefit.deploy(gated, images(), tuned=form == "tuned")
    for save in (
        pickle.dumps,
        lambda n: torch.save(n, tmp_path / "n.pth"),
        lambda n: torch.save({"n": n}, tmp_path / "n.pth"),
    ):
        with pytest.raises(gatefit.GatefitError, match=r"gatefit\.save\(gated, folder\).*load_deployed\(folder\)"):
            save(network)
    for copied in (copy.deepcopy(network), copy.deepcopy(nn.Sequential(network))):
        assert torch.equal(copied(images()), network(images()))
    assert pickle.loads(pickle.dumps(network.state_dict())).keys() == network.state_dict().keys()


def test_an_onnx_network_is_pickled_with_its_file(gated):
    pytest.importorskip("onnxruntime")
    deployed = gatefit.deploy(gated, images(), "onnx", tuned=False)
    again = pickle.loads(pickle.dumps(deployed))
    assert torch.equal(again(images()), deployed(images())) and len(again.plans) == len(deployed.plans)
