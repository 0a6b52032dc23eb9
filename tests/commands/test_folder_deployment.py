"""A deployment and the folder that it lies in: what ties them, and that they move together."""

import json
import shutil

import pytest
import timm
import torch

import gatefit
from gatefit.commands.deploy import load_deployed, save_deployed, write_deployment
from gatefit.deployment.engines.native_network import gathered_network
from gatefit.deployment.engines.segments import ONNX
from gatefit.deployment.info import Images, deployed_info, fingerprint
from gatefit.deployment.kernels.native import kernels
from gatefit.deployment.network import seal
from gatefit.deployment.plan import Latency, plans_without_codebooks
from gatefit.errors import CheckpointError
from gatefit.folder import read_config
from gatefit.gating.gates import gates_of


def small(seed=0):
    torch.manual_seed(seed)
    gated = gatefit.retrofit(timm.create_model("test_resnet").eval(), torch.zeros(2, 3, 32, 32), "lc", "step").eval()
    for gate in gates_of(gated).values():
        for fc in gate.layers:
            torch.nn.init.normal_(fc.weight, std=3.0)
    return gated


@pytest.fixture(scope="module")
def deployed():
    """A gated network, images, and the network deployed with codebooks."""
    gated, x = small(), torch.randn(8, 3, 32, 32)
    return gated, x, gatefit.deploy(gated, x, tuned=False)


@pytest.fixture
def in_torch(deployed, tmp_path):
    gated, x, runs = deployed
    folder = tmp_path / "run"
    gatefit.save(gated, folder)
    write_deployment(folder, deployed_info(runs).plans)
    return folder, x, runs


@pytest.fixture
def in_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    gated, x = small(), torch.randn(4, 3, 32, 32)
    runs = gatefit.deploy(gated, x, "onnx", tuned=False)
    folder = tmp_path / "run"
    gatefit.save(gated, folder)
    write_deployment(folder, runs.plans, model=runs.model, onnx=folder / "model.onnx")
    return folder, x, runs


@torch.no_grad()
def same(a, b, x):
    return torch.equal(a(x), b(x))


def content(folder):
    return json.loads((folder / "deployment.json").read_text())


def test_a_moved_folder_runs(in_torch, tmp_path):
    folder, x, runs = in_torch
    shutil.move(folder, tmp_path / "elsewhere" / "deep")
    assert same(load_deployed(tmp_path / "elsewhere" / "deep"), runs, x)


def test_a_moved_onnx_file_runs(in_onnx, tmp_path):
    folder, x, runs = in_onnx
    assert str(tmp_path) not in (folder / "deployment.json").read_text() + (folder / "config.json").read_text()
    assert content(folder)["file"]["name"] == "model.onnx"
    assert read_config(folder).files["model.onnx"] == content(folder)["file"]["sha256"]
    shutil.move(folder, tmp_path / "elsewhere" / "deep")
    assert same(load_deployed(tmp_path / "elsewhere" / "deep"), runs, x)


def test_an_onnx_file_elsewhere_is_kept_by_its_way_from_the_folder(in_onnx, tmp_path):
    folder, x, runs = in_onnx
    write_deployment(folder, runs.plans, model=runs.model, onnx=tmp_path / "models" / "fast.onnx")
    assert content(folder)["file"]["name"] == "../models/fast.onnx"
    assert "../models/fast.onnx" not in read_config(folder).files
    shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-copy"))
    assert same(load_deployed(tmp_path.with_name(f"{tmp_path.name}-copy") / "run"), runs, x)
    (tmp_path / "models" / "fast.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"no file .*fast\.onnx"):
        load_deployed(folder)


@pytest.mark.parametrize("kind", ["in_torch", "in_onnx"])
def test_other_weights_in_the_folder_are_refused(kind, request):
    folder, _, _ = request.getfixturevalue(kind)
    gatefit.save(small(seed=1), folder)
    with pytest.raises(CheckpointError, match=r"was made from other weights than .*; deploy anew"):
        load_deployed(folder)


def test_the_same_weights_under_another_form_are_refused(in_torch):
    """Plans of steps leave out what ReLU-1 gates would only scale."""
    folder, _, _ = in_torch
    gated = gatefit.load(folder)
    for gate in gates_of(gated).values():
        gate.form = "relu1"
    gatefit.save(gated, folder)
    with pytest.raises(CheckpointError, match="was made from other weights"):
        load_deployed(folder)


def test_the_same_network_saved_again_is_not_refused(in_torch):
    folder, x, runs = in_torch
    gatefit.save(gatefit.load(folder), folder, classes=[str(i) for i in range(1000)])
    assert same(load_deployed(folder), runs, x)


def test_another_onnx_file_is_refused(in_onnx):
    folder, _, _ = in_onnx
    file = folder / "model.onnx"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"model\.onnx is not the file that .* was written for; deploy anew"):
        load_deployed(folder)


def test_an_onnx_deployment_of_format_4_is_refused(in_onnx):
    """It names a file by its absolute path, where another network may lie by now."""
    folder, _, _ = in_onnx
    old = {k: v for k, v in content(folder).items() if k != "network"}
    old |= {"format": 4, "file": str((folder / "model.onnx").absolute())}
    (folder / "deployment.json").write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match=r"an older gatefit, .*; deploy anew"):
        load_deployed(folder)
    (folder / "deployment.json").write_text(json.dumps(old | {"format": 3}))
    with pytest.raises(CheckpointError, match="has format 3"):
        load_deployed(folder)


def test_a_deployment_needs_a_network_beside_it(deployed, tmp_path):
    with pytest.raises(CheckpointError, match=r"no file .*config\.json"):
        write_deployment(tmp_path, deployed_info(deployed[2]).plans)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def in_segments(tmp_path):
    """A network whose segments run in ONNX Runtime between compiled blocks, timed."""
    pytest.importorskip("onnxruntime")
    if kernels() is None:
        pytest.skip("no C++ compiler")
    gated, x = small(), torch.randn(4, 3, 32, 32)
    plans = plans_without_codebooks(gated, skip=True)
    count = len(deployed_info(gathered_network(gated, plans, [x])).engines)
    runs = gathered_network(gated, plans, [x], [ONNX] * count)
    sealed = seal(runs, Images((3, 32, 32)), Latency(4, 1.5, 2.5, "onnxruntime"), fingerprint(gated.state_dict()))
    gatefit.save(gated, tmp_path / "run")
    return tmp_path / "run", x, gated, sealed


def test_a_deployment_is_kept_whole(in_segments, tmp_path, monkeypatch):
    """Nothing is exported or timed when it is read."""
    folder, x, _, runs = in_segments
    gatefit.save_deployed(runs, folder)

    def never(*_, **__):
        raise AssertionError("exported or timed anew")

    monkeypatch.setattr("gatefit.deployment.engines.segments.export", never)
    monkeypatch.setattr("gatefit.deployment.engines.segments.milliseconds", never)
    shutil.move(folder, tmp_path / "elsewhere")
    again = gatefit.load_deployed(tmp_path / "elsewhere")
    assert same(again, runs, x)
    assert again.latency == runs.latency and deployed_info(again).engines == deployed_info(runs).engines
    gatefit.save_deployed(again, tmp_path / "elsewhere")
    assert same(gatefit.load_deployed(tmp_path / "elsewhere"), runs, x)


def test_segments_that_are_others_are_refused(in_segments):
    folder, _, _, runs = in_segments
    save_deployed(runs, folder)
    file = folder / "deployment.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=r"deployment\.safetensors is not the file"):
        load_deployed(folder)
    write_deployment(folder, runs.plans)
    assert not file.exists()


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_deployment_is_saved_beside_its_own_weights_alone(in_onnx, deployed, tmp_path, backend):
    _, _, onnx = in_onnx
    runs = onnx if backend == "onnx" else deployed[2]
    gatefit.save(small(seed=1), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"other weights .* call gatefit\.save\(gated, folder\) first"):
        save_deployed(runs, tmp_path / "other")
    assert not (tmp_path / "other" / "deployment.json").exists()
    with pytest.raises(CheckpointError, match="no file"):
        save_deployed(runs, tmp_path / "nowhere")
