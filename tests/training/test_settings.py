"""Settings that cannot work are refused before anything is trained."""

import pytest
from trained import gate, short

import gatefit
from gatefit.errors import RecipeError, TrainingError


def test_nan_is_refused(dense, digits):
    with pytest.raises(TrainingError, match="not finite at step"):
        gatefit.finetune(gate(dense), digits, dense, **short(lr=1e9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, "give --l1 X or --target"),
        ({"target": 0.05}, "cannot be reached"),
        ({"batch_size": 5000}, "1437 training images; lower .* --set finetune.batch_size=16"),
        ({"accumulate": 3}, "cannot be divided"),
        ({"penalty": "plain"}, "for gates that learn"),
    ],
)
def test_settings_that_cannot_work(dense, digits, change, message):
    with pytest.raises(RecipeError, match=message):
        gatefit.finetune(gate(dense), digits, dense, **short(**change))


@pytest.mark.parametrize(
    ("start", "change", "message"),
    [
        ("identity", {}, "with 'identity' use l1"),
        ("identity", {"target": None, "l1": 0.1, "epochs": 0}, "by training alone"),
        ("identity", {"target": None, "l1": 0.1, "gate_lr": 0.0}, "by training alone"),
        ("dta", {}, "must be 'data' or 'identity', not 'dta'"),
    ],
)
def test_starts_that_cannot_work(dense, digits, start, change, message):
    with pytest.raises(RecipeError, match=message):
        gatefit.finetune(gate(dense), digits, dense, **short(**change), start=start)
