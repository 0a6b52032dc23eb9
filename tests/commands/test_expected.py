"""What a conversion can gain is said before it is paid for, and changes nothing."""

import pytest
import torch
from networks import make
from typer.testing import CliRunner

from gatefit.commands import expected
from gatefit.commands.cli import app
from gatefit.deployment.plan import Latency


@pytest.mark.parametrize(
    ("latency", "line"),
    [
        (
            Latency(1, 4.0, 5.0, "onnxruntime"),
            "expect 80% of the time on this CPU at 60% of the MACs: 4.00 ms",
        ),
        (
            Latency(1, 5.0, 4.0, "onnxruntime"),
            "expect no gain in time on this CPU at 60% of the MACs: 5.00 ms",
        ),
        (None, "not measured; so small a network"),
    ],
)
def test_what_is_said(latency, line, monkeypatch):
    monkeypatch.setattr(expected, "expected", lambda *_: latency)
    assert line in expected.expectation(make("basic"), (3, 8, 8), 0.6)


def test_an_expectation_that_cannot_be_had_stops_nothing():
    assert "not measured: " in expected.expectation(torch.nn.Linear(3, 3), (3, 8, 8), 0.6)
    assert "not measured, as no share" in expected.expectation(make("basic"), (3, 8, 8), 1.0)


def test_it_changes_neither_the_network_nor_random_numbers(monkeypatch):
    monkeypatch.setattr(expected, "SMALL", 0)
    network = make("basic").train()
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    latency = expected.expected(network, (3, 8, 8), 0.6)
    assert latency is not None and latency.batch == 1 and latency.deployed > 0
    assert torch.equal(torch.get_rng_state(), state) and network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_inspect_says_it_where_it_is_asked(monkeypatch):
    monkeypatch.setattr(expected, "expected", lambda *_: Latency(1, 5.0, 4.0, "onnxruntime"))
    result = CliRunner().invoke(app, ["inspect", "resnet18", "--share", "0.5"])
    assert result.exit_code == 0 and "expect no gain in time on this CPU at 50%" in result.stdout
