"""Gates set from data, and set anew while the network learns."""

import pytest
import torch
from trained import SPEC, floats, gate, short

import gatefit
from gatefit.errors import TrainingError
from gatefit.gating.cost import costs_of
from gatefit.gating.gates import gates_of, outputs_of
from gatefit.gating.initialise import _guess, _ridge, initialise_from_data
from gatefit.gating.measure import Probe
from gatefit.gating.threshold import threshold_for


def test_gates_from_data_stay_unless_they_are_renewed_or_have_a_rate(dense, digits):
    weights = []
    for change in ({"epochs": 0}, {"gate_reinits": 0}, {"gate_reinits": 0, "gate_lr": 0.01}, {"gate_reinits": 1}):
        gated = gate(dense, "c")
        gatefit.finetune(gated, digits, dense, **short(**{"epochs": 1, **change}))
        weights.append(gates_of(gated)["blocks.1"].channel.weight.detach().clone())
        assert all(p.requires_grad for p in gated.parameters())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])


def test_gates_are_renewed_in_the_first_two_thirds(dense, digits):
    steps = []
    gated = gate(dense, "c")
    gatefit.finetune(
        gated, digits, dense, **short(epochs=3, gate_reinits=2),
        on_progress=lambda p: steps.append(p.step if p.stage == "fine-tune" else p.stage),
    )  # fmt: skip
    started = [steps[i - 1] for i, s in enumerate(steps) if s == "reinitialise" and steps[i - 1] != "reinitialise"]
    assert started == [21, 43]  # 66 steps, renewed after 22 and 44 and shown behind that
    assert gatefit.evaluate(gated, digits).share == pytest.approx(0.6, abs=0.02)


def test_renewed_gates_keep_to_the_ramp(dense, digits):
    gated = gate(dense, "c")
    history = gatefit.finetune(gated, digits, dense, **short(epochs=3, gate_reinits=2, ramp=0.9))
    assert history[1].share > 0.7  # 0.85 at its begin, 0.70 at its end


def test_a_start_measures_the_network_as_it_runs(dense, digits):
    gated = gatefit.retrofit(dense, torch.zeros(2, *SPEC.shape), "lc", "step", compensation=True)
    gatefit.finetune(gated, digits, dense, **short(epochs=0))
    x = floats(digits, 0)
    probe = Probe(gated)
    assert torch.equal(probe.run(x), gated(x))
    assert min(float(s.detach().mean()) for both in probe.saliences.values() for s in both[:2]) < 1


def test_the_start_predicts_what_matters(dense, digits):
    """At the same share of MACs, closing by the data-driven start costs less than closing at random."""
    gated = gate(dense, "c")
    initialise_from_data(gated, digits.train, count=1000)
    costs = costs_of(gated, SPEC.shape)

    def accuracy_at_share(share):
        for _ in range(3):
            gated(torch.cat([floats(digits, i) for i in range(0, 300, 100)]))
            shift = threshold_for(gated, costs, share)
            for g, _ in outputs_of(gated):
                g.channel.bias.data -= shift
        return gatefit.evaluate(gated, digits).accuracy

    informed = accuracy_at_share(0.8)
    for g in gates_of(gated).values():
        order = torch.randperm(g.of.units, generator=torch.Generator().manual_seed(0))
        g.channel.weight.data = g.channel.weight.data[order]
        g.channel.bias.data = g.channel.bias.data[order]
    assert informed > 0.8 and informed > accuracy_at_share(0.8) + 0.1


def test_a_guess_keeps_what_holds_for_other_images():
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 60, generator=random, dtype=torch.float64)
    noise = torch.randn(200, 1, generator=random, dtype=torch.float64)
    noise -= noise.mean()
    assert _guess(inputs, noise).weight.norm() < 0.5 * _ridge(inputs, noise).weight.norm()
    assert torch.allclose(
        _guess(inputs, inputs[:, :1]).weight, _ridge(inputs, inputs[:, :1]).weight, rtol=0.01, atol=0.01
    )


def test_a_start_from_broken_weights_is_refused(dense, digits):
    gated = gate(dense, "c")
    gated.get_parameter("blocks.1.conv1.weight").data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="outputs are not finite; check its weights"):
        gatefit.finetune(gated, digits, dense, **short())
