"""A sample of timm and torchvision, one network of each family: converted, checked, trained for one step."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest

from gatefit.commands.coverage import cover

TIMM = [
    "bat_resnext26ts", "botnet26t_256", "cait_xxs24_224", "coat_lite_tiny", "convmixer_768_32", "convnext_atto",
    "convnextv2_atto", "crossvit_tiny_240", "cs3darknet_s", "cspresnet50", "deit_tiny_patch16_224", "dla46_c",
    "eca_nfnet_l0", "ecaresnet26t", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0",
    "efficientnet_b0", "efficientnet_lite0", "efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_dw",
    "fasternet_t0", "fastvit_t8", "fbnetc_100", "gcvit_xxtiny", "gernet_s", "ghostnet_050", "gmlp_s16_224",
    "hgnetv2_b0", "hrnet_w18_small", "inception_next_atto", "legacy_seresnet18", "levit_128s", "mambaout_femto",
    "mixer_s32_224", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobilevit_xxs",
    "mobilevitv2_050", "nf_resnet26", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnetx_002", "regnety_002",
    "repghostnet_050", "repvit_m0_9", "res2net50_14w_8s", "resmlp_12_224", "resnest14d", "resnet18", "resnetv2_18",
    "resnext26ts", "seresnet18", "shvit_s1", "skresnet18", "starnet_s050", "swiftformer_xs", "tiny_vit_5m_224",
    "tinynet_e", "tresnet_m", "vit_tiny_patch16_224", "xcit_nano_12_p16_224",
]  # fmt: skip
TORCHVISION = [
    "efficientnet_b0", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18",
    "shufflenet_v2_x0_5", "swin_t",
]  # fmt: skip
WITHOUT_BLOCKS = ["timm/densenet121", "timm/vgg11"]
"""Pairs of layers are gated in them."""
NAMES = [*WITHOUT_BLOCKS, *(f"timm/{n}" for n in TIMM), *(f"torchvision/{n}" for n in TORCHVISION)]

REFUSED = {
    "timm/repvgg_a0": "side by side",
}


@functools.cache
def _benchmark():
    file = Path(__file__).parent.parent / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("benchmarks_coverage", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ANOTHER_WAY_AT_OTHER_SIZES = {"timm/efficientvit_m0"}
"""It divides into windows only what is larger than one."""


QUICK = NAMES[::9]
"""One network in nine; the others are slow."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NAMES if n not in REFUSED]
)
def test_converted_and_trained(name):
    done = _benchmark().check(name)
    assert done == "passed" or (name in ANOTHER_WAY_AT_OTHER_SIZES and done.startswith("passed at one size"))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    assert REFUSED[name] in cover(name).reason


def test_a_run_that_was_broken_off_goes_on(tmp_path):
    kept = tmp_path / "coverage.part.jsonl"
    known = {"coverage": {"name": "timm/known", "family": "none", "blocks": 3}, "seconds": 1.0, "checked": "passed"}
    kept.write_text(f'\n{json.dumps(known)}\n{{"cover')
    [outcome] = _benchmark().run(["timm/known"], 1e9, 1, kept)
    assert outcome.coverage.blocks == 3 and outcome.checked == "passed"
    known["checked"] = ""  # of a run without checks
    kept.write_text(json.dumps(known) + "\n")
    assert _benchmark()._kept(kept, checked=True) == {} and len(_benchmark()._kept(kept, checked=False)) == 1
