"""Deployed networks answer as the gated ones do, for every image and every mask."""

import copy

import pytest
import torch
from deployed import gated_network, plans_for, same, set_all
from engines_table import ENGINES, cases
from networks import Plain, images

import gatefit
from gatefit.deployment.engines.chain import ChainBlock
from gatefit.deployment.engines.gathered import GatheredBlock
from gatefit.deployment.kernels.native import kernels
from gatefit.gating.gates import gates_of


@pytest.mark.parametrize(("engine", "name", "form", "compensation"), cases())
def test_exact_for_images_outside_the_calibration_set(engine, name, form, compensation):
    if not engine.available():
        pytest.skip(f"{engine.name} cannot run here")
    gated = gated_network(name, form, compensation)
    if refused := engine.refuses(gated):
        with pytest.raises(gatefit.GatefitError, match=refused):
            engine.deploy(gated)
        return
    deployed = engine.deploy(gated)
    others = images(9, seed=5)
    with torch.no_grad():
        wanted = gated(others)
        assert same(deployed(others), wanted)
        assert same(torch.cat([deployed(x) for x in others.split(1)]), wanted)
        assert same(deployed(others.flip(0)), wanted.flip(0))


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("form", ["relu1", "step"])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted"])
def test_gathered_networks_are_copied_and_take_another_layout(name, form, compensation):
    gathered = next(e for e in ENGINES if e.name == "gathered")
    gated = gated_network(name, form, compensation)
    deployed = gathered.deploy(gated)
    kind = ChainBlock if form == "step" and name != "inverted" else GatheredBlock  # its activation is SiLU
    assert sum(isinstance(m, kind) for m in deployed.modules()) == len(gates_of(gated))
    others = images(9, seed=5)
    with torch.no_grad():
        assert same(copy.deepcopy(deployed)(others), gated(others))
        assert same(deployed.to(memory_format=torch.channels_last)(others), gated(others))


@pytest.mark.parametrize("value", [1.0, -1.0])
@pytest.mark.parametrize("name", ["basic", "inverted", "grouped", "squeeze-excite"])
def test_all_open_and_all_closed(name, value):
    gated = gated_network(name)
    set_all(gated, value)
    deployed = gatefit.deploy(gated, images(), tuned=False)
    with torch.no_grad():
        assert same(deployed(images(3, seed=7)), gated(images(3, seed=7)))


def _pairs(form):
    """A network without a residual block, whose gates open and close at random."""
    torch.manual_seed(2)
    gated = gatefit.retrofit(Plain().eval(), images(), "c", form, form == "step")
    for gate in gates_of(gated).values():
        torch.nn.init.normal_(gate.channel.weight, std=3.0)
        torch.nn.init.normal_(gate.channel.bias)
        if gate.compensation is not None:
            torch.nn.init.normal_(gate.compensation.weight, std=0.1)
    return gated.eval()


@pytest.mark.parametrize("form", ["step", "relu1"])
@pytest.mark.parametrize("engine", [e for e in ENGINES if e.name != "parallel"], ids=lambda e: e.name)
def test_deployed_pairs_answer_as_the_gated_ones(engine, form):
    if not engine.available():
        pytest.skip(f"{engine.name} cannot run here")
    gated = _pairs(form)
    assert all(region is not None for _, region in plans_for(gated, images(8)).values())
    deployed = engine.deploy(gated)
    others = images(9, seed=5)
    with torch.no_grad():
        wanted = gated(others)
        assert same(deployed(others), wanted)
        assert same(torch.cat([deployed(x) for x in others.split(1)]), wanted)


@pytest.mark.parametrize("value", [1.0, -1.0])
@pytest.mark.parametrize("engine", [e for e in ENGINES if e.name != "parallel"], ids=lambda e: e.name)
def test_pairs_all_open_and_all_closed(engine, value):
    """PyTorch pools no image without channels."""
    if not engine.available():
        pytest.skip(f"{engine.name} cannot run here")
    gated = _pairs("step")
    set_all(gated, value)
    with torch.no_grad():
        assert same(engine.deploy(gated)(images(3, seed=7)), gated(images(3, seed=7)))


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
def test_pairs_without_a_pooling_between_run_in_one_kernel():
    gathered = next(e for e in ENGINES if e.name == "gathered")
    deployed = gathered.deploy(_pairs("step"))
    kinds = [type(m) for m in deployed.modules() if isinstance(m, ChainBlock | GatheredBlock)]
    assert sorted(k.__name__ for k in kinds) == ["ChainBlock", "GatheredBlock"]
