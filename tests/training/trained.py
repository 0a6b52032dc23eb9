"""A small network, its gates, and settings for short trainings on the digits."""

import torch
from networks import Basic, Network

import gatefit
from gatefit.inputs.models import InputSpec
from gatefit.recipe import FinetunePart

SPEC = InputSpec((3, 8, 8), (0.3,) * 3, (0.35,) * 3)


SHORT = FinetunePart(epochs=4, batch_size=64, target=0.6, flip=False, bn_recalibration_images=600)


def network():
    net = Network(Basic(8, 8), Basic(8, 16, 2), Basic(16, 16))
    net.pretrained_cfg = {"input_size": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std}
    return net


def gate(dense, gates="lc", form="step"):
    return gatefit.retrofit(dense, torch.zeros(2, *SPEC.shape), gates, form)


def floats(digits, start):
    from gatefit.inputs.data import normalise

    return normalise(digits.train.__getitems__(list(range(start, start + 100)))[0], SPEC)
