"""A deployed network runs what it was made for; all else it refuses in one line, whatever runs it."""

import copy
import io
import warnings

import pytest
import torch
from deployed import gated_network, plans_for, same
from networks import images

import gatefit
from gatefit.deployment.engines.native_network import gathered_network
from gatefit.deployment.engines.onnx import has_onnx
from gatefit.deployment.info import Images
from gatefit.deployment.kernels.native import kernels
from gatefit.deployment.network import DeployedNetwork, seal
from gatefit.deployment.plan import Latency
from gatefit.errors import DeployError
from gatefit.gating.gates import gates_of

FORMS = [
    "codebooks",
    "parallel",
    pytest.param("gathered", marks=pytest.mark.skipif(kernels() is None, reason="no compiler")),
    pytest.param("onnx", marks=pytest.mark.skipif(not has_onnx(), reason="no ONNX Runtime")),
]


def deploy(form, gated):
    if form == "gathered":
        return seal(gathered_network(gated, plans_for(gated, images(8)), [images(8)]), Images((3, 8, 8)))
    if form == "onnx":
        return gatefit.deploy(gated, images(8), "onnx", tuned=False)
    placement = "parallel" if form == "parallel" else "sequential"
    return gatefit.deploy(gated, images(8), tuned=False, placement=placement)


@pytest.fixture(scope="module", params=FORMS)
def pair(request):
    gated = gated_network("basic")
    return gated, deploy(request.param, gated)


@pytest.fixture
def in_torch():
    return deploy("codebooks", gated_network("basic"))


def test_an_empty_batch_gives_an_empty_result(pair):
    gated, deployed = pair
    assert deployed(images(0)).shape == gated(images(0)).shape == (0, gated(images(1)).shape[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: images(2).double(), r"takes torch\.float32 on cpu, not torch\.float64 on cpu"),
        (lambda: images(2).long(), r"not torch\.int64"),
        (lambda: images(2).to("meta"), "on meta"),
        (lambda: images(2)[0], r"a batch of images \(B, 3, 8, 8\), not a tensor of shape \(3, 8, 8\)"),
        (lambda: images(2)[None], "not a tensor of shape"),
        (lambda: images(2)[:, :2], r"\(2, 8, 8\)"),
        (lambda: images(2).numpy(), "takes a tensor of images, not a ndarray"),
        (lambda: images(2).requires_grad_(), "for inference only"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(pair, wrong, message):
    with pytest.raises(DeployError, match=message) as error:
        pair[1](wrong())
    assert "\n" not in str(error.value)


def test_without_grad_mode_an_image_may_want_a_gradient(pair):
    gated, deployed = pair
    with torch.no_grad():
        assert same(deployed(images(2).requires_grad_()), gated(images(2)))


def _load(deployed):
    deployed.load_state_dict(deployed.state_dict())


def _call_with_others(deployed):
    torch.func.functional_call(deployed, {k: v + 1 for k, v in deployed.state_dict().items()}, images(2))


def _load_a_part(deployed):
    part = next(m for m in deployed.modules() if isinstance(m, torch.nn.Linear))
    part.load_state_dict(part.state_dict())
    deployed(images(2))


def _write(deployed):
    with torch.no_grad():
        next(deployed.parameters()).mul_(2)
    deployed(images(2))


def _replace(deployed):
    part = next(m for m in deployed.modules() if isinstance(m, torch.nn.Linear))
    part.weight = torch.nn.Parameter(part.weight + 1)
    deployed(images(2))


@pytest.mark.parametrize("change", [_load, _call_with_others, _load_a_part, _write, _replace])
def test_other_weights_are_refused(in_torch, change):
    in_torch(images(2))
    with pytest.raises(DeployError, match=r"packed copies.*deploy it anew"):
        change(in_torch)


def test_after_other_weights_for_one_call_it_runs_as_before(in_torch):
    before = in_torch(images(2))
    with pytest.raises(DeployError):
        _call_with_others(in_torch)
    assert torch.equal(in_torch(images(2)), before)


def test_a_copy_and_another_layout_run(in_torch):
    before = in_torch(images(2))
    copied = copy.deepcopy(in_torch)
    assert isinstance(copied, DeployedNetwork) and copied.plans
    assert torch.equal(copied(images(2)), before)
    assert same(in_torch.to(memory_format=torch.contiguous_format).eval()(images(2)), before)
    with pytest.raises(DeployError, match="packed copies"):
        _write(copied)
    assert same(in_torch(images(2)), before)


def test_it_is_for_inference_only_and_is_not_pickled(in_torch):
    with pytest.raises(DeployError, match="for inference only"):
        in_torch.train()
    with pytest.raises(DeployError, match=r"cannot be pickled; write it with gatefit\.save_deployed"):
        torch.save(in_torch, io.BytesIO())


def test_images_of_another_size_run(in_torch):
    assert in_torch(images(2, size=12)).shape == in_torch(images(2)).shape


@pytest.mark.parametrize("where", ["images", "infinite images", "weight", "gate", "buffer"])
@pytest.mark.parametrize("tuned", [True, False])
def test_what_is_no_number_is_refused(where, tuned):
    gated, x = gated_network("basic"), images(4)
    with torch.no_grad():
        if where == "images":
            x[1, 0, 0, 0] = torch.nan
        elif where == "infinite images":
            x[1, 0, 0, 0] = torch.inf
        elif where == "weight":
            next(gated.parameters())[0] = torch.nan
        elif where == "gate":
            next(iter(gates_of(gated).values())).block.bias.fill_(torch.inf)
        else:
            next(b for n, b in gated.named_buffers() if "running_var" in n)[0] = torch.nan
    with pytest.raises(DeployError, match="NaN or infinite"):
        gatefit.deploy(gated, x, tuned=tuned)


def test_a_slower_deployment_warns_and_says_the_times(monkeypatch):
    slow = Latency(1, 9.0, 3.0, "onnxruntime")
    monkeypatch.setattr("gatefit.deployment.deploy.latency_of", lambda *_: slow)
    with pytest.warns(UserWarning, match=r"takes 9\.00 ms.* without gates 3\.00 ms \(onnxruntime\)") as caught:
        deployed = gatefit.deploy(gated_network("basic"), images(4))
    assert deployed.latency == slow and caught[0].filename == __file__
    monkeypatch.setattr("gatefit.deployment.deploy.latency_of", lambda *_: Latency(1, 2.0, 3.0, "onnxruntime"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gatefit.deploy(gated_network("basic"), images(4))


def test_a_batch_far_from_the_one_that_it_was_tuned_for_warns_once(in_torch):
    tuned = seal(in_torch, Images((3, 8, 8)), Latency(8, 1.0, 2.0, "torch"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned(images(4)), tuned(images(16))
    with pytest.warns(UserWarning, match="tuned for batches of 8, and is given one of 1") as caught:
        tuned(images(1)), tuned(images(1))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_onnx_takes_one_image_at_a_time():
    pytest.importorskip("onnxruntime")
    with pytest.raises(DeployError, match="one by one: leave batch at 1, not 4"):
        gatefit.deploy(gated_network("basic"), images(4), "onnx", batch=4)
