"""Networks of Hugging Face's transformers and of ultralytics, from tiny configurations, without a download.

They need the extra `test-foreign`; without it the tests skip and say so.
"""

import pytest
import torch
from networks import images
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import gatefit
from gatefit.gating.cost import costs_of
from gatefit.gating.gates import gates_of
from gatefit.graph.partial import parts_of
from gatefit.recipe import ClosingPart, FinetunePart

WHY = "it is in the extra: pip install '.[test-foreign]'"
ATTENTION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {"image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 2, 1], "embedding_size": 8}
TRANSFORMERS = {
    "ConvNext": ({"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1], "layer_scale_init_value": 0.5}, (5, 5)),
    "ViT": ({**ATTENTION, **PATCHES, "intermediate_size": 32}, (4, 2)),
    "DeiT": ({**ATTENTION, **PATCHES, "intermediate_size": 32}, (4, 2)),
    "Swin": ({"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}, (8, 4)),
    "RegNet": ({**STAGES, "groups_width": 4}, (5, 5)),
    "Bit": ({**STAGES, "num_groups": 4}, (5, 5)),
    "ResNet": (STAGES, (5, 5)),
    "Dinov2": ({**ATTENTION, **PATCHES, "mlp_ratio": 2}, (4, 2)),
}
"""By name: its configuration, and how many blocks and how many channel gates there are."""
ULTRALYTICS = {"yolov8n-cls": (6, 6), "yolo11n-cls": (8, 8), "yolov8n": (6, 6), "yolo11n": (13, 13)}


def _of_transformers(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5.0", reason=WHY)
    settings = {**TRANSFORMERS[name][0], "num_labels": 5}
    if name == "Swin":
        settings["window_size"] = 4
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}ForImageClassification")(config).eval()


def _of_ultralytics(name: str) -> nn.Module:
    tasks = pytest.importorskip("ultralytics.nn.tasks", reason=WHY)
    torch.manual_seed(0)
    kind = tasks.ClassificationModel if name.endswith("-cls") else tasks.DetectionModel
    return kind(f"{name}.yaml", ch=3, nc=5, verbose=False).eval()


def _check(model: nn.Module, size: int, blocks: int, channel_gates: int) -> nn.Module:
    gated = gatefit.retrofit(model, images(2, size), "lc").eval()
    gates = list(gates_of(gated).values())
    assert (len(gates), sum(g.channel is not None for g in gates)) == (blocks, channel_gates)
    wanted, actual = model(images(3, size)), gated(images(3, size))
    assert type(wanted) is type(actual)
    for a, b in zip(tree_flatten(wanted)[0], tree_flatten(actual)[0], strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    costs = costs_of(gated, (3, size, size))
    assert costs.dense == gatefit.find_blocks(model, images(2, size)).macs > sum(b.branch for b in costs.blocks) > 0
    return gated


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_networks_of_transformers(name):
    _check(_of_transformers(name), 32, *TRANSFORMERS[name][1])


@pytest.mark.parametrize("name", ULTRALYTICS)
def test_networks_of_ultralytics(name):
    _check(_of_ultralytics(name), 64, *ULTRALYTICS[name])


class Doubtful(nn.Module):
    """A network of transformers behind Python that no tracer follows."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = _of_transformers(name)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.inner(x, output_hidden_states=True)
        assert outputs.hidden_states[-1].isfinite().all()
        return outputs.logits


@pytest.mark.parametrize("name", ["ConvNext", "ViT", "Swin"])
def test_a_network_of_transformers_as_a_part(name, tmp_path):
    model = Doubtful(name).eval()
    gated = gatefit.retrofit(model, images(2, 32), "lc", form="step").eval()
    assert list(parts_of(gated)) == ["inner"] and len(gates_of(gated)) == TRANSFORMERS[name][1][0]
    wanted, actual = (m.inner(images(2, 32), output_hidden_states=True).hidden_states for m in (model, gated))
    assert len(wanted) == len(actual) > 2 and all(torch.equal(a, b) for a, b in zip(wanted, actual, strict=True))
    gatefit.save(gated, tmp_path)
    again = gatefit.load(tmp_path, Doubtful(name))
    assert torch.equal(again(images(2, 32)), gated(images(2, 32)))


def test_a_network_of_transformers_is_trained():
    model = _of_transformers("RegNet")
    data = (images(64, 32), torch.arange(64) % 5)
    gated = gatefit.retrofit(model, images(2, 32), "c", "step", compensation=True)
    closing = ClosingPart(target=0.7)
    gatefit.finetune(gated, data, model, settings=FinetunePart(epochs=1, batch_size=16, augment=False), closing=closing)
    assert gatefit.evaluate(gated, data, model).share < 0.8
