"""Deployed networks answer as the gated ones do, for every image and every mask."""

import copy

import pytest
import torch
from deployed import gated_network, same, set_all
from engines_table import ENGINES, cases
from networks import images

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
    kind = ChainBlock if form == "step" else GatheredBlock
    assert sum(isinstance(m, kind) for m in deployed.modules()) == len(gates_of(gated))
    others = images(9, seed=5)
    with torch.no_grad():
        assert same(copy.deepcopy(deployed)(others), gated(others))
        assert same(deployed.to(memory_format=torch.channels_last)(others), gated(others))


@pytest.mark.parametrize("form", ["relu1", "step"])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted"])
def test_deployed_networks_are_as_near_to_exact_arithmetic_as_gated_ones(name, form):
    """Steep ReLU-1 gates enlarge every rounding, that of the gated network too: 1e-5 from it cannot be promised there,
    but what both are away from double precision is of one size."""
    gated = gated_network(name, form)
    with torch.no_grad():
        for gate in gates_of(gated).values():
            for fc in gate.layers:
                fc.weight.mul_(100)
        x = images(9, seed=5)
        exact = copy.deepcopy(gated).double()(x.double())
        scale = float(exact.abs().max())
        own = float((gated(x) - exact).abs().max()) / scale
        deployed = gatefit.deploy(gated, x, tuned=False)
        assert float((deployed(x) - exact).abs().max()) / scale < 4 * own + 1e-6


@pytest.mark.parametrize("value", [1.0, -1.0])
@pytest.mark.parametrize("name", ["basic", "inverted", "grouped", "squeeze-excite"])
def test_all_open_and_all_closed(name, value):
    gated = gated_network(name)
    set_all(gated, value)
    deployed = gatefit.deploy(gated, images(), tuned=False)
    with torch.no_grad():
        assert same(deployed(images(3, seed=7)), gated(images(3, seed=7)))
