"""config.json: what it keeps, what it refuses, and folders of format 1."""

import hashlib
import json
import shutil

import pytest
import torch
from networks import images, make
from safetensors.torch import load_file, save_file

import gatefit
from gatefit.commands.opened import open_folder
from gatefit.errors import CheckpointError
from gatefit.files import json_digest, write_tensors
from gatefit.folder import Figures, read_config
from gatefit.gating.checkpoint import record_file
from gatefit.gating.gates import gates_of
from gatefit.gating.info import info_of, set_info
from gatefit.gating.original import load_original
from gatefit.inputs.models import ModelReference, build

FIGURES = Figures("digits", 360, 0.9, 0.95, 1200.0, 0.6, 0.92, 2000)
FORMAT_1_NAMES = {"compensation.weight": "fill.weight", "threshold": "lowered"}


def gated_resnet(form="step", gates="lc"):
    """A gated timm network whose gates close some units and leave something behind for them."""
    reference = ModelReference("timm", "test_resnet", {"num_classes": 7})
    gated = gatefit.retrofit(build(reference), torch.zeros(2, 3, 64, 64), gates, form, compensation=True).eval()
    set_info(gated, reference=reference)
    for gate in gates_of(gated).values():
        for fc in gate.layers:
            torch.nn.init.normal_(fc.weight, std=2.0)
        torch.nn.init.normal_(gate.compensation.weight)
        gate.threshold.uniform_()
    return gated


def write_format_1(gated, folder):
    """Write a folder as gatefit 0.1 did: other names of gates' tensors, one flat config.json, no hash of its own."""
    tensors = {}
    for key, value in gated.state_dict().items():
        for now, then in FORMAT_1_NAMES.items():
            key = key.removesuffix(now) + then if key.startswith("gatefit.") and key.endswith(f".{now}") else key
        tensors[key] = value.contiguous()
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    names = f"{gated.code}{gated}".replace("gatefit_graph_ops_", "gatefit_gates_")
    names = names.replace("add_compensation", "add_fill").replace("(compensation)", "(fill)")
    reference, spec = info_of(gated).reference, info_of(gated).input
    config = {
        "format": 1,
        "model": {"source": reference.source, "name": reference.name, "arguments": reference.arguments},
        "input": {
            "shape": spec.shape, "mean": spec.mean, "std": spec.std,
            "crop": spec.crop, "interpolation": spec.interpolation,
        },
        "gates": info_of(gated).gates,
        "form": next(iter(gates_of(gated).values())).form,
        "fill": info_of(gated).compensation,
        "blocks": [{"name": n, "features": g.of.features, "units": g.of.units} for n, g in gates_of(gated).items()],
        "architecture": hashlib.sha256(names.encode()).hexdigest(),
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "versions": {"torch": "2.6", "timm": "1.0.20", "torchvision": "0.21", "python": "3.11"},
        "recipe": {"seed": 0},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def edit(folder, change, seal=False):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    if seal:
        config["digest"] = json_digest({k: v for k, v in config.items() if k != "digest"})
    file.write_text(json.dumps(config))


@pytest.fixture
def saved(tmp_path):
    gated = gated_resnet()
    gatefit.save(gated, tmp_path, classes=list("abcdefg"), figures=FIGURES)
    return gated, tmp_path


def test_what_a_config_keeps(saved):
    _, folder = saved
    config = read_config(folder)
    assert (config.kind, config.format, config.figures, config.classes) == ("gated", 2, FIGURES, tuple("abcdefg"))
    assert config.input["shape"] == [3, 64, 64] and config.model["name"] == "test_resnet"
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert config.files == {"model.safetensors": weights}
    assert config.versions["torch"] == torch.__version__ and config.versions["gatefit"] == gatefit.__version__


@pytest.mark.parametrize(("form", "gates"), [("step", "lc"), ("relu1", "c")])
def test_folders_of_format_1_give_the_same_bits(tmp_path, form, gates):
    gated = gated_resnet(form, gates)
    write_format_1(gated, tmp_path)
    assert {k.rpartition("gatefit.")[2].split(".", 1)[1] for k in load_file(tmp_path / "model.safetensors")} >= {
        "fill.weight", "lowered",
    }  # fmt: skip
    x = torch.randn(6, 3, 64, 64)
    loaded = gatefit.load(tmp_path)
    assert torch.equal(loaded(x), gated(x))
    gatefit.save(loaded, tmp_path / "anew")
    assert torch.equal(gatefit.load(tmp_path / "anew")(x), gated(x))


def test_format_1_is_checked_as_before(tmp_path):
    write_format_1(gated_resnet(), tmp_path)
    whole = (tmp_path / "config.json").read_text()
    for change, message in (
        (lambda c: c.update(architecture="0" * 64), "is not the network that was saved"),
        (lambda c: c["blocks"].pop(), "do not fit the network"),
        (lambda c: c.pop("fill"), "keys are missing"),
        (lambda c: c.update(sha256="0" * 64), "is not the file"),
    ):
        (tmp_path / "config.json").write_text(whole)
        edit(tmp_path, change)
        with pytest.raises(CheckpointError, match=message):
            gatefit.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["input"].update(mean=[0, 0, 0]),
        lambda c: c["input"]["std"].__setitem__(0, 1.0),
        lambda c: c["input"].update(crop=1.0),
        lambda c: c["gated"]["blocks"].pop(),
        lambda c: c["gated"].update(form="relu1"),
        lambda c: c["model"]["arguments"].update(num_classes=8),
        lambda c: c["classes"].reverse(),
        lambda c: c["figures"].update(accuracy=1.0),
        lambda c: c["files"].update({"model.safetensors": "0" * 64}),
        lambda c: c.update(digest="0" * 64),
        lambda c: c.update(more=1),
    ],
)
def test_an_edited_config_is_refused(saved, change):
    _, folder = saved
    edit(folder, change)
    with pytest.raises(CheckpointError, match=r"config\.json was changed after it was saved"):
        gatefit.load(folder)


def test_white_space_and_order_are_no_change(saved):
    gated, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(gatefit.load(folder)(x), gated(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(kind="cascade"), r"is of kind 'cascade'; this gatefit reads gated"),
        (lambda c: c.update(kind=["gated"]), "is of kind"),
        (lambda c: c.pop("kind"), "is of kind None"),
        (lambda c: c.update(format=3), "has format 3; this gatefit reads up to 2"),
        (lambda c: c.pop("files"), "keys are missing"),
        (lambda c: c.pop("gated"), "keys are missing"),
        (lambda c: c.pop("format"), "keys are missing"),
        (lambda c: c["figures"].pop("share"), "is not one that gatefit wrote"),
        (lambda c: c.update(files=3), "is not one that gatefit wrote"),
        (lambda c: c.update(model={"what": 1}), "is not one that gatefit wrote"),
        (lambda c: c["gated"].update(architecture="0" * 64), "is not the network that was saved"),
        (lambda c: c["gated"]["blocks"].pop(), "do not fit the network"),
    ],
)
def test_a_config_of_another_program_or_time_ends_in_one_line(saved, change, message):
    _, folder = saved
    edit(folder, change, seal=True)
    with pytest.raises(CheckpointError, match=message) as refused:
        gatefit.load(folder)
    assert "\n" not in str(refused.value)


def test_another_network_of_the_same_shapes_is_refused(saved):
    """ReLU and SiLU have the same keys and shapes; only the architecture's digest tells them apart."""
    _, folder = saved
    edit(folder, lambda c: c["model"]["arguments"].update(act_layer="silu"), seal=True)
    with pytest.raises(CheckpointError, match="is not the network that was saved"):
        gatefit.load(folder)


def test_the_same_layers_in_another_order_are_refused(tmp_path):
    """Both have the same keys and shapes, and in the file that the config names they run in another order."""
    text = (
        "from networks import Basic\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.a, self.b, self.fc = Basic(3, 3), Basic(3, 3), nn.Linear(3, 2)\n\n"
        "    def forward(self, x):\n        return self.fc(self.a(self.b(x)).mean((2, 3)))\n"
    )
    (tmp_path / "own.py").write_text(text)
    reference = ModelReference("file", f"{tmp_path / 'own.py'}:Net")
    gated = gatefit.retrofit(build(reference), torch.zeros(2, 3, 8, 8), "c")
    set_info(gated, reference=reference)
    gatefit.save(gated, tmp_path)
    gatefit.load(tmp_path, trust_code=True)
    (tmp_path / "own.py").write_text(text.replace("self.a(self.b(x))", "self.b(self.a(x))"))
    with pytest.raises(CheckpointError, match=r"do not fit the network|is not the network that was saved"):
        gatefit.load(tmp_path, trust_code=True)


def test_an_own_file_is_kept_by_its_way_from_the_folder(tmp_path):
    project, folder = tmp_path / "project", tmp_path / "project" / "runs" / "mine"
    project.mkdir()
    (project / "own.py").write_text("import networks\n\n\ndef net():\n    return networks.make('grouped')\n")
    reference = ModelReference("file", f"{project / 'own.py'}:net")
    gated = gatefit.retrofit(build(reference), images(), "c", "step")
    set_info(gated, reference=reference)
    gatefit.save(gated, folder)
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert read_config(folder).model["name"] == "../../own.py:net"
    shutil.move(project, tmp_path / "moved")
    moved = tmp_path / "moved" / "runs" / "mine"
    assert torch.equal(gatefit.load(moved, trust_code=True)(images()), gated(images()))
    shutil.move(moved, tmp_path / "alone")
    with pytest.raises(gatefit.GatefitError, match=r"no file .*own\.py', which builds .*; put it there"):
        gatefit.load(tmp_path / "alone")
    assert torch.equal(gatefit.load(tmp_path / "alone", make("grouped"))(images()), gated(images()))


def test_the_original_is_checked_too(tmp_path):
    gated = gated_resnet()
    original = build(info_of(gated).reference)
    write_tensors(tmp_path / "original.safetensors", original.state_dict())
    gatefit.save(gated, tmp_path)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(load_original(tmp_path)(x), original(x))
    write_tensors(tmp_path / "original.safetensors", build(info_of(gated).reference).state_dict())
    with pytest.raises(CheckpointError, match=r"original\.safetensors is not the file"):
        load_original(tmp_path)
    (tmp_path / "original.safetensors").unlink()
    assert load_original(tmp_path) is None


def test_a_file_that_is_added_keeps_the_rest(saved):
    _, folder = saved
    before = read_config(folder)
    (folder / "more.onnx").write_bytes(b"more")
    record_file(folder, "more.onnx")
    after = read_config(folder)
    assert after.files == {**before.files, "more.onnx": hashlib.sha256(b"more").hexdigest()}
    assert (after.figures, after.classes, after.network) == (before.figures, before.classes, before.network)
    gatefit.load(folder)


def test_no_class_names_are_none_not_empty(tmp_path):
    gatefit.save(gatefit.retrofit(make("basic"), images()), tmp_path, classes=[])
    assert read_config(tmp_path).classes is None and read_config(tmp_path).figures is None


def test_other_activations_in_the_network_given_are_refused(tmp_path):
    """Keys and shapes are the same; what is computed is not."""
    reference = ModelReference("timm", "test_resnet", {"num_classes": 7})
    gated = gatefit.retrofit(build(reference), torch.zeros(2, 3, 64, 64), "c")
    gatefit.save(gated, tmp_path)
    gatefit.load(tmp_path, build(reference))
    gelu = build(ModelReference("timm", "test_resnet", {"num_classes": 7, "act_layer": "gelu"}))
    with pytest.raises(CheckpointError, match="is not the one that was saved") as refused:
        gatefit.load(tmp_path, gelu)
    assert "\n" not in str(refused.value)
    edit(tmp_path, lambda c: c["versions"].update(torch="1.0"), seal=True)
    with pytest.warns(UserWarning, match=r"saved with torch 1\.0, now"):
        gatefit.load(tmp_path, gelu)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["input"].update(crop=-1),
        lambda c: c["input"].update(std=[0, 1, 1]),
        lambda c: c["input"].update(shape=[3, 10**9, 10**9]),
        lambda c: c["input"].update(mean="x"),
        lambda c: c.update(classes=[1, 2]),
        lambda c: c["figures"].update(accuracy="high"),
    ],
)
def test_values_out_of_range_are_refused_whoever_sealed_them(saved, change):
    _, folder = saved
    edit(folder, change, seal=True)
    with pytest.raises(CheckpointError, match="is not one that gatefit wrote") as refused:
        gatefit.load(folder)
    assert "\n" not in str(refused.value)


def test_a_damaged_original_is_seen_at_loading(tmp_path):
    gated = gated_resnet()
    write_tensors(tmp_path / "original.safetensors", build(info_of(gated).reference).state_dict())
    gatefit.save(gated, tmp_path)
    damaged = bytearray((tmp_path / "original.safetensors").read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "original.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"original\.safetensors is not the file"):
        gatefit.load(tmp_path)


@pytest.mark.parametrize("classes", [[object()], [1, 2], "cats", [b"x"]])
def test_what_cannot_be_saved_leaves_an_earlier_run_as_it_was(tmp_path, classes):
    gated = gated_resnet()
    gatefit.save(gated, tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="classes must be a list of names"):
        gatefit.save(gated_resnet(), tmp_path, classes=classes)
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        gatefit.save(gated_resnet(), tmp_path, figures=Figures("x", 1, float("nan"), None, 1.0, 0.5, None, 2))
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_no_code_of_a_folder_runs_without_the_word(tmp_path):
    project, ran = tmp_path / "project", tmp_path / "ran"
    project.mkdir()
    (project / "own.py").write_text(
        f"import networks\nopen({str(ran)!r}, 'w').close()\n\n\ndef net():\n    return networks.make('basic')\n"
    )
    gated = gatefit.retrofit(make("basic"), images(), "c", "step").eval()
    set_info(gated, reference=ModelReference("file", f"{project / 'own.py'}:net"))
    folder = project / "run"
    write_tensors(folder / "original.safetensors", make("basic").state_dict())
    gatefit.save(gated, folder)
    for call in (gatefit.load, load_original, open_folder, gatefit.load_deployed):
        with pytest.raises(CheckpointError, match=r"names code, the function .*own\.py:net.*--trust-code|no file"):
            call(folder)
    assert torch.equal(gatefit.load(folder, make("basic"))(images()), gated(images()))
    assert not ran.exists()
    assert torch.equal(gatefit.load(folder, trust_code=True)(images()), gated(images()))
    assert ran.exists()


def test_a_name_on_the_hub_is_fetched_with_the_word_alone(saved, monkeypatch):
    gated, folder = saved
    edit(folder, lambda c: c.update(model={"source": "timm", "name": "hf-hub:a/b", "arguments": {}}), seal=True)
    asked, original = [], build(info_of(gated).reference)
    monkeypatch.setattr("timm.create_model", lambda name, **_: asked.append(name) or original)
    with pytest.raises(CheckpointError, match=r"hf-hub:a/b .*--trust-code"):
        gatefit.load(folder)
    assert not asked
    gatefit.load(folder, trust_code=True)
    assert asked == ["hf-hub:a/b"]
