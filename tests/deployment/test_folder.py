"""A deployment beside the network that it was made from."""

import pytest
import timm
import torch

import gatefit
from gatefit.commands.deploy import load_deployed, write_deployment
from gatefit.deployment.info import deployed_info
from gatefit.gating.gates import gates_of


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_a_deployment_in_a_folder(tmp_path, placement):
    gated = gatefit.retrofit(timm.create_model("test_resnet").eval(), torch.zeros(2, 3, 32, 32), "lc", "step")
    for gate in gates_of(gated).values():
        for fc in gate.layers:
            torch.nn.init.normal_(fc.weight, std=3.0)
    calibration = torch.randn(8, 3, 32, 32)
    deployed = gatefit.deploy(gated.eval(), calibration, tuned=False, placement=placement)
    gatefit.save(gated, tmp_path)
    write_deployment(tmp_path, deployed_info(deployed).plans)
    with torch.no_grad():
        assert torch.equal(load_deployed(tmp_path)(calibration), deployed(calibration))
    assert all(p.parallel == (placement == "parallel") for p in deployed_info(load_deployed(tmp_path)).plans)
    (tmp_path / "deployment.json").write_text('{"format": 4}')
    with pytest.raises(gatefit.GatefitError, match="damaged"):
        load_deployed(tmp_path)
    with pytest.raises(gatefit.GatefitError, match="no file"):
        load_deployed(tmp_path / "nowhere")
