import pytest
import timm
import torch
from torch import nn

from gatefit.graph.fold import fold_batch_norms


@pytest.mark.parametrize(
    ("name", "left"), [("resnet18", 0), ("tf_efficientnet_lite0", 0), ("resnetv2_50d_frn", None), ("densenet121", 62)]
)
def test_folding_keeps_the_outputs(name, left):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, 3, 64, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model.eval()(x)
        folded = fold_batch_norms(model)
        assert torch.allclose(folded(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    if left is not None:
        assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == left
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
