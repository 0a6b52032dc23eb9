"""What convert, deploy and save write fits the JSON Schemas of the package, and the schemas name every key."""

import copy
import json
import shutil
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import torch
from networks import images, make
from typer.testing import CliRunner

import gatefit
from gatefit.commands.cli import app
from gatefit.commands.deploy import load_deployed, write_deployment
from gatefit.commands.report.result import read_result
from gatefit.folder import read_config

ROOT = Path(__file__).parent.parent.parent
QUICK = f"""
[model]
name = "{ROOT / "examples" / "cifar_resnet.py"}:resnet8"
image_size = 8
[data]
name = "digits"
limit = 200
[baseline]
epochs = 1
batch_size = 64
[finetune]
epochs = 1
batch_size = 64
flip = false
[closing]
target = 0.7
bn_recalibration_images = 200
gate_reinits = 0
reconstruction_images = 100
"""


def schema(name):
    content = json.loads(files("gatefit").joinpath("schemas", f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(content)
    return jsonschema.Draft202012Validator(content)


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schemas")
    (folder / "quick.toml").write_text(QUICK)
    out = folder / "out"
    for command in (["convert", "--recipe", folder / "quick.toml", "--out", out], ["deploy", out]):
        result = CliRunner().invoke(app, [str(a) for a in command])
        assert result.exit_code == 0, (result.output, result.stderr)
    return out


@pytest.mark.parametrize("name", ["config", "report", "deployment"])
def test_what_convert_and_deploy_write_fits(converted, name):
    schema(name).validate(read(converted, name))


def test_what_convert_knows_stands_in_the_config(converted):
    config, report = read_config(converted), read(converted, "report")
    assert config.classes == tuple("0123456789") and set(config.files) == {"model.safetensors", "original.safetensors"}
    assert config.figures.accuracy == report["gated"]["accuracy"] and config.figures.share == report["gated"]["share"]
    assert config.figures.original_macs == report["dense"]["macs"] and config.figures.data == "digits"
    assert read_result(converted).report == report


def test_a_network_saved_from_python_fits(tmp_path):
    gatefit.save(gatefit.retrofit(make("basic"), images()), tmp_path)
    schema("config").validate(read(tmp_path, "config"))


def test_an_onnx_deployment_fits(tmp_path):
    pytest.importorskip("onnxruntime")
    gated = gatefit.retrofit(make("basic"), images(), "c", "step").eval()
    deployed = gatefit.deploy(gated, torch.randn(4, *images().shape[1:]), "onnx", tuned=False)
    gatefit.save(gated, tmp_path)
    write_deployment(tmp_path, deployed.plans, model=deployed.model, onnx=tmp_path / "model.onnx")
    schema("deployment").validate(read(tmp_path, "deployment"))
    schema("config").validate(read(tmp_path, "config"))


def test_the_command_keeps_both_onnx_files(converted, tmp_path):
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "out"
    shutil.copytree(converted, folder)
    result = CliRunner().invoke(app, ["deploy", str(folder), "--backend", "onnx"])
    assert result.exit_code == 0, (result.output, result.stderr)
    assert set(read_config(folder).files) == {
        "model.safetensors", "original.safetensors", "model.onnx", "model-masked.onnx",
    }  # fmt: skip
    schema("config").validate(read(folder, "config"))
    x = torch.randn(2, 3, 8, 8)
    before = load_deployed(folder)(x)
    shutil.move(folder, tmp_path / "deeper" / "still")
    assert torch.equal(load_deployed(tmp_path / "deeper" / "still")(x), before)
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "deeper" / "still")])
    assert result.exit_code == 1 and "which builds the network of" in result.stderr


def objects(node, path=()):
    """Every schema of an object with named keys, with the keys that lead there."""
    if isinstance(node, dict):
        if "properties" in node and node.get("type") == "object":
            yield path, node
        for key, value in node.items():
            yield from objects(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from objects(value, (*path, i))


@pytest.mark.parametrize("name", ["config", "report", "deployment"])
def test_schemas_describe_every_key_and_take_no_other(converted, name):
    checked, content = schema(name), read(converted, name)
    for path, part in objects(checked.schema):
        if "if" in path or "then" in path or "else" in path:
            continue
        assert part["additionalProperties"] is False, path
        assert all(p.get("description") or "oneOf" in p for p in part["properties"].values()), path
    for key in content:
        assert not checked.is_valid({k: v for k, v in content.items() if k != key}), key
    assert not checked.is_valid({**content, "more": 1})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config", lambda c: c["input"].update(shape=[3, 0])),
        ("config", lambda c: c.update(kind="other")),
        ("config", lambda c: c["files"].update({"model.safetensors": "abc"})),
        ("config", lambda c: c["gated"].update(form="soft")),
        ("report", lambda c: c["gated"].update(accuracy=80)),
        ("report", lambda c: c["gates"][0].update(units=1.5)),
        ("deployment", lambda c: c.update(file={"name": "/models/model.onnx", "sha256": "0" * 64})),
        ("deployment", lambda c: c["blocks"][0].update(codebook=[[-1]])),
    ],
)
def test_schemas_refuse_other_values(converted, name, change):
    content = copy.deepcopy(read(converted, name))
    change(content)
    assert not schema(name).is_valid(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("history"),
        lambda c: c.update(history=3),
        lambda c: c.update(history=[3]),
        lambda c: c.update(gated=None),
        lambda c: c["history"][0].pop("share"),
    ],
)
def test_a_damaged_report_ends_in_one_line(converted, tmp_path, change):
    content = copy.deepcopy(read(converted, "report"))
    change(content)
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(gatefit.GatefitError, match="keys are missing"):
        read_result(tmp_path)


@pytest.mark.parametrize("name", ["config", "report", "deployment"])
def test_the_docs_describe_every_key(name):
    text = (ROOT / "docs" / "folder.md").read_text()
    keys = {key for _, part in objects(schema(name).schema) for key in part["properties"]}
    assert not {key for key in keys if f"`{key}`" not in text and f"`{key}." not in text and f".{key}`" not in text}
