"""Figures are given only where they mean something."""

import math
import warnings

import pytest
import torch
from trained import SPEC, floats, gate, network

import gatefit
from gatefit.errors import DataError, GatefitWarning, ModelError
from gatefit.inputs.data import as_images
from gatefit.training.evaluate import warn_of_chance


@pytest.fixture(scope="module")
def gated():
    torch.manual_seed(0)
    return gate(network())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pixels_that_are_not_finite_are_refused(gated, value):
    images = torch.zeros(300, *SPEC.shape)
    images[270, 1, 2, 3] = value
    with pytest.raises(DataError, match="pixels are NaN or infinite for image 270"):
        gatefit.evaluate(gated, (images, torch.zeros(300, dtype=torch.long)))


def test_answers_that_are_not_finite_are_refused():
    broken = gate(network())
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if n.endswith("weight")).fill_(math.nan)
    with pytest.raises(DataError, match="answers of the network are NaN"):
        gatefit.evaluate(broken, (torch.zeros(2, *SPEC.shape), torch.tensor([0, 1])))


def test_a_teacher_with_another_head_is_refused(gated):
    data = (torch.zeros(64, *SPEC.shape), torch.zeros(64, dtype=torch.long))
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 7))
    with pytest.raises(ModelError, match=r"teacher gives \(7,\) outputs and the gated network \(10,\)"):
        gatefit.evaluate(gated, data, teacher)
    with pytest.raises(ModelError, match="teacher has 7 outputs and the gated network 10"):
        gatefit.finetune(gated, data, teacher, target=0.6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4, 1, dtype=torch.long), r"\(4,\), not \(4, 1\)"),
        (torch.tensor([0.0, 1.7, 2.0, 3.0]), "whole numbers, not such torch.float32"),
        (torch.tensor([0.0, math.nan, math.inf, 1.0]), "whole numbers"),
        (torch.zeros(4, dtype=torch.complex64), "whole numbers, not such torch.complex64"),
        (torch.tensor([0, 1, -1, 2]), "from 0 on; there is -1"),
        (torch.tensor(3), "do not fit"),
        (torch.zeros(0, dtype=torch.long), "do not fit"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused(gated, labels, message):
    images = torch.zeros(4, *SPEC.shape)
    for call in (gatefit.evaluate, lambda net, data: gatefit.finetune(net, data, target=0.6)):
        if labels.dim():
            with pytest.raises(DataError, match=message):
                call(gated, (images, labels))


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64, torch.bool])
def test_images_of_other_kinds_are_refused(kind):
    with pytest.raises(DataError, match="must be uint8, or floats"):
        as_images((torch.zeros(2, *SPEC.shape, dtype=kind), torch.tensor([0, 1])), SPEC)


def test_an_original_that_guesses_gets_a_warning(gated, digits, dense):
    x, labels = floats(digits, 0), digits.train.labels[:100]
    with pytest.warns(GatefitWarning, match=r"that of guessing.*--image-size, --mean, --std.*another order"):
        gatefit.evaluate(gated, (x, 9 - labels), dense)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gatefit.evaluate(gated, (x, labels), dense)


def test_what_guessing_reaches_depends_on_answers_and_labels():
    labels = torch.arange(100) % 2
    with pytest.warns(GatefitWarning):
        warn_of_chance(torch.ones(100, dtype=torch.long), labels)
    lopsided = torch.tensor([0] * 90 + [1] * 10)
    with pytest.warns(GatefitWarning):
        warn_of_chance(torch.zeros(100, dtype=torch.long), lopsided)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_chance(labels, labels)
        warn_of_chance(torch.where(torch.arange(100) < 70, labels, 1 - labels), labels)
        warn_of_chance(torch.zeros(100, dtype=torch.long), torch.zeros(100, dtype=torch.long))
        warn_of_chance(torch.ones(10, dtype=torch.long), labels[:10])
