"""The input of own networks on the command line: what is assumed, stated and refused."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from gatefit.commands.cli import app
from gatefit.formats import folder_name

NETWORK = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.b(torch.relu(self.a(x))))

def make(channels):
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), Block(), *head)

def build():
    return make(3)

def grey():
    return make(1)

def rgba():
    return make(4)

def many():
    return make(13)
"""
QUICK = ("--target", "0.8", "--epochs", "1", "--set", "finetune.batch_size=4", "--set", "closing.gate_reinits=0")


def gatefit(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def done(*arguments):
    result = gatefit(*arguments)
    assert result.exit_code == 0, (result.output, result.stderr, result.exception)
    return result


def refused(*arguments):
    result = gatefit(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("gatefit: ")]
    assert result.exit_code == 1 and len(lines) == 1, (result.output, result.exception)
    return lines[0]


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    return tmp_path / "net.py"


@pytest.fixture
def photos(tmp_path):
    torch.manual_seed(0)
    for split, count in (("train", 8), ("val", 12)):
        for label in ("cat", "dog"):
            (tmp_path / "photos" / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (16, 16, 4), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / "photos" / split / label / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("command", [["inspect"], ["bench", "--what-if", "0.5", "--rounds", "1", "--batch", "1"]])
def test_the_input_is_said_first(net, command, monkeypatch):
    if command[0] == "bench":
        from gatefit.errors import GatefitError

        def stop(*_args, **_options):
            raise GatefitError("stopped")

        monkeypatch.setattr("gatefit.commands.bench.retrofit", stop)
    lines = gatefit(*command, f"{net}:build").stderr.splitlines()
    assert lines[1].startswith("input: 224x224 pixels, 3 channels, mean 0.485") and "(assumed)" in lines[1]
    lines = gatefit(
        *command, f"{net}:build", "--image-size", "16", "--mean", "0.5", "--std", ".2,.3,.4"
    ).stderr.splitlines()
    assert lines[1] == "input: 16x16 pixels, 3 channels, mean 0.5, std 0.2 0.3 0.4 (as stated)"
    assert "--mean must be a number" in refused(*command, f"{net}:build", "--mean", "x")
    assert "--image-size must lie" in refused(*command, f"{net}:build", "--image-size", "-1")


@pytest.mark.parametrize(("function", "channels"), [("grey", 1), ("rgba", 4), ("many", 13)])
def test_inspect_takes_any_number_of_channels(net, function, channels):
    result = done("inspect", f"{net}:{function}", "--image-size", "16", "--json")
    assert len(json.loads(result.stdout)["blocks"]) == 1
    assert f"16x16 pixels, {channels} channel" in result.stderr


def test_images_of_another_size_than_the_assumed_one_are_refused(net, photos, tmp_path):
    command = ("convert", f"{net}:build", "--data", photos, *QUICK, "--out", tmp_path / "out")
    line = refused(*command)
    assert "16 pixels" in line and "224 was assumed; pass --image-size" in line and not (tmp_path / "out").exists()
    net.write_text(NETWORK.replace("return make(3)", "n = make(3); n.pretrained_cfg = {'input_size': 32}; return n"))
    assert "input: 32x32 pixels, 3 channels (from the network's pretrained_cfg)" in " ".join(
        done(*command).stderr.split()
    )


@pytest.mark.parametrize(("function", "channels"), [("grey", 1), ("rgba", 4)])
def test_convert_one_and_four_channels(net, photos, tmp_path, function, channels):
    out = tmp_path / "out"
    stated = ("--image-size", "16", "--mean", "0.5", "--std", "0.25", "--trained")
    result = done("convert", f"{net}:{function}", "--data", photos, *stated, *QUICK, "--out", out)
    text = " ".join(result.stderr.split())
    assert f"input: 16x16 pixels, {channels} channel" in text and "untrained" not in text
    assert json.loads((out / "config.json").read_text())["input"]["mean"] == [0.5] * channels
    report = json.loads((out / "report.json").read_text())
    assert report["gated"]["agreement"] is not None and report["dense"]["accuracy"] is not None
    assert "that of guessing" in text  # random weights, which --trained took for trained ones
    evaluated = done("evaluate", out, "--trust-code", "--json")
    assert json.loads(evaluated.stdout)["gated"] == report["gated"]
    assert "from the folder's config.json" in evaluated.stderr.splitlines()[1]
    assert "says its own input" in refused("bench", out, "--image-size", "8")


def test_convert_refuses_files_for_other_channels(net, photos, tmp_path):
    line = refused("convert", f"{net}:many", "--data", photos, "--image-size", "16", *QUICK, "--out", tmp_path / "out")
    assert "takes 13 channels, and image files give 1, 3 or 4" in line


def test_trained_is_for_own_functions(net, photos, tmp_path):
    assert "--trained is for a function" in refused("convert", "test_resnet", "--trained", *QUICK, "--data", photos)
    assert "give only one of" in refused("convert", f"{net}:build", "--trained", "--weights", "x", *QUICK)


def test_random_weights_of_a_named_network_are_told(photos, tmp_path, monkeypatch):
    from gatefit.errors import GatefitError

    def stop(*_args, **_options):
        raise GatefitError("stopped")

    monkeypatch.setattr("gatefit.commands.convert.read_data", stop)
    result = gatefit("convert", "test_resnet", "--l1", "1e-4", "--out", tmp_path / "out")
    text = " ".join(result.stderr.split())
    assert "the weights of timm/test_resnet are random" in text and "--pretrained, or --weights FILE" in text
    assert "on its labels" in text and "needs no labels" not in text


def test_a_file_without_a_function_says_what_it_has(net):
    net.write_text(NETWORK + "\nopen('/nowhere/x', 'w')\n")  # not run
    for text in (net, f"{net}:"):
        assert "add :FUNCTION; it has Block, make, build, grey, rgba, many" in refused("inspect", text)
    net.write_text("def (")
    assert f"{net}:FUNCTION" in refused("inspect", net)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("../proj/mynet.py:build", "mynet-build"),
        ("/home/me/mynet.py:build", "mynet-build"),
        ("torchvision/resnet50", "torchvision-resnet50"),
        ("hf-hub:user/net.v1", "hf-hub-user-net.v1"),
        ("", "model"),
    ],
)
def test_names_of_run_folders(model, name):
    assert folder_name(model) == name


def test_paths_in_the_recipe_are_normalised(net, photos, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done("convert", "../net.py:build", "--data", "../here/../photos", "--image-size", "16", *QUICK)
    text = (tmp_path / "here" / "runs" / "net-build" / "recipe.toml").read_text()
    assert 'name = "../../../net.py:build"' in text and 'name = "../../../photos"' in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "²"], "--batch must be sizes"),
        (["--batch", "999999999"], "--batch must be sizes from 1 to 4096"),
        (["--batch", "0"], "--batch must be sizes from 1"),
        (["--batch", ""], "--batch must be sizes"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--threads", "-1"], "--threads must be 0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(net, options, message):
    assert message in refused("bench", f"{net}:build", "--what-if", "0.5", "--image-size", "16", *options)


@pytest.mark.parametrize("option", ["--batch", "--masks"])
def test_deploy_refuses_numbers_out_of_range(tmp_path, option):
    for value in ("0", "999999999"):
        assert f"{option} must lie between 1 and 4096" in refused("deploy", tmp_path, option, value)
