"""timm's names of networks on the Hugging Face Hub, from a cache that was filled beforehand."""

import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from typer.testing import CliRunner

import gatefit
from gatefit.commands.cli import app
from gatefit.errors import ModelError
from gatefit.folder import read_config
from gatefit.inputs.models import ModelReference, build, from_registry, input_spec, parse_reference

NAME = "hf-hub:someone/tiny.digits"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache that holds one network of 10 classes for images of 32 pixels, and no way to fetch another."""
    torch.manual_seed(3)
    network = timm.create_model("test_resnet", num_classes=10)
    place = tmp_path / "cache" / "models--someone--tiny.digits"
    snapshot = place / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    save_file(network.state_dict(), snapshot / "model.safetensors")
    config = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 1.0,
              "interpolation": "bilinear", "num_classes": 10, "first_conv": "conv1.0", "classifier": "fc"}  # fmt: skip
    (snapshot / "config.json").write_text(
        json.dumps({"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": config})
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return network.eval()


@pytest.mark.parametrize("text", [NAME, "hf_hub:someone/tiny.digits"])
def test_names_on_the_hub_are_passed_to_timm(cached, text):
    reference = parse_reference(text)
    assert str(reference) == NAME and reference.on_hub
    built, x = build(reference, pretrained=True), torch.randn(2, 3, 32, 32)
    assert torch.equal(built(x), cached(x))
    spec = input_spec(built)
    assert (spec.shape, spec.mean, spec.std, spec.crop) == ((3, 32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1.0)


def test_reading_a_name_reaches_no_network(monkeypatch):
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *a, **k: pytest.fail("fetched"))
    assert parse_reference("hf-hub:timm/resnet18.a1_in1k@main").name == "hf-hub:timm/resnet18.a1_in1k@main"


@pytest.mark.parametrize("text", ["hf-hub:", "hf-hub:name", "hf-hub:a/b/c", "hf_hub:../x/y"])
def test_names_that_cannot_be_on_the_hub(text):
    with pytest.raises(ModelError, match="names no network on the Hugging Face Hub"):
        parse_reference(text)


@pytest.mark.parametrize("pretrained", [True, False])
def test_what_cannot_be_fetched_ends_in_one_line(cached, pretrained):
    with pytest.raises(ModelError, match=r"hf-hub:someone/none could not be fetched") as refused:
        build(parse_reference("hf-hub:someone/none"), pretrained=pretrained)
    assert "\n" not in str(refused.value)


def test_what_a_hub_name_stands_for(cached):
    assert from_registry(parse_reference(NAME)) == ModelReference("timm", "test_resnet", {"num_classes": 10})
    five = ModelReference("timm", NAME, {"num_classes": 5})
    assert from_registry(five) == ModelReference("timm", "test_resnet", {"num_classes": 5})
    gone = ModelReference("timm", "hf-hub:someone/none")
    assert from_registry(gone) == gone


def test_convert_takes_a_name_on_the_hub_and_its_folder_needs_no_hub(cached, tmp_path, monkeypatch):
    out = tmp_path / "out"
    recipe = tmp_path / "quick.toml"
    recipe.write_text(
        '[data]\nname = "digits"\nlimit = 100\n[finetune]\nepochs = 1\nbatch_size = 50\n[closing]\ntarget = 0.8\n'
        "reconstruction_images = 0\nbn_recalibration_images = 0\n[distillation]\nfeature_weight = 0.0\n"
    )
    arguments = ["convert", NAME, "--pretrained", "--recipe", str(recipe), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.stderr)
    assert read_config(out).model == {"source": "timm", "name": "test_resnet", "arguments": {"num_classes": 10}}
    assert read_config(out).input["mean"] == [0.1, 0.2, 0.3]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    assert gatefit.load(out)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert json.loads(Path(out / "report.json").read_text())["model"] == NAME


def test_a_command_that_cannot_fetch_ends_in_one_line(cached):
    result = CliRunner().invoke(app, ["inspect", "hf-hub:someone/none"])
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("gatefit: ")]
    assert len(lines) == 1 and "could not be fetched from the Hugging Face Hub" in lines[0]
