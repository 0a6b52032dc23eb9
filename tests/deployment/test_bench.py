"""The benchmark: dense engines, memory, gates that close at random."""

import sys

import pytest
import torch
from networks import images, make

import gatefit
from gatefit.commands import deploy as deployment_folder
from gatefit.deployment.bench.baselines import BF16, dense_engines
from gatefit.deployment.bench.memory import held_by, peak_of
from gatefit.deployment.bench.what_if import keep_open, set_share
from gatefit.deployment.plan import never_closes
from gatefit.gating.cost import decisions_of
from gatefit.gating.gates import gates_of


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_memory_is_what_is_held_and_what_a_run_takes():
    made, held = held_by(lambda: torch.ones(20_000_000))
    assert made.numel() == 20_000_000 and 60 < held < 120
    found = peak_of(lambda: torch.ones(20_000_000).sum())
    assert found is None or 60 < found < 120


def test_dense_engines_answer_alike():
    network = make("basic").eval()
    x = images(3)
    with torch.no_grad():
        for name, engine in dense_engines(network, x).items():
            allowed = 0.1 if name == BF16 else 1e-4
            assert float((engine()(x) - network(x)).abs().max()) < allowed * float(network(x).abs().max())


def test_a_placebo_is_open_for_all_its_images_but_not_for_good():
    gated = gatefit.retrofit(make("basic"), images(), "lc", "step").eval()
    keep_open(gated, images(8))
    gated(images(8))
    for name, opened in decisions_of(gated).blocks.items():
        assert opened.runs.all() and opened.units.all()
        assert not never_closes(gates_of(gated)[name])


def test_what_if_reaches_its_share():
    gated = gatefit.retrofit(make("basic"), images(), "lc", "step").eval()
    many = images(64) + images(64, seed=9)[:, :, :1, :1]
    assert set_share(gated, many, 0.6) == pytest.approx(0.6, abs=0.05)


def test_an_original_that_cannot_be_had_in_one_engine_is_timed_in_the_others(monkeypatch):
    def fails():
        raise RuntimeError("no such engine here")

    made = {"broken": fails, "plain": lambda: torch.nn.Identity()}
    monkeypatch.setattr(deployment_folder, "dense_engines", lambda original, images: made)
    images = torch.rand(4, 3, 8, 8)
    found = deployment_folder._latency(torch.nn.Identity(), torch.nn.Identity(), images, 2, set(made))
    assert found is not None and found.engine == "plain" and found.batch == 2
    assert deployment_folder._latency(torch.nn.Identity(), torch.nn.Identity(), images, 2, {"broken"}) is None
