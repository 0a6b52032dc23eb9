"""Every way to deploy a network, as one table: a new engine, precision, exit or width enters by one line."""

from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import pytest
from deployed import plans_for
from networks import GATABLE, images

import gatefit
from gatefit.deployment.engines.native_network import gathered_network
from gatefit.deployment.engines.onnx import has_onnx
from gatefit.deployment.kernels.native import kernels
from gatefit.deployment.region import region_or_none
from gatefit.gating.gates import gates_of


@dataclass(frozen=True)
class Engine:
    """How a gated network is deployed, and which networks that is tested with."""

    name: str
    deploy: Callable
    """From a gated network to what runs it; images (B, C, H, W) to predictions."""
    networks: tuple[str, ...] = tuple(GATABLE)
    available: Callable[[], bool] = lambda: True
    refuses: Callable = lambda gated: ""
    """The message with which a network is refused; empty: it is not."""


def _gathered(gated):
    with patch("gatefit.deployment.engines.segments.has_onnx", lambda: False):
        return gathered_network(gated, plans_for(gated, images(8)), [images(8)])


def _without_regions(gated):
    regions = [region_or_none(gated, gate) for gate in gates_of(gated).values()]
    return "" if any(region and region.prefix for region in regions) else "no block has a first layer"


ENGINES = [
    Engine("codebooks", lambda gated: gatefit.deploy(gated, images(8), tuned=False)),
    Engine(
        "parallel",
        lambda gated: gatefit.deploy(gated, images(8), tuned=False, placement="parallel"),
        refuses=_without_regions,
    ),
    Engine(
        "gathered",
        _gathered,
        available=lambda: kernels() is not None,
    ),
    Engine(
        "onnx",
        lambda gated: gatefit.deploy(gated, images(8), "onnx", tuned=False),
        networks=("basic", "bottleneck", "inverted", "grouped", "squeeze-excite"),
        available=has_onnx,
    ),
]

FORMS = [("relu1", False), ("step", True), ("relu1", True), ("step", False)]
"""Forms of gates, with and without compensation."""


def cases():
    """Each engine with each network and form. The quick set has each engine and network once, the forms in turn."""
    for engine in ENGINES:
        for i, network in enumerate(engine.networks):
            for j, (form, compensation) in enumerate(FORMS):
                marks = [] if j == i % len(FORMS) else [pytest.mark.slow]
                name = f"{engine.name}-{network}-{form}-{'compensated' if compensation else 'plain'}"
                yield pytest.param(engine, network, form, compensation, id=name, marks=marks)
