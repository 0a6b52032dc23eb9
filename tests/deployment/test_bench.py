"""The benchmark: dense engines, memory, gates that close at random."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from networks import images, make

import gatefit
from gatefit.deployment import compare
from gatefit.deployment.bench.memory import held_by, peak_of
from gatefit.deployment.bench.what_if import keep_open, set_share
from gatefit.deployment.clock import TRIAL_ROUNDS
from gatefit.deployment.engines.registry import ENGINES, Eager, Inductor, available_engines, dense
from gatefit.deployment.kernels.native import instructions
from gatefit.deployment.plan import never_closes
from gatefit.deployment.tune import ROUNDS, milliseconds
from gatefit.gating.cost import decisions_of
from gatefit.gating.gates import gates_of
from gatefit.gating.remove import without_gates


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


def test_a_dense_network_that_cannot_be_had_in_one_engine_is_timed_in_the_others(monkeypatch):
    gated = gatefit.retrofit(make("basic"), images(), "lc", "step").eval()
    engines = [Broken(), Eager(name="plain")]
    monkeypatch.setattr(compare, "available_engines", lambda backend: engines)
    latency = compare.latency_of(gated, gated, [images(2)], "torch")
    assert latency is not None and latency.engine == "plain" and latency.batch == 2
    engines.pop()
    assert compare.latency_of(gated, gated, [images(2)], "torch") is None


def test_without_its_gates_a_network_is_the_original():
    original = make("basic").eval()
    gated = gatefit.retrofit(original, images(), "lc", "step", compensation=True).eval()
    keep_open(gated, images(8))
    dense_again = without_gates(gated)
    with torch.no_grad():
        assert torch.equal(dense_again(images(3)), original(images(3)))
    assert set(dense_again.state_dict()) == set(original.state_dict())


def test_a_form_that_has_lost_is_timed_no_more(monkeypatch):
    """By a clock that counts: `slow` takes 3, `fast` takes 1."""
    calls = []
    monkeypatch.setattr("gatefit.deployment.tune.second_run_ms", lambda run, *_: calls.append(run) or run())

    def slow():
        return 3.0

    def fast():
        return 1.0

    assert milliseconds([slow, fast], [(), ()]) == [3.0, 1.0]
    assert calls.count(slow) == 2 * TRIAL_ROUNDS and calls.count(fast) == 2 * ROUNDS


def test_cuda_without_a_gpu_is_no_news(tmp_path):
    """In a process of its own, as PyTorch says it once."""
    code = "from gatefit.deployment.engines.registry import _compiled; import torch; _compiled(torch.nn.Identity())"
    (tmp_path / "bin").mkdir()
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "CUDA_HOME" not in result.stderr


@pytest.mark.parametrize(
    ("flags", "bf16"),
    [("fma avx2", False), ("avx2 avx512f", False), ("avx2 avx512f avx512_bf16", True), ("avx2 amx_bf16", True)],
)
def test_bf16_is_timed_where_the_processor_computes_in_it(flags, bf16, monkeypatch):
    monkeypatch.setattr("gatefit.deployment.kernels.native.processor", lambda key: flags if key == "flags" else "")
    instructions.cache_clear()
    try:
        assert Inductor(torch.bfloat16).available() == bf16 and Inductor().available()
        assert instructions()[0] == "AVX2"
    finally:
        instructions.cache_clear()
