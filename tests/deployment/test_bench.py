"""The benchmark: dense engines, memory, gates that close at random."""

import sys
from dataclasses import dataclass

import pytest
import torch
from networks import images, make

import gatefit
from gatefit.commands import deploy as deployment_folder
from gatefit.deployment.bench.memory import held_by, peak_of
from gatefit.deployment.bench.what_if import keep_open, set_share
from gatefit.deployment.engines.registry import ENGINES, Eager, available_engines, dense
from gatefit.deployment.plan import never_closes
from gatefit.gating.cost import decisions_of
from gatefit.gating.gates import gates_of


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_memory_is_what_is_held_and_what_a_run_takes():
    made, held = held_by(lambda: torch.ones(20_000_000))
    assert made.numel() == 20_000_000 and 60 < held < 120
    found = peak_of(lambda: torch.ones(20_000_000).sum())
    assert found is None or 60 < found < 120


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)
def test_dense_engines_answer_alike(engine):
    if not engine.available():
        pytest.skip(f"{engine.name} is not here")
    network = make("basic").eval()
    x = images(3)
    with torch.no_grad():
        run = engine.prepare(dense(network, x))()
        allowed = 1e-4 if engine.exact else 0.1
        assert float((run(x) - network(x)).abs().max()) < allowed * float(network(x).abs().max())


def test_engines_have_names_of_their_own_and_backends_have_engines():
    assert len({e.name for e in ENGINES}) == len(ENGINES)
    for backend in ("torch", "onnx"):
        chosen = available_engines(backend)
        assert chosen == [e for e in ENGINES if backend in e.backends and e.available()]
        assert all(e.exact for e in chosen)


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


@dataclass(frozen=True)
class Broken(Eager):
    name: str = "broken"

    def prepare(self, network):
        def make():
            raise RuntimeError("no such engine here")

        return make


def test_an_original_that_cannot_be_had_in_one_engine_is_timed_in_the_others(monkeypatch):
    x = torch.rand(4, 3, 8, 8)
    network = make("basic").eval()
    engines = [Broken(), Eager(name="plain")]
    monkeypatch.setattr(deployment_folder, "available_engines", lambda backend: engines)
    found = deployment_folder._latency(network, network, x, 2, "torch")
    assert found is not None and found.engine == "plain" and found.batch == 2
    engines.pop()
    assert deployment_folder._latency(network, network, x, 2, "torch") is None
