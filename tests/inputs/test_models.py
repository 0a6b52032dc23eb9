from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from gatefit.errors import ModelError
from gatefit.inputs.models import build, input_spec, load_weights, parse_reference, recognise

EXAMPLE = Path(__file__).parents[2] / "examples" / "cifar_resnet.py"


@pytest.mark.parametrize(
    ("text", "source", "name"),
    [
        ("resnet18", "timm", "resnet18"),
        ("timm/resnet18", "timm", "resnet18"),
        ("torchvision/resnet18", "torchvision", "resnet18"),
        ("googlenet", "torchvision", "googlenet"),
    ],
)
def test_references(text, source, name):
    reference = parse_reference(text)
    assert (reference.source, reference.name) == (source, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet81", "did you mean resnet"),
        ("torchvision/resnt50", "did you mean resnet50"),
        ("timm/googlenet", "no model 'timm/googlenet'"),
        ("nowhere.py:f", "no file 'nowhere.py'"),
        ("nets/mine.py", "name the function in it that builds the network: nets/mine.py:FUNCTION"),
    ],
)
def test_misspelt_models(text, message):
    with pytest.raises(ModelError, match=message):
        parse_reference(text)


def test_own_files(tmp_path):
    assert input_spec(build(parse_reference(f"{EXAMPLE}:resnet8"))).shape == (3, 32, 32)
    with pytest.raises(ModelError, match="has no function 'resnet9'; did you mean resnet8"):
        build(parse_reference(f"{EXAMPLE}:resnet9"))
    (tmp_path / "m.py").write_text("def f():\n    return 3\ndef g():\n    raise ValueError('no')\n")
    with pytest.raises(ModelError, match="returned int"):
        build(parse_reference(f"{tmp_path}/m.py:f"))
    with pytest.raises(ModelError, match="cannot be built: no"):
        build(parse_reference(f"{tmp_path}/m.py:g"))
    (tmp_path / "m.py").write_text("def f(:\n")
    with pytest.raises(ModelError, match="cannot be imported"):
        build(parse_reference(f"{tmp_path}/m.py:f"))


def test_pretrained_without_a_network(monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ModelError, match=r"weights of timm/resnet50 could not be fetched .*--weights FILE"):
        build(parse_reference("resnet50"), pretrained=True)


def test_weight_files(tmp_path):
    model = build(parse_reference("test_resnet"))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        other = build(parse_reference("test_resnet"))
        load_weights(other, tmp_path / file)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


def test_weights_that_do_not_fit(tmp_path):
    model = build(parse_reference("test_resnet"))
    state = model.state_dict()
    save_file({k: v for k, v in state.items() if k != "conv1.0.weight"}, tmp_path / "missing.safetensors")
    save_file({**state, "more": torch.zeros(1)}, tmp_path / "more.safetensors")
    save_file({**state, "fc.bias": torch.zeros(3)}, tmp_path / "shape.safetensors")
    for file, message in (
        ("missing", "keys are missing: conv1.0.weight"),
        ("more", "keys are unknown: more"),
        ("shape", r"fc.bias is \(3,\), not \(1000,\)"),
        ("none", "no weight file"),
    ):
        with pytest.raises(ModelError, match=message):
            load_weights(model, tmp_path / f"{file}.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be read as weights"):
        load_weights(model, tmp_path / "bad.pth")


class Hostile:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save({"state_dict": Hostile()}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="cannot be read as weights"):
        load_weights(build(parse_reference("test_resnet")), tmp_path / "w.pth")
    assert "unpickled" not in capsys.readouterr().out


def test_recognise():
    assert recognise(timm.create_model("resnet18", num_classes=3)).arguments == {"num_classes": 3}
    found = recognise(torchvision.models.resnext50_32x4d(num_classes=4))
    assert (found.source, found.name, found.arguments) == ("torchvision", "resnext50_32x4d", {"num_classes": 4})
    assert recognise(torch.nn.Linear(2, 2)) is None
