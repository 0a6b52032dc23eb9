import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from gatefit.commands.cli import app
from gatefit.commands.display import show_deployment
from gatefit.deployment.plan import BlockPlan, Deployment, Latency

ROOT = Path(__file__).parents[2]
EXAMPLE = f"{ROOT}/examples/cifar_resnet.py"
QUICK = """
[model]
name = "MODEL:resnet8"
image_size = 8
[data]
name = "digits"
[baseline]
epochs = 3
batch_size = 64
[finetune]
epochs = 3
batch_size = 64
flip = false
[closing]
target = 0.7
bn_recalibration_images = 500
gate_reinits = 1
"""


def gatefit(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments, exit_code=1):
    """Run a command that must end in one line, without a traceback."""
    result = gatefit(*arguments)
    assert result.exit_code == exit_code, (result.output, result.exception)
    lines = [x for x in result.stderr.strip().splitlines() if x.startswith("gatefit: ")]
    assert len(lines) == 1 and "Traceback" not in result.output + result.stderr
    return lines[0]


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "quick.toml"
    file.write_text(QUICK.replace("MODEL", EXAMPLE))
    return file


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    file = folder / "quick.toml"
    file.write_text(QUICK.replace("MODEL", EXAMPLE))
    result = gatefit("convert", "--recipe", file, "--out", folder / "out", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return folder / "out", json.loads(result.stdout)


def test_the_output_folder(converted):
    folder, report = converted
    assert {f.name for f in folder.iterdir()} == {
        "model.safetensors", "original.safetensors", "config.json", "recipe.toml", "report.json", "report.html",
        *(f"{p}.png" for p in ("accuracy", "macs", "extremes", "gates", "classes", "channels", "training")),
    }  # fmt: skip
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["gated"]["share"] == pytest.approx(0.7, abs=0.02)
    assert report["gated"]["macs_sequential"] < report["gated"]["macs_parallel"] < report["dense"]["macs"]
    assert {"model", "data", "seed"} <= set(report)
    assert [set(g) >= {"name", "block_open", "channel_open"} for g in report["gates"]] == [True] * 3


def test_the_written_recipe_gives_the_same_figures(converted, tmp_path):
    folder, report = converted
    result = gatefit("convert", "--recipe", folder / "recipe.toml", "--out", tmp_path / "again", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == report


def test_evaluate_repeats_the_report(converted):
    folder, report = converted
    result = gatefit("evaluate", folder, "--trust-code", "--json")
    again = json.loads(result.stdout)
    assert again["gated"] == report["gated"] and again["dense"] == report["dense"]
    shown = gatefit("evaluate", folder, "--trust-code")
    assert "original" in shown.stdout and "gated, parallel" in shown.stdout and "█" in shown.stdout
    words = " ".join(shown.stdout.split())
    assert "parallel: beside the block's first layer" in words and "share of the original's MACs:" in words


def test_report(converted, tmp_path):
    folder, _ = converted
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "report.html").unlink()
    result = gatefit("report", other, folder, "--trust-code", "--block", "layer2.0")
    assert result.exit_code == 0 and "report.html" in result.stdout, result.stderr
    assert "layer2.0" in (other / "report.html").read_text()
    assert "there are layer1.0" in refused("report", other, "--trust-code", "--block", "layer9")
    assert "no file" in refused("report", other, tmp_path)
    written = json.loads((other / "report.json").read_text())
    del written["gated"]["macs_parallel"]
    (other / "report.json").write_text(json.dumps(written))
    assert "keys are missing" in refused("report", folder, other)


@pytest.mark.slow
def test_deploy_and_bench(converted, tmp_path):
    folder, _ = converted
    result = gatefit("deploy", folder, "--trust-code")
    assert result.exit_code == 0 and "blocks as deployed" in result.stdout, result.stderr
    assert f"written: {folder / 'deployment.json'}" in result.stdout
    assert json.loads((folder / "deployment.json").read_text())["backend"] == "torch"
    assert re.search(r"an image: \d+\.\d\d ms, in the original \d+\.\d\d ms", result.stdout)
    (folder / "deployment.json").unlink()
    result = gatefit("bench", folder, "--trust-code", "--batch", "1", "--rounds", "2", "--json")
    rows = json.loads(result.stdout)["rows"]
    keys = {"engine", "batch", "threads", "dense_ms", "dynamic_ms", "macs_share", "time_share", "realised"}
    assert rows and all(keys <= set(r) and r["max_abs_diff"] < 1e-3 for r in rows)
    assert json.loads((folder / "bench.json").read_text())["rows"] == rows
    (folder / "bench.json").unlink()
    assert "no folder" in refused("bench", f"{EXAMPLE}:resnet8")
    assert "between 0 and 1" in refused("bench", f"{EXAMPLE}:resnet8", "--what-if", "2")
    placebo = gatefit("bench", f"{EXAMPLE}:resnet8", "--what-if", "1", "--batch", "2", "--rounds", "2", "--json")
    assert all(r["macs_share"] >= 1 and r["max_abs_diff"] < 1e-4 for r in json.loads(placebo.stdout)["rows"])
    assert "--batch must be" in refused("bench", folder, "--batch", "x")
    assert "no file" in refused("deploy", tmp_path)
    harvested = gatefit("deploy", folder, "--trust-code", "--harvest", "--batch", "7", "--placement", "parallel")
    assert harvested.exit_code == 0 and "answers as before on" in harvested.stdout, harvested.stderr
    assert "7 images: " in harvested.stdout
    assert all(b["parallel"] for b in json.loads((folder / "deployment.json").read_text())["blocks"])
    (folder / "deployment.json").unlink()


@pytest.mark.parametrize(("milliseconds", "slower"), [(2.0, False), (3.5, True)])
def test_a_deployment_that_is_slower_than_the_original_says_so(milliseconds, slower):
    console = Console(file=StringIO(), markup=False)
    show_deployment(console, Deployment((), {}, None, Latency(1, milliseconds, 3.0, "onnxruntime")))
    assert ("note: slower than the original" in console.file.getvalue()) == slower


def test_a_deployment_says_which_blocks_are_gathered():
    console = Console(file=StringIO(), markup=False, width=120)
    plans = tuple(BlockPlan(name, False, torch.ones(1, 4, dtype=torch.bool)) for name in ("a", "b"))
    show_deployment(console, Deployment(plans, {"b": True}, None, None))
    first, second = (line for line in console.file.getvalue().splitlines() if line.startswith(("│ a", "│ b")))
    assert "no dynamic form of it was faster" in first and "gathered for each image" not in first
    assert "open units gathered for each image" in second and "yes" in second


def test_inspect():
    result = gatefit("inspect", "test_resnet", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["blocks"] and found["blocks"][0]["macs"] > 0
    assert "under a channel gate" in gatefit("inspect", "test_resnet").stdout
    assert "no residual block" in refused("inspect", "timm/repvgg_a0")
    assert "4 pairs of layers" in gatefit("inspect", "torchvision/vgg11").stdout


def test_json_stays_json_when_a_library_prints(tmp_path):
    file = tmp_path / "chatty.py"
    file.write_text("import torchvision\nprint('hello')\n\ndef build():\n    return torchvision.models.resnet18()\n")
    result = gatefit("inspect", f"{file}:build", "--json")
    assert len(json.loads(result.stdout)["blocks"]) == 8 and "hello" in result.stderr


def test_json_stays_json_when_a_library_prints_at_import():
    noisy = """
import builtins
real = builtins.__import__
def noisy(name, *rest, **more):
    if name == "timm":
        print("noise")
    return real(name, *rest, **more)
builtins.__import__ = noisy
import gatefit
gatefit.retrofit
"""
    done = subprocess.run([sys.executable, "-c", noisy], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "" and "noise" in done.stderr


def test_inspect_of_the_example():
    result = gatefit("inspect", ROOT / "examples" / "own_network.py:build", "--json")
    found = json.loads(result.stdout)
    assert [b["name"] for b in found["blocks"]] == ["1.wide", "1.deep", "4"] and all(
        b["units"] for b in found["blocks"]
    )


def test_models():
    result = gatefit("models", "torchvision/*net18")
    assert result.exit_code == 0 and "torchvision/resnet18" in result.stdout and "1 of 1" in result.stdout
    found, *_ = json.loads(gatefit("models", "timm/repvgg_a0", "--json").stdout)
    assert found["blocks"] == 0 and "side by side" in found["reason"]
    assert "not gated: ..." in gatefit("models", "timm/repvgg_a0").stdout
    assert "no model" in refused("models", "no-such-network")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet81", "--l1", "1e-4", "--data", "digits"], "did you mean resnet"),
        (
            ["torchvision/vgg11", "--l1", "1e-4", "--data", "digits", "--image-size", "32", "--gates", "lc"],
            "no residual block",
        ),
        (["test_resnet", "--l1", "-1", "--data", "digits"], "l1 must be 0 or more"),
        (["test_resnet", "--l1", "1", "--target", "0.5"], "not both"),
        (["test_resnet", "--target", "5", "--data", "digits"], "between 0 and 1"),
        (["test_resnet", "--data", "digits"], "give --l1 X or --target SHARE"),
        ([], "no model"),
        (["test_resnet", "--l1", "1", "--data", "/nowhere/x"], "no folder or tar"),
        (["test_resnet", "--l1", "1", "--recipe", "/nowhere.toml"], "cannot be read"),
        (["test_resnet", "--l1", "1", "--weights", "/nowhere.safetensors"], "no weight file"),
        (["test_resnet", "--l1", "1", "--device", "abacus"], "--device must be"),
        (["test_resnet", "--l1", "1", "--weights", "x", "--pretrained"], "give only one of"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_leaves_nothing(arguments, message, tmp_path):
    out = tmp_path / "out"
    options = arguments or ["--l1", "1"]
    assert message in refused("convert", *options, "--out", out)
    assert not out.exists()


def test_a_command_without_a_model_says_so_first(tmp_path):
    assert "no model" in refused("convert", "--out", tmp_path / "out")


@pytest.mark.parametrize(("epochs", "noted"), [(0, True), (1, False)])
def test_a_network_without_weights_counts_as_untrained_and_convert_says_so(epochs, noted, tmp_path):
    settings = ("data.limit=64", "model.image_size=8", "finetune.batch_size=32", f"baseline.epochs={epochs}",
                "baseline.batch_size=32", "closing.bn_recalibration_images=64")  # fmt: skip
    options = [part for setting in settings for part in ("--set", setting)]
    result = gatefit(
        "convert", f"{EXAMPLE}:resnet8", "--data", "digits", "--epochs", "1", "--target", "0.8", *options,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    assert ("the network counts as untrained" in " ".join(result.stderr.split())) == noted


def test_an_unknown_option_is_an_error():
    result = gatefit("convert", "resnet18", "--l2", "1")
    assert result.exit_code == 2 and "No such option" in result.stderr


def test_classes_that_do_not_fit_an_untrained_network(tmp_path):
    for split in ("train", "val"):
        for name in "abc":
            (tmp_path / "d" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "d" / split / name / "x.png")
    line = refused("convert", f"{EXAMPLE}:resnet8", "--data", tmp_path / "d", "--l1", "1", "--out", tmp_path / "o")
    assert "10 outputs, the data 3 classes" in line and "--weights" in line


def test_output_folders(converted, recipe, tmp_path):
    folder, _ = converted
    assert "exists; choose another --out" in refused("convert", "--recipe", recipe, "--out", folder)
    assert "is complete" in refused("convert", "--recipe", folder / "recipe.toml", "--out", folder, "--resume")
    assert "another recipe" in refused("convert", "--recipe", recipe, "--seed", "4", "--out", folder, "--resume")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("convert", "--recipe", recipe, "--out", tmp_path / "file")


def test_resume_keeps_out_of_folders_that_are_no_runs(recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    assert "not a run of gatefit" in refused("convert", "--recipe", recipe, "--out", tmp_path / "mine", "--resume")
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["precious.txt"]


def test_any_seed_and_odd_names(recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("epochs = 3", "epochs = 1"))
    out = tmp_path / "o[/b]"
    assert gatefit("convert", "--recipe", recipe, "--seed", "123456789", "--out", out).exit_code == 0
    assert gatefit("evaluate", out, "--trust-code").exit_code == 0
    assert "seed must lie" in refused("convert", "--recipe", recipe, "--seed", "-1", "--out", tmp_path / "p")


def test_nan_leaves_the_trained_network_alone(recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("[finetune]\n", "[finetune]\nlr = 1e12\n"))
    assert "not finite" in refused("convert", "--recipe", recipe, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "original.safetensors").is_file() and not (tmp_path / "out" / "config.json").exists()
    recipe.write_text(recipe.read_text().replace("lr = 1e12\n", ""))
    options = ("--weights", tmp_path / "out" / "original.safetensors", "--set", "baseline.epochs=0")
    assert gatefit("convert", "--recipe", recipe, *options, "--out", tmp_path / "next").exit_code == 0


def test_an_error_after_training_loses_nothing(converted, recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def fails(*_args, **_kwargs):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("gatefit.commands.convert.evaluate", fails)
        result = gatefit("convert", "--recipe", recipe, "--out", out)
    assert result.exit_code == 1 and "no space left" in result.stderr and "--resume" in result.stderr
    assert (out / "checkpoint.safetensors").is_file() and not (out / "report.json").exists()
    done = gatefit("convert", "--recipe", recipe, "--out", out, "--resume", "--json")
    assert json.loads(done.stdout) == converted[1]


def test_what_cannot_work_is_refused_before_the_baseline_is_trained(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("gatefit.commands.convert.train_dense", lambda *_args, **_kwargs: pytest.fail("it was trained"))
    recipe.write_text(recipe.read_text().replace("target = 0.7", "target = 0.01"))
    (tmp_path / "out").mkdir()
    assert "cannot be reached" in refused("convert", "--recipe", recipe, "--out", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_labels_of_the_default_images_are_not_those_of_a_trained_network(monkeypatch, tmp_path):
    """Imagenette has ten classes, and so may have a network that was trained on others."""
    from gatefit.inputs.data import read_data

    monkeypatch.setattr("gatefit.commands.convert.read_data", lambda name, *more: read_data(name or "digits", *more))
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "w.pth")
    options = [
        "test_resnet",
        "--weights",
        tmp_path / "w.pth",
        "--l1",
        "1e-4",
        "--epochs",
        "0",
        "--set",
        "data.limit=100",
    ]
    result = gatefit("convert", *options, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["labels"] is False


def test_pretrained_without_a_network_names_the_options(tmp_path, monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", unreachable)
    line = refused("convert", "resnet50", "--pretrained", "--l1", "1e-4", "--out", tmp_path / "out")
    assert "timm/resnet50 could not be fetched" in line and "--weights FILE" in line and "--data DIR" in line


def test_pretrained_from_a_primed_cache(tmp_path, monkeypatch):
    """The real code path of --pretrained, with the file that a download would have left."""
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    original = timm.create_model

    def primed(name, pretrained=False, **kwargs):
        kwargs.setdefault("num_classes", 10)
        overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 10}
        return original(
            name, pretrained=pretrained, **kwargs, **({"pretrained_cfg_overlay": overlay} if pretrained else {})
        )

    monkeypatch.setattr("timm.create_model", primed)
    result = gatefit(
        "convert", "test_resnet", "--pretrained", "--l1", "1e-4", "--data", "digits", "--epochs", "0",
        "--set", "data.limit=100", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "out" / "original.safetensors")
    assert torch.equal(saved["fc.weight"], model.state_dict()["fc.weight"])


def test_no_data_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    def unreachable(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.Imagenette.__init__", unreachable)
    result = gatefit("convert", "test_resnet", "--l1", "1", "--out", tmp_path / "out")
    assert "Imagenette" in result.stderr and "pass --data DIR" in " ".join(result.stderr.split())


def command(recipe, out, *more):
    return [sys.executable, "-m", "gatefit", "convert", "--recipe", str(recipe), "--out", str(out), *more]


def test_killed_and_resumed_ends_as_if_it_had_not_been(converted, recipe, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(command(recipe, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not (out / "checkpoint.safetensors").exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "report.json").exists(), "the run ended before it could be killed"
    done = subprocess.run(command(recipe, out, "--resume", "--json"), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == converted[1]


def test_ctrl_c_says_how_to_go_on(recipe, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(recipe, out),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # What runs in the background may have been told to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    limit = time.monotonic() + 120
    while not (out / "checkpoint-baseline.safetensors").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume to continue" in errors and "Traceback" not in errors


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(recipe, tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in refused("convert", "--recipe", recipe, "--out", tmp_path / "out")


@pytest.mark.slow
def test_launched_by_accelerate(recipe, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    arguments = ["convert", "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "gatefit", *arguments], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["gated"]["share"] == pytest.approx(0.7, abs=0.03)


def test_a_network_that_is_traced_in_parts_is_converted_and_not_deployed(tmp_path):
    """Commands say so before anything is trained."""
    (tmp_path / "own.py").write_text(
        """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.b(self.a(x).relu())

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), Block(), nn.Linear(8, 10)
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3}

    def forward(self, x):
        x = self.stem(x)
        return self.head((self.body(x) if x.mean() < 1e6 else x).mean((2, 3)))

def build():
    torch.manual_seed(0)
    return Net()
"""
    )
    own, out = f"{tmp_path / 'own.py'}:build", tmp_path / "run"
    assert "traced in parts, as the whole cannot be: body" in gatefit("inspect", own).stdout
    options = ["--data", "digits", "--target", "0.8", "--epochs", "0", "--set", "data.limit=64"]
    result = gatefit("convert", own, *options, "--out", out)
    assert result.exit_code == 0 and "gates stand in body" in result.stderr
    assert gatefit("evaluate", out, "--trust-code").exit_code == 0
    assert "cannot be traced as a whole" in refused("deploy", out, "--trust-code")
