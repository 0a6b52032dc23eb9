import json
import subprocess
import sys

import pytest
import timm
import torch
from networks import images, make
from safetensors.torch import load_file, save_file

import gatefit
from gatefit.errors import CheckpointError
from gatefit.gating.info import set_info
from gatefit.inputs.models import ModelReference, build


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    reference = ModelReference("timm", "test_resnet", {"num_classes": 7})
    gated = gatefit.retrofit(build(reference), torch.zeros(2, 3, 64, 64))
    set_info(gated, reference=reference)
    for p in gated.parameters():
        p.data.add_(0.01 * torch.randn_like(p))
    gatefit.save(gated, tmp_path)
    return gated, tmp_path


def test_a_new_process_gets_the_same_bits(saved, tmp_path):
    gated, folder = saved
    x = torch.randn(3, 3, 64, 64)
    save_file({"x": x, "y": gated(x).detach()}, folder / "io.safetensors")
    code = (
        "import sys, torch, gatefit; from safetensors.torch import load_file;"
        "d = sys.argv[1]; t = load_file(d + '/io.safetensors');"
        "sys.exit(not torch.equal(gatefit.load(d)(t['x']), t['y']))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0


def test_an_own_network_is_loaded_into_its_architecture(tmp_path):
    gated = gatefit.retrofit(make("grouped"), images(), "c", "step", compensation=True)
    gatefit.save(gated, tmp_path)
    assert torch.equal(gatefit.load(tmp_path, make("grouped", seed=5))(images()), gated(images()))
    with pytest.raises(CheckpointError, match="network of your own"):
        gatefit.load(tmp_path)
    with pytest.raises(CheckpointError, match="do not fit the network"):
        gatefit.load(tmp_path, make("basic"))


def test_truncated_weights(saved):
    _, folder = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        gatefit.load(folder)


def test_tampered_weights(saved):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    tensors["fc.bias"] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not the file"):
        gatefit.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["gated"].pop("blocks"), "keys are missing"),
        (lambda c: c.update(format=99), "has format 99"),
        (lambda c: c["gated"]["blocks"].pop(), "was changed after it was saved"),
    ],
)
def test_tampered_config(saved, change, message):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        gatefit.load(folder)


def test_missing_and_damaged_config(saved, tmp_path):
    _, folder = saved
    with pytest.raises(CheckpointError, match="no file"):
        gatefit.load(tmp_path / "none")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        gatefit.load(folder)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    gated = gatefit.retrofit(make("basic"), images())
    gatefit.save(gated, tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        gatefit.save(gated, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_networks_that_timm_or_torchvision_made_need_no_reference(tmp_path):
    gated = gatefit.retrofit(timm.create_model("test_resnet", num_classes=5).eval(), torch.zeros(2, 3, 64, 64))
    gatefit.save(gated, tmp_path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(gatefit.load(tmp_path)(x), gated(x))


@pytest.mark.parametrize("kind", ["deployed", "plain"])
def test_what_takes_gated_networks_names_what_it_was_given(tmp_path, kind):
    x = images()
    network = make("basic")
    message = r"has no gates; call gatefit\.retrofit"
    if kind == "deployed":
        network = gatefit.deploy(gatefit.retrofit(network, x, "c", "step").eval(), x, tuned=False)
        message = "is deployed, for running alone; pass the gated network"
    data = (x, torch.zeros(len(x), dtype=torch.int64))
    for call in (
        lambda: gatefit.evaluate(network, data),
        lambda: gatefit.finetune(network, data, target=0.5),
        lambda: gatefit.save(network, tmp_path / "run"),
        lambda: gatefit.save_pretrained(network, tmp_path / "run"),
        lambda: gatefit.deploy(network, x),
        lambda: gatefit.push_to_hub(network, "me/run"),
    ):
        with pytest.raises(gatefit.GatefitError, match=message):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["file", "file/below", "nul\0l", "x" * 300])
def test_places_that_cannot_be_written_end_in_one_line(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    gated = gatefit.retrofit(make("basic"), images(), "c")
    for call in (lambda: gatefit.save(gated, tmp_path / name), lambda: gatefit.load(tmp_path / name)):
        with pytest.raises(CheckpointError) as refused:
            call()
        assert "\n" not in str(refused.value)
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("model", [3, torch.nn.Linear])
def test_what_is_no_network_is_refused(tmp_path, model):
    gatefit.save(gatefit.retrofit(make("basic"), images(), "c"), tmp_path)
    with pytest.raises(CheckpointError, match="model must be the original network"):
        gatefit.load(tmp_path, model)
