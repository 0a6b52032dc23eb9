"""Gates close in a loop until the MACs that run are those that were asked for."""

import itertools
from dataclasses import replace

import pytest
import torch
from trained import SPEC, floats, gate, network, short

import gatefit
from gatefit.errors import RecipeError
from gatefit.gating.cost import costs_of, decisions_of
from gatefit.gating.gates import outputs_of
from gatefit.gating.initialise import initialise_from_data
from gatefit.gating.threshold import price_threshold, threshold_for
from gatefit.inputs.data import as_images

QUICK = {("c", "step", 0.5), ("lc", "relu1", 0.8)}


@pytest.mark.parametrize(
    ("gates", "form", "target"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in itertools.product(("c", "lc"), ("step", "relu1"), (0.8, 0.5))
    ],
)
def test_the_closed_loop_ends_at_the_target(dense, digits, gates, form, target):
    gated = gate(dense, gates, form)
    history = gatefit.finetune(gated, digits, dense, target=target, **short(target=None))
    result = gatefit.evaluate(gated, digits, dense)
    assert result.share == pytest.approx(target, abs=0.02)
    assert result.accuracy > (0.9 if target == 0.8 else 0.3) and result.dense_accuracy > 0.95
    assert history[-1].share == pytest.approx(target, abs=0.1)
    assert not gated.training


def test_different_images_take_different_paths(dense, digits):
    gated = gate(dense)
    gatefit.finetune(gated, digits, dense, **short())
    result = gatefit.evaluate(gated, digits)
    assert result.paths > 20 and float(result.macs.std()) > 0 and result.agreement is None
    assert max(g.distinct for g in result.gates) > 5


def test_a_higher_l1_closes_more(dense, digits):
    shares = []
    for l1 in (1e-5, 1e-3, 1e-1):
        gated = gate(dense)
        gatefit.finetune(gated, digits, dense, l1=l1, **short(target=None, epochs=2))
        shares.append(gatefit.evaluate(gated, digits).share)
    assert shares[0] > shares[1] > shares[2]


def test_without_training_the_start_alone_closes(dense, digits):
    settings = short(target=None, epochs=0)
    for wanted in ({"l1": 1e-3}, {"target": 0.9}):
        gated = gate(dense, "c")
        assert gatefit.finetune(gated, digits, dense, **settings, **wanted) == []
        assert gatefit.evaluate(gated, digits).share < 0.99
    with pytest.raises(RecipeError, match="by training alone"):
        gatefit.finetune(gate(dense), digits, l1=1.0, **settings, start="identity")


def test_a_fill_keeps_accuracy_where_a_mask_alone_loses_it(dense, digits):
    accuracies = []
    for compensation in (False, True):
        gated = gatefit.retrofit(dense, torch.zeros(2, *SPEC.shape), "c", "step", compensation)
        gatefit.finetune(gated, digits, dense, **short(epochs=0, target=0.7, reconstruction_images=0))
        result = gatefit.evaluate(gated, digits)
        assert result.share == pytest.approx(0.7, abs=0.02)
        accuracies.append(result.accuracy)
    assert accuracies[1] > accuracies[0] + 0.02


def test_the_papers_form_closes_gates_too(dense, digits):
    """ReLU-1 from the identity with plain L1, no distillation: only the gradient closes gates."""
    gated = gate(dense, form="relu1")
    settings = short(target=None, l1=0.02, penalty="plain", weight=0.0, gate_lr=0.05, epochs=6)
    gatefit.finetune(gated, digits, **settings, start="identity")
    result = gatefit.evaluate(gated, digits)
    assert result.share < 0.9 and result.accuracy > 0.8


def test_threshold_meets_the_share_on_its_batch(dense, digits):
    gated = gate(dense, "lc").eval()
    initialise_from_data(gated, digits.train, count=600)
    costs = costs_of(gated, SPEC.shape)
    gated(floats(digits, 0))
    shift = threshold_for(gated, costs, 0.7)
    for g, out in outputs_of(gated):
        g.outputs = type(out)(out.block - shift, out.channel - shift)
    assert float(costs.per_image(decisions_of(gated)).mean()) / costs.dense == pytest.approx(0.7, abs=0.02)


def test_the_guard_keeps_every_gate_alive(dense, digits):
    gated = gate(dense)
    gatefit.finetune(gated, digits, dense, l1=1e3, **short(target=None, min_open=0.25, epochs=2))
    for use in gatefit.evaluate(gated, digits).gates:
        assert use.block_open > 0.05 and use.channel_open > 0.05


def test_without_labels_distillation_trains(dense, digits):
    bare = replace(digits.train, labels=None, classes=())
    gated = gate(dense)
    history = gatefit.finetune(gated, bare, dense, **short())
    assert history[0].accuracy is None
    assert gatefit.evaluate(gated, digits, dense).agreement > 0.9


def test_from_scratch(digits):
    """Backbone and gates together, no teacher."""
    gated = gate(network())
    gatefit.finetune(gated, digits, **short(lr=0.1, epochs=8, target=0.7))
    result = gatefit.evaluate(gated, digits)
    assert result.accuracy > 0.85 and result.share == pytest.approx(0.7, abs=0.02)


def test_blocks_teach_without_predictions(dense, digits):
    """The distance to the original's blocks counts where distillation has no weight too."""
    losses = []
    for features in (0.0, 5.0):
        settings = short(epochs=1, gate_reinits=0, weight=0.0, feature_weight=features)
        losses.append(gatefit.finetune(gate(dense), digits, dense, **settings)[0].loss)
    assert losses[1] > losses[0] + 0.1


def test_price_rises_with_l1():
    assert price_threshold(0, 4) == 0
    assert price_threshold(0.08, 2.0) == pytest.approx(0.8)


def test_tensors_are_data_too(dense, digits):
    pair = (torch.randn(128, 3, 8, 8), torch.randint(0, 10, (128,)))
    gated = gate(dense)
    gatefit.finetune(gated, pair, dense, **short(epochs=1, bn_recalibration_images=100))
    assert gatefit.evaluate(gated, as_images(pair, SPEC)).images == 128
